"""The Bradley-Terry loss of an ensemble of reward heads on preference pairs.

    d[b, k] = chosen[b, k] - rejected[b, k] - margin[b, k]
    l[b, k] = (1 - eps) * -log sigmoid(d) + eps * -log sigmoid(-d)
            = -log sigmoid(d) + eps * d
    loss    = 1/K sum_k  ( sum_b kept[b, k] l[b, k] / max(1, sum_b kept[b, k]) )

that is: the mean over the pairs that ``head_mask`` keeps for a head (kept is 0, 1, or how often a
pair was drawn), then the mean over heads. A head that keeps no pair adds 0 and is still counted in
K, so the gradient that one head gets does not depend on the others. Where the pairs are a part of a
batch, ``totals`` takes the place of the inner sum and the parts' losses add up to the batch's.

eps is ``label_smoothing``: the chance that a label is the wrong way round (conservative form).

Gradient: dl/dchosen = eps - sigmoid(-d) = -dl/drejected = -dl/dmargin.

Sources: Bradley and Terry (1952); the margin, Llama 2, arXiv 2307.09288, equation 2; one loss per
head, arXiv 2406.01013; label smoothing, Mitchell, "A note on DPO with noisy preferences" (2023),
and Wang et al., arXiv 2401.06080.

C++: csrc/bradley_terry_loss.cpp. Triton: kernels/bradley_terry_loss.py. Tests:
tests/test_bradley_terry_loss.py. Benchmark: benchmarks/bench_bradley_terry_loss.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.backend import CPP_BUILT, choose, once_differentiable, plain, refuse_forward_mode
from fastalign.ops.direct import CODES, address, dense, direct
from fastalign.ops.token_logprobs import FLOAT_DTYPES, accumulation_dtype

if CPP_BUILT:
    from fastalign import _C

CPP_COUNTS = (torch.bool, torch.int32, torch.int64)  # dtypes of head_mask that C++ reads


def bradley_terry_loss_reference(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    offset: float = 0.0,
    head_mask: Tensor | None = None,
    totals: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The formula above in plain PyTorch, differentiable by autograd; ``offset`` is a margin that
    all cells share. softplus(-x) is -log sigmoid(x) without overflow."""
    wide = accumulation_dtype(chosen.dtype)
    gap = chosen.to(wide) - rejected.to(wide) - offset
    if margin is not None:
        gap = gap - margin.to(wide)
    times = None if head_mask is None else head_mask.to(wide)
    if times is not None:
        # The gap, not the loss, is replaced: NaN in a masked cell would come back through
        # softplus's gradient.
        gap = torch.where(times > 0, gap, torch.zeros_like(gap))
        times = times.clamp(min=0)
    loss = F.softplus(-gap)
    if label_smoothing:
        loss = loss + label_smoothing * gap
    if totals is None:
        totals = loss.new_tensor(float(len(loss))) if times is None else times.sum(0)
    if times is not None:
        loss = times * loss
    return (loss.sum(0) / totals.to(wide).clamp(min=1)).mean()


def dgap_reference(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    offset: float,
    head_mask: Tensor | None,
    totals: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    """dL/dd [B, K] by the closed form above, in the accumulation dtype."""
    wide = accumulation_dtype(chosen.dtype)
    gap = chosen.to(wide) - rejected.to(wide) - offset
    if margin is not None:
        gap = gap - margin.to(wide)
    slope = label_smoothing - torch.sigmoid(-gap)
    n_pairs, n_heads = gap.shape
    if head_mask is None:
        share = 1.0 / max(1, n_pairs) if totals is None else 1.0 / totals.to(wide).clamp(min=1)
        return slope * share / n_heads
    times = head_mask.to(wide).clamp(min=0)
    share = times / (times.sum(0) if totals is None else totals.to(wide)).clamp(min=1)
    return torch.where(times > 0, slope * share, torch.zeros_like(gap)) / n_heads


def _computed(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    offset: float,
    head_mask: Tensor | None,
    totals: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """(loss, dL/dd [B, K]), by the backend in force."""
    which = choose("bradley_terry_loss", chosen)
    if which == "cpp":
        if head_mask is not None and head_mask.dtype not in CPP_COUNTS:
            head_mask = head_mask.long()
        margin = None if margin is None else margin.float()
        totals = None if totals is None else totals.float()
        by_address = direct(chosen, rejected, margin, head_mask, totals)
        run: Any = _by_address if by_address else torch.ops.fastalign_cpp.bradley_terry_loss
        return run(chosen, rejected, margin, offset, head_mask, totals, label_smoothing)
    args = (chosen, rejected, margin, offset, head_mask, totals, label_smoothing)
    if which == "triton":
        from fastalign.kernels.bradley_terry_loss import bradley_terry_loss_fwd

        return bradley_terry_loss_fwd(*args)
    return bradley_terry_loss_reference(*args), dgap_reference(*args)


def _by_address(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    offset: float,
    head_mask: Tensor | None,
    totals: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """(loss, dL/dd [B, K]) by C++."""
    pairs, heads = chosen.shape
    chosen, rejected = dense(chosen), dense(rejected)
    margin = None if margin is None else dense(margin)
    head_mask = None if head_mask is None else dense(head_mask)
    totals = None if totals is None else dense(totals)
    loss = chosen.new_empty((), dtype=torch.float32)
    dgap = chosen.new_empty((pairs, heads), dtype=torch.float32)
    _C.bradley_terry_loss(
        CODES[chosen.dtype], chosen.data_ptr(), rejected.data_ptr(),
        address(margin), 0 if margin is None else margin.shape[1], offset,
        CODES[torch.bool if head_mask is None else head_mask.dtype], address(head_mask),
        address(totals), label_smoothing, pairs, heads, loss.data_ptr(), dgap.data_ptr(),
    )  # fmt: skip
    return loss, dgap


@torch.library.custom_op("fastalign::bradley_terry_loss", mutates_args=())
def _bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    offset: float,
    head_mask: Tensor | None,
    totals: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    return _computed(chosen, rejected, margin, offset, head_mask, totals, label_smoothing)


@_bradley_terry_loss.register_fake
def _(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    offset: float,
    head_mask: Tensor | None,
    totals: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(chosen.dtype)
    return chosen.new_empty((), dtype=wide), chosen.new_empty(chosen.shape, dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.margin_shape = None if inputs[2] is None else inputs[2].shape
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> Any:
    """Autograd brings each gradient to the dtype of its input."""
    (dgap,) = ctx.saved_tensors
    needs_chosen, needs_rejected, needs_margin = ctx.needs_input_grad[:3]
    if grad_loss is None:
        return (None,) * 7
    # On a CPU looking at the factor is free, and multiplying by one is not.
    one = plain(grad_loss) and grad_loss.device.type == "cpu" and grad_loss.item() == 1.0
    chosen = dgap if one else grad_loss * dgap
    rejected = margin = None
    if needs_rejected or needs_margin:
        rejected = -chosen
        margin = rejected.sum_to_size(ctx.margin_shape) if needs_margin else None
    return chosen if needs_chosen else None, rejected, margin, None, None, None, None


torch.library.register_autograd(
    "fastalign::bradley_terry_loss", once_differentiable(_backward), setup_context=_setup_context
)


class _BradleyTerryLoss(torch.autograd.Function):
    """The op without the dispatcher, which takes longer on a CPU than the loss of 10,000 cells."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        output = _computed(*args)
        ctx.margin_shape = None if args[2] is None else args[2].shape
        ctx.save_for_backward(output[1])
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        # dL/dd is a constant to autograd: a second derivative would be wrong in silence.
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, grad_loss, None)


_backward_once = once_differentiable(_backward)


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    head_mask: Tensor | None = None,
    totals: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean Bradley-Terry loss in nats, by the formula in this module's docstring.

    Loss and gradients are formed in the same pass, also where no gradient is asked for.

    Args:
        chosen, rejected: [B, K], scores of the two responses by K >= 1 heads; bfloat16, float16,
            float32 or float64.
        margin: subtracted from the gap: a float, [B] (one per pair, all heads), or [B, K].
        head_mask: [B, K], bool or integer: which pairs train which head, and how often each counts
            (a bootstrap draw with replacement). NaN in a masked cell (0 or less) has no effect on
            loss or gradient.
        totals: [K], what each head's sum is divided by (at least 1), when these pairs are a part of
            a batch: the sums of head_mask over the whole batch. By default the sums over these
            pairs. It has no gradient.
        label_smoothing: eps in [0, 0.5).

    Returns:
        A scalar, float32 (float64 when an input is float64); 0 when no pair is kept.
        Differentiable in chosen, rejected and margin.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or label_smoothing outside [0, 0.5).
    """
    if chosen.dim() != 2 or chosen.shape != rejected.shape or chosen.shape[1] == 0:
        raise ValueError(
            "bradley_terry_loss: expected chosen and rejected [B, K >= 1], "
            f"got {tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    for name, tensor in (("chosen", chosen), ("rejected", rejected)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"bradley_terry_loss: expected {name} of a floating dtype, got {tensor.dtype}"
            )
    offset = 0.0
    if isinstance(margin, Tensor):
        if margin.shape == chosen.shape[:1]:
            margin = margin[:, None]
        elif margin.shape != chosen.shape:
            raise ValueError(
                f"bradley_terry_loss: expected margin [B] or [B, K] for {tuple(chosen.shape)}, "
                f"got {tuple(margin.shape)}"
            )
    elif margin is not None:
        offset, margin = float(margin), None
    if head_mask is not None:
        if head_mask.shape != chosen.shape or head_mask.is_floating_point():
            raise ValueError(
                f"bradley_terry_loss: expected a bool or integer head_mask {tuple(chosen.shape)}, "
                f"got {tuple(head_mask.shape)} {head_mask.dtype}"
            )
    if totals is not None and totals.shape != chosen.shape[1:]:
        raise ValueError(
            f"bradley_terry_loss: expected totals [K] = ({chosen.shape[1]},), "
            f"got {tuple(totals.shape)}"
        )
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"bradley_terry_loss: expected label_smoothing in [0, 0.5), got {label_smoothing}"
        )
    device = chosen.device
    others = {"rejected": rejected, "margin": margin, "head_mask": head_mask, "totals": totals}
    for name, maybe in others.items():
        if maybe is not None and maybe.device != device:
            raise ValueError(
                f"bradley_terry_loss: expected {name} on the device of chosen, {device}, "
                f"got {maybe.device}"
            )
    dtype = chosen.dtype
    if rejected.dtype != dtype:
        dtype = torch.promote_types(dtype, rejected.dtype)
    if margin is not None and margin.dtype == torch.float64:
        dtype = torch.float64
    refuse_forward_mode("bradley_terry_loss", chosen, rejected, margin)
    args = (
        chosen if chosen.dtype == dtype else chosen.to(dtype),
        rejected if rejected.dtype == dtype else rejected.to(dtype),
        margin,
        offset,
        head_mask,
        None if totals is None else totals.detach(),
        float(label_smoothing),
    )
    if not plain(chosen):
        return _bradley_terry_loss(*args)[0]
    return _BradleyTerryLoss.apply(*args) if torch.is_grad_enabled() else _computed(*args)[0]
