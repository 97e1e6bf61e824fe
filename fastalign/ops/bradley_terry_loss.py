"""The Bradley-Terry loss of an ensemble of reward heads on preference pairs.

    l[b, k] = -log sigmoid(chosen[b, k] - rejected[b, k] - margin[b, k])
    loss    = 1/K sum_k  ( sum_b kept[b, k] l[b, k] / max(1, sum_b kept[b, k]) )

that is: the mean over the pairs that ``head_mask`` keeps for a head (kept is 0, 1, or how often a
pair was drawn), then the mean over heads. A head that keeps no pair adds 0 and is still counted in
K, so the gradient that one head gets does not depend on the others.

Gradient: dl/dchosen = -sigmoid(-(chosen - rejected - margin)) = -dl/drejected.

Sources: Bradley and Terry (1952); the margin, Llama 2, arXiv 2307.09288, equation 2; one loss per
head, arXiv 2406.01013.

Sibling file: tests/test_bradley_terry_loss.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss_reference(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, head_mask: Tensor | None
) -> Tensor:
    """The formula above in plain PyTorch; softplus(-x) is -log sigmoid(x) without overflow."""
    wide = torch.promote_types(torch.promote_types(chosen.dtype, rejected.dtype), torch.float32)
    gap = chosen.to(wide) - rejected.to(wide)
    if margin is not None:
        gap = gap - margin.to(wide)
    if head_mask is None:
        return F.softplus(-gap).sum() / max(1, gap.numel())
    kept, times = head_mask > 0, head_mask.to(wide)
    # The gap, not the loss, is replaced: NaN in a masked cell would come back through softplus's
    # gradient.
    gap = torch.where(kept, gap, torch.zeros_like(gap))
    loss = torch.where(kept, times * F.softplus(-gap), torch.zeros_like(gap))
    return (loss.sum(0) / times.clamp(min=0).sum(0).clamp(min=1)).mean()


torch.library.define(
    "fastalign::bradley_terry_loss",
    "(Tensor chosen, Tensor rejected, Tensor? margin, Tensor? head_mask) -> Tensor",
)
torch.library.impl(
    "fastalign::bradley_terry_loss", "CompositeImplicitAutograd", bradley_terry_loss_reference
)


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    head_mask: Tensor | None = None,
) -> Tensor:
    """Mean Bradley-Terry loss in nats, by the formula in this module's docstring.

    Args:
        chosen, rejected: [B, K], scores of the two responses by K >= 1 heads; bfloat16, float16,
            float32 or float64.
        margin: subtracted from the gap: a float, [B] (one per pair, all heads), or [B, K].
        head_mask: [B, K], bool or integer: which pairs train which head, and how often each counts
            (a bootstrap draw with replacement). NaN in a masked cell (0) has no effect on loss or
            gradient.

    Returns:
        A scalar, float32 (float64 when an input is float64); 0 when no pair is kept.
        Differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if chosen.dim() != 2 or chosen.shape != rejected.shape or chosen.shape[1] == 0:
        raise ValueError(
            "bradley_terry_loss: expected chosen and rejected [B, K >= 1], "
            f"got {tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    for name, tensor in (("chosen", chosen), ("rejected", rejected)):
        if not tensor.is_floating_point():
            raise ValueError(
                f"bradley_terry_loss: expected {name} of a floating dtype, got {tensor.dtype}"
            )
    if isinstance(margin, Tensor):
        if margin.shape == chosen.shape[:1]:
            margin = margin[:, None]
        elif margin.shape != chosen.shape:
            raise ValueError(
                f"bradley_terry_loss: expected margin [B] or [B, K] for {tuple(chosen.shape)}, "
                f"got {tuple(margin.shape)}"
            )
    elif margin is not None:
        margin = torch.full((), margin, dtype=torch.float64, device=chosen.device)
    if head_mask is not None:
        if head_mask.shape != chosen.shape or head_mask.is_floating_point():
            raise ValueError(
                f"bradley_terry_loss: expected a bool or integer head_mask {tuple(chosen.shape)}, "
                f"got {tuple(head_mask.shape)} {head_mask.dtype}"
            )
    for name, maybe in (("rejected", rejected), ("margin", margin), ("head_mask", head_mask)):
        if maybe is not None and maybe.device != chosen.device:
            raise ValueError(
                f"bradley_terry_loss: expected {name} on the device of chosen, {chosen.device}, "
                f"got {maybe.device}"
            )
    return torch.ops.fastalign.bradley_terry_loss(chosen, rejected, margin, head_mask)
