"""linear_logprobs: against float64, every head feature, kept or recomputed logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.linear_logprobs import (
    linear_logprobs,
    linear_logprobs_op,
    linear_logprobs_reference,
)
from fastalign.testing import assert_no_worse, peaked_head

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N, H, V = 37, 24, 203
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "temperature per token": dict(temperature=0.5 + torch.arange(N) / N),
    "bias": dict(bias=True),
    "soft-cap": dict(softcap=5.0),
    "all": dict(temperature=0.5 + torch.arange(N) / N, bias=True, softcap=5.0),
}


def one_row(dtype: torch.dtype) -> int:
    return V * dtype.itemsize


def make(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets (every fifth ignored), bias."""
    hidden, weight, targets = peaked_head(N, H, V, dtype=dtype, seed=seed)
    targets[::5] = -100
    bias = torch.randn(V, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return hidden, weight, targets, bias


def weighted(logp: Tensor, entropy: Tensor) -> Tensor:
    """A number that depends on each log-prob and entropy in its own way."""
    i = torch.arange(len(logp), device=logp.device)
    return (logp * torch.sin(i + 1.0) + entropy * torch.cos(2.0 * i)).sum()


def results(f: Any, tensors: list[Tensor]) -> list[Tensor]:
    """logp, entropy and the gradients of ``weighted`` in each tensor."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    logp, entropy = f(*leaves)
    grads = torch.autograd.grad(weighted(logp, entropy), leaves)
    return [logp.detach(), entropy.detach(), *grads]


def compare(dtype: torch.dtype, features: dict[str, Any], workspace: int | None) -> None:
    hidden, weight, targets, bias = make(dtype)
    tensors = [hidden, weight, bias] if features.get("bias") else [hidden, weight]
    settings = {k: v for k, v in features.items() if k != "bias"}

    def own(h: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return linear_logprobs(
            h, w, targets, bias=b, return_entropy=True, workspace=workspace, **settings
        )

    def plain(h: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(settings.get("temperature", 1.0), dtype=torch.float64)
        t = t.reshape(-1).to(torch.float64 if h.dtype == torch.float64 else torch.float32)
        return linear_logprobs_reference(h, w, targets, b, t, settings.get("softcap", 0.0))

    kernel, eager = results(own, tensors), results(plain, tensors)
    truth = results(plain, [x.double() for x in tensors])
    for index, (got, rough, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        assert_no_worse(got, rough, true, dtype, grad=index >= 2)


@pytest.mark.parametrize("workspace_rows", [None, 16, 5], ids=["kept", "2 slabs", "6 slabs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_against_float64(
    features: dict[str, Any], dtype: torch.dtype, workspace_rows: int | None
) -> None:
    compare(dtype, features, workspace_rows and workspace_rows * one_row(dtype))


@pytest.mark.parametrize("workspace_rows", [None, 16], ids=["kept", "2 slabs"])
def test_triton_rows_in_the_slabs(workspace_rows: int | None) -> None:
    """With the Triton row kernels (interpreted without a GPU) the op still is the reference."""
    hidden, weight, targets, _ = (x.to("cuda" if CUDA else "cpu") for x in make(torch.float32))
    workspace = workspace_rows and workspace_rows * one_row(torch.float32)
    outputs = []
    for backend in ("triton", "reference"):
        with fa.backend(backend):
            outputs.append(
                results(
                    lambda h, w: linear_logprobs(
                        h, w, targets, return_entropy=True, workspace=workspace
                    ),
                    [hidden, weight],
                )
            )
    for index, (got, plain) in enumerate(zip(*outputs, strict=True)):
        assert_no_worse(got, plain, plain.double(), torch.float32, grad=index >= 2)


def test_weight_gradient_is_not_rounded_per_slab() -> None:
    """33 slabs in bfloat16: rounding each part of dW to bfloat16 would leave twice the error."""
    hidden, weight, _ = peaked_head(1056, H, V, dtype=torch.bfloat16)
    targets = torch.randint(V, (1056,))

    def error(workspace: int | None) -> float:
        w = weight.clone().requires_grad_()
        linear_logprobs(hidden, w, targets, workspace=workspace).sum().backward()
        assert w.grad is not None
        return (w.grad.double() - truth).norm().item()

    w = weight.double().requires_grad_()
    linear_logprobs(hidden.double(), w, targets).sum().backward()
    assert w.grad is not None
    truth = w.grad
    assert error(32 * one_row(torch.bfloat16)) <= 1.05 * error(None)


def test_bias_gradient_is_not_rounded_per_slab() -> None:
    """33 slabs in bfloat16, against float64, as for the weight."""
    hidden, weight, _ = peaked_head(1056, H, V, dtype=torch.bfloat16)
    targets = torch.randint(V, (1056,))

    def gradient(h: Tensor, w: Tensor, workspace: int | None = None) -> Tensor:
        bias = torch.zeros(V, dtype=h.dtype, requires_grad=True)
        linear_logprobs(h, w, targets, bias=bias, workspace=workspace).sum().backward()
        assert bias.grad is not None
        return bias.grad.double()

    truth = gradient(hidden.double(), weight.double())
    whole = (gradient(hidden, weight) - truth).norm().item()
    slabs = (gradient(hidden, weight, 32 * one_row(torch.bfloat16)) - truth).norm().item()
    assert slabs <= 1.05 * whole


def test_kept_and_recomputed_logits_give_the_same_bits() -> None:
    """In products of one shape."""
    hidden, weight, targets, _ = make(torch.float32)
    t = torch.ones(1)

    def with_slabs(keep: bool) -> list[Tensor]:
        return results(
            lambda h, w: linear_logprobs_op(
                h, w, targets, None, t, 0.0, -100, None, 16, 48 if keep else 0, True
            )[:2],
            [hidden, weight],
        )

    for kept, recomputed in zip(with_slabs(True), with_slabs(False), strict=True):
        assert torch.equal(kept, recomputed)


def test_backward_twice_through_kept_logits() -> None:
    """The kept logits must survive a backward pass with retain_graph."""
    hidden, weight, targets, _ = make(torch.float32)
    hidden.requires_grad_()
    logp = linear_logprobs(hidden, weight, targets).sum()
    first = torch.autograd.grad(logp, hidden, retain_graph=True)[0]
    second = torch.autograd.grad(logp, hidden)[0]
    assert torch.equal(first, second)


def test_same_bits_again_and_independent_of_the_neighbours() -> None:
    hidden, weight, targets, _ = make(torch.float32)
    workspace = 16 * one_row(torch.float32)
    first = linear_logprobs(hidden, weight, targets, workspace=workspace)
    assert torch.equal(first, linear_logprobs(hidden, weight, targets, workspace=workspace))
    others = hidden.clone()
    others[10:] = torch.randn(N - 10, H)
    changed = linear_logprobs(others, weight, targets, workspace=workspace)
    assert torch.equal(first[:10], changed[:10])
    assert not torch.equal(first[10:], changed[10:])


@pytest.mark.parametrize("ignored", ["all", "none of N = 0"])
def test_no_rows(ignored: str) -> None:
    hidden, weight, targets, bias = make(torch.float32)
    if ignored == "all":
        targets[:] = -100
        hidden[:] = float("nan")
    else:
        hidden, targets = hidden[:0], targets[:0]
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    logp, entropy = linear_logprobs(hidden, weight, targets, bias=bias, return_entropy=True)
    grads = torch.autograd.grad(logp.sum() + entropy.sum(), leaves)
    for x in (logp, entropy, *grads):
        assert x.abs().sum() == 0.0
    assert logp.shape == targets.shape


def test_ignored_rows_never_enter_a_product() -> None:
    """NaN in the hidden state of an ignored row reaches neither outputs nor any gradient."""
    hidden, weight, targets, _ = make(torch.float32)
    clean = results(
        lambda h, w: linear_logprobs(h, w, targets, return_entropy=True), [hidden, weight]
    )
    hidden[targets == -100] = float("nan")
    dirty = results(
        lambda h, w: linear_logprobs(h, w, targets, return_entropy=True), [hidden, weight]
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


def test_nothing_is_dropped_with_ignore_index_none() -> None:
    hidden, weight, targets, _ = make(torch.float32)
    targets = targets.clamp(min=0)
    kept = linear_logprobs(hidden, weight, targets, ignore_index=None)
    assert torch.equal(kept, linear_logprobs(hidden, weight, targets))


def test_non_contiguous_input() -> None:
    hidden, weight, targets, _ = make(torch.float32)
    wide = torch.stack((hidden, hidden), dim=2)[:, :, 0]
    tall = weight.t().contiguous().t()
    odd = torch.stack((targets, targets), dim=1)[:, 0]
    got = linear_logprobs(wide, tall, odd)
    expected = linear_logprobs(hidden, weight, targets)
    assert_no_worse(got, expected, expected.double(), torch.float32)


def test_autocast_is_followed() -> None:
    hidden, weight, targets, _ = make(torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logprobs(hidden, weight, targets)
    logp.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert torch.equal(logp, linear_logprobs(hidden.bfloat16(), weight.bfloat16(), targets))


def count_products(f: Any) -> int:
    """Matrix products of N x V x H that f runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "keep", "products"),
    [
        (False, False, False, 1),
        (True, False, True, 2),
        (True, True, True, 3),
        (True, True, False, 4 * 2),  # two slabs
    ],
)
def test_number_of_products(
    hidden_grad: bool, weight_grad: bool, keep: bool, products: int
) -> None:
    hidden, weight, targets, _ = make(torch.float32)
    targets = targets.clamp(min=0)
    hidden.requires_grad_(hidden_grad)
    weight.requires_grad_(weight_grad)

    def step() -> None:
        workspace = None if keep or not hidden_grad else 32 * one_row(torch.float32)
        logp = linear_logprobs(hidden, weight, targets, workspace=workspace)
        if hidden_grad or weight_grad:
            logp.sum().backward()

    assert count_products(step) == products


def test_opcheck() -> None:
    hidden, weight, targets, bias = make(torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    bias.requires_grad_()
    t = torch.ones(1)
    index = (targets != -100).nonzero()[:, 0]
    every = index.numel()
    for known, keep, fill in (
        (None, N, False),
        (None, 0, False),
        (None, 48, True),
        (None, 0, True),
        (index, every, False),
        (index, 32, True),
    ):
        args = (hidden, weight, targets, bias, t, 0.0, -100, known, 16, keep, fill)
        torch.library.opcheck(linear_logprobs_op, args)


@pytest.mark.parametrize("workspace_rows", [None, 16], ids=["kept", "2 slabs"])
def test_compiles_whole_with_gradients(workspace_rows: int | None) -> None:
    hidden, weight, targets, _ = make(torch.float32)
    workspace = workspace_rows and workspace_rows * one_row(torch.float32)

    def f(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs(h * 1.0, w, targets, return_entropy=True, workspace=workspace)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    plain = results(f, [hidden, weight])
    for a, b in zip(results(compiled, [hidden, weight]), plain, strict=True):
        assert torch.equal(a, b)


def test_gradcheck() -> None:
    hidden, weight, targets = peaked_head(4, 3, 9, dtype=torch.float64)
    targets[1] = -100
    args = (hidden.requires_grad_(), weight.requires_grad_())

    def f(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs(
            h, w, targets, temperature=0.7, softcap=4.0, return_entropy=True, workspace=2 * 9 * 8
        )

    assert torch.autograd.gradcheck(f, args)


def bad_cases() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "width": (dict(weight=torch.zeros(7, 3)), r"\(4, 5\) and \(7, 3\)"),
        "dtype": (dict(weight=torch.zeros(7, 5).double()), "weight like hidden.*float64"),
        "targets": (dict(targets=torch.zeros(3, dtype=torch.int64)), r"\(4,\).*got.*\(3,\)"),
        "bias": (dict(bias=torch.zeros(6)), r"bias of shape \(7,\), got \(6,\)"),
        "temperature": (dict(temperature=-1.0), "temperature > 0, got -1.0"),
        "softcap": (dict(softcap=0.0), "softcap > 0 or None, got 0.0"),
        "workspace": (dict(workspace=20), "workspace >= 28 bytes.*7 logits.*got 20"),
        "integers": (
            dict(hidden=torch.zeros(4, 5).long(), weight=torch.zeros(7, 5).long()),
            "float hidden, got torch.int64",
        ),
    }


@pytest.mark.parametrize("name", bad_cases())
def test_bad_input_is_named(name: str) -> None:
    changed, message = bad_cases()[name]
    kwargs: dict[str, Any] = {
        "hidden": torch.zeros(4, 5),
        "weight": torch.zeros(7, 5),
        "targets": torch.zeros(4, dtype=torch.int64),
    }
    kwargs.update(changed)
    with pytest.raises(ValueError, match=f"linear_logprobs: .*{message}"):
        linear_logprobs(**kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [None, 64 << 20], ids=["default", "64 MiB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_at_real_sizes(dtype: torch.dtype, workspace: int | None) -> None:
    hidden, weight, targets = peaked_head(2048, 1024, 32_000, dtype=dtype, device="cuda")
    targets[::3] = -100

    def own(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs(h, w, targets, return_entropy=True, workspace=workspace)

    def plain(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.ones(1, device="cuda", dtype=torch.float64)
        return linear_logprobs_reference(h, w, targets, None, t.to(torch.float32))

    kernel, eager = results(own, [hidden, weight]), results(plain, [hidden, weight])
    truth = results(plain, [hidden.double(), weight.double()])
    for index, (got, rough, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        assert_no_worse(got, rough, true, dtype, grad=index >= 2)


@pytest.mark.gpu
def test_gpu_never_waits_when_nothing_is_dropped() -> None:
    hidden, weight, targets = peaked_head(64, 32, 500, dtype=torch.bfloat16, device="cuda")
    hidden.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_logprobs(hidden, weight, targets, ignore_index=None).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad is not None and hidden.grad.isfinite().all()
