"""How results are judged, and inputs that find faults. Used by tests and benchmarks.

A kernel passes when its error against the truth (the reference in float64) is at most twice the
error of the same computation by plain PyTorch in the kernel's dtype, plus a floor from
``TOLERANCES``. The floor stands for the last digit: without it a lucky eager result would fail
everyone else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Floors, relative to the largest magnitude of the truth."""

    floor: float
    """For results kept in float32 (log-probs, entropies, losses), relative to max(1, magnitude)."""
    grad_floor: float
    """For gradients, which are stored in the input's dtype: about one unit in the last place."""


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(floor=1e-13, grad_floor=1e-12),
    torch.float32: Tolerance(floor=1e-6, grad_floor=1e-6),
    torch.float16: Tolerance(floor=1e-6, grad_floor=1e-3),
    torch.bfloat16: Tolerance(floor=1e-6, grad_floor=8e-3),
}
# Two units in the last place of float32, relative to max(1, magnitude).
LAST_DIGITS = 2.0**-22


def assert_no_worse(
    kernel: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, grad: bool = False
) -> None:
    """AssertionError unless max|kernel - truth| <= 2 max|eager - truth| + floor * magnitude.

    Infinities and NaN must stand at the same places as in the truth.

    Args:
        kernel: the result to judge, any dtype.
        eager: the same result by plain PyTorch in ``dtype``.
        truth: the same result in float64.
        dtype: the input dtype, which names the row of ``TOLERANCES``.
        grad: whether the result is a gradient.
    """
    error, eager_error, magnitude = _errors(kernel, eager, truth)
    tolerance = TOLERANCES[dtype]
    floor = tolerance.grad_floor * magnitude if grad else tolerance.floor * max(1.0, magnitude)
    assert error <= 2.0 * eager_error + floor, (
        f"error {error:.3g} > 2 x eager's {eager_error:.3g} + floor {floor:.3g}"
    )


def assert_as_precise(kernel: Tensor, eager: Tensor, truth: Tensor) -> None:
    """AssertionError unless max|kernel - truth| <= 1.1 max|eager - truth| + two last digits.

    For results that cost no precision at all: ``eager`` computes in float32 what the kernel does,
    from the same inputs, and rounds gradients to the same dtype.

    Args:
        kernel: the result to judge, any dtype.
        eager: the same result by plain PyTorch in float32, rounded to the kernel's dtype.
        truth: the same result in float64.
    """
    error, eager_error, magnitude = _errors(kernel, eager, truth)
    floor = LAST_DIGITS * max(1.0, magnitude)
    assert error <= 1.1 * eager_error + floor, (
        f"error {error:.3g} > 1.1 x eager's {eager_error:.3g} + floor {floor:.3g}"
    )


def _errors(kernel: Tensor, eager: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """(largest error of the kernel, of eager, largest magnitude), where the truth is finite."""
    assert kernel.shape == truth.shape, f"shape {tuple(kernel.shape)} != {tuple(truth.shape)}"
    got, plain, true = (x.detach().double().cpu() for x in (kernel, eager, truth))
    finite = true.isfinite()
    odd_got, odd_true = got[~finite], true[~finite]
    same = (odd_got == odd_true) | (odd_got.isnan() & odd_true.isnan())
    assert bool(same.all()), f"expected {odd_true.tolist()[:5]}, got {odd_got.tolist()[:5]}"
    got, plain, true = got[finite], plain[finite], true[finite]
    if true.numel() == 0:
        return 0.0, 0.0, 0.0
    error = (got - true).abs().max().item()
    eager_error = (plain - true).abs().nan_to_num(nan=0.0).max().item()
    return error, eager_error, true.abs().max().item()


def peaked_logits(
    n: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(logits [n, vocab], targets [n]) like a trained model's: a few likely tokens and a long tail.

    Entropies range from near 0 to a few nats; three targets in four are among the likely tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, vocab, generator=generator) - 4.0
    likely = torch.randint(vocab, (n, 8), generator=generator)
    heights = 12.0 * torch.rand(n, 8, generator=generator)
    logits.scatter_(1, likely, heights)
    targets = torch.randint(vocab, (n,), generator=generator)
    picked = likely[torch.arange(n), torch.randint(8, (n,), generator=generator)]
    targets = torch.where(torch.rand(n, generator=generator) < 0.75, picked, targets)
    return logits.to(device=device, dtype=dtype), targets.to(device)


def peaked_head(
    n: int,
    width: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [n, width], weight [vocab, width], targets [n]) whose logits are peaked.

    Each hidden state points partly along the weight row of one likely token, which three targets in
    four are.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    likely = torch.randint(vocab, (n,), generator=generator)
    strength = 10.0 * torch.rand(n, 1, generator=generator)
    hidden = strength * weight[likely] + torch.randn(n, width, generator=generator)
    targets = torch.randint(vocab, (n,), generator=generator)
    targets = torch.where(torch.rand(n, generator=generator) < 0.75, likely, targets)
    return (
        hidden.to(device=device, dtype=dtype),
        weight.to(device=device, dtype=dtype),
        targets.to(device),
    )


def adversarial_logits(vocab: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (logits [4, vocab], targets [4]): each has broken some published kernel.

    ``vocab`` must be at least 8. Row 3 of each case is ignored (target -100) and holds NaN.
    """
    generator = torch.Generator().manual_seed(1)
    base = 2.0 * torch.randn(4, vocab, generator=generator)
    targets = torch.tensor([0, vocab - 1, vocab // 2, -100])
    cases = {
        "shifted by -120": base - 120.0,
        "shifted by +1e4": base + 1e4,
        "shifted by -1e4": base - 1e4,
        "ties": base.round(),
        "all equal": torch.full_like(base, 3.0),
        "one certain token": base.index_fill(1, torch.tensor([0]), 40.0),
        "columns at -inf": base.index_fill(1, torch.arange(1, vocab // 2), float("-inf")),
        "target at -inf": base.index_fill(1, torch.tensor([0]), float("-inf")),
        "all but one at -inf": base.index_fill(1, torch.arange(vocab - 1), float("-inf")),
    }
    made = {}
    for name, logits in cases.items():
        logits = logits.clone()
        logits[3] = float("nan")
        made[name] = (logits.to(dtype), targets.clone())
    return made
