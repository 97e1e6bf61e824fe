"""Batches of preferences, losses to test with, and how a call on each backend is judged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from fastalign.losses import DPO, KTO, RPO, XPO, SimPO
from fastalign.losses.preference import PreferenceLoss
from fastalign.ops.preference_loss import preference_loss
from fastalign.testing import assert_no_worse

# The pair of the published values: sums of log-probs over 8 and 5 tokens, and the reference's.
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = -10.0, -12.0, -11.0, -11.5
TOKENS = (8, 5)

KERNELS = ["cpp", "triton"]
ALL = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOSSES: dict[str, PreferenceLoss] = {
    "dpo": DPO(),
    "conservative": DPO(0.2, label_smoothing=0.1),
    "robust": DPO(0.2, "robust", label_smoothing=0.2),
    "hinge": DPO(0.1, "hinge"),
    "ipo": DPO(0.1, "ipo"),
    "ipo, means": DPO(0.1, "ipo", average=True),
    "h-dpo": DPO(0.2, alpha=0.8),
    "r-dpo": DPO(length_coef=0.02),
    "all": DPO(0.3, label_smoothing=0.1, average=True, alpha=1.3, length_coef=-0.01),
    "rpo": RPO(eta=0.3),
    "rpo, means": RPO(eta=0.3, nll="mean"),
    "xpo": XPO(alpha=0.01),
    "simpo": SimPO(2.0, 0.7, label_smoothing=0.05),
    "kto": KTO(0.2, desirable_weight=1.2, undesirable_weight=0.7),
}
# An empty chosen, an empty rejected and an empty pair; one past a block of the Triton kernel, and
# more tokens than one task of the C++ kernel has.
LENGTHS = [7, 31, 0, 5, 40, 0, 0, 0, 1024, 1025, 1, 1, 2500, 130, 9000, 7000]
Batch = dict[str, Any]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def batch(lengths: list[int], dtype: torch.dtype = torch.float32) -> Batch:
    """Log-probs a little away from the reference's, one token in ten masked."""
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths)
    logp = -2.0 * torch.rand(n, generator=generator)
    shift = 0.02 * torch.randn(len(lengths), generator=generator)
    shift = shift.repeat_interleave(torch.tensor(lengths))
    return {
        "logp": logp.to(dtype),
        "ref_logp": (logp + 0.2 * torch.randn(n, generator=generator) + shift).to(dtype),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "mask": torch.rand(n, generator=generator) < 0.9,
        "chosen_is_ref": torch.rand(len(lengths) // 2, generator=generator) < 0.5,
        "desirable": torch.rand(len(lengths), generator=generator) < 0.5,
        "z0": torch.tensor(0.3),
        "weights": torch.rand(len(lengths), generator=generator) + 0.5,
    }


def inputs_of(loss: PreferenceLoss, b: Batch) -> Batch:
    return {name: b[name] for name in loss.required if name != "cu_seqlens"}


def run(backend: str, loss: PreferenceLoss, b: Batch, masked: bool = True) -> dict[str, Tensor]:
    """losses, statistics, and the gradient of a weighted sum of the losses."""
    given = {k: x.to(device_of(backend)) for k, x in b.items()}
    leaf = given["logp"].detach().clone().requires_grad_()
    with fa.backend(backend):
        losses, statistics = preference_loss(
            loss,
            leaf,
            given["cu_seqlens"],
            mask=given["mask"] if masked else None,
            **inputs_of(loss, given),
        )
        weights = given["weights"][: len(losses)].to(losses.dtype)
        (gradient,) = torch.autograd.grad((weights * losses).sum(), leaf)
    found = {"loss": losses, "gradient": gradient, **statistics}
    return {name: x.detach().cpu() for name, x in found.items()}


def compare(backend: str, loss: PreferenceLoss, b: Batch, masked: bool = True) -> None:
    kernel, eager = run(backend, loss, b, masked), run("reference", loss, b, masked)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in b.items()}
    truth = run("reference", loss, wide, masked)
    assert list(kernel) == list(truth)
    for name, true in truth.items():
        grad = name == "gradient"
        if name == "rewards/accuracies":  # a step: rounding may go either way at 0
            sure = ~(truth["rewards/margins"].abs() < 1e-4)
            assert torch.equal(kernel[name].nan_to_num(9)[sure], true.float().nan_to_num(9)[sure])
            continue
        assert_no_worse(kernel[name], eager[name], true, b["logp"].dtype, grad=grad)


def packed(*sums: float, lengths: tuple[int, ...] = TOKENS) -> Tensor:
    """Tokens of unequal log-probs that add up to these sums."""
    parts = []
    for total, n in zip(sums, lengths, strict=True):
        steps = torch.arange(1, n + 1, dtype=torch.float64)
        parts.append(total * steps / steps.sum())
    return torch.cat(parts)


def random_pairs(n_pairs: int = 30) -> dict[str, Tensor]:
    """Pairs of 1 to 12 tokens a side; h of both signs, beyond the hinge too."""
    lengths = torch.randint(1, 13, (2 * n_pairs,))
    n = int(lengths.sum())
    return {
        "logp": -2.0 * torch.rand(n, dtype=torch.float64),
        "ref_logp": -2.0 * torch.rand(n, dtype=torch.float64),
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
    }
