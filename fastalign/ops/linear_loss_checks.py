"""What linear_loss checks at the door, and what it makes of it.

Called by fastalign/ops/linear_loss.py. Tests: tests/test_linear_loss_bad_input.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastalign.losses.inputs import wide
from fastalign.losses.ratio import exact_kl_coef
from fastalign.ops.linear_loss_call import FROM_REFERENCE, Loss, accepted, sequences_per_value
from fastalign.ops.linear_loss_walk import Reference
from fastalign.ops.policy_loss_terms import fused
from fastalign.ops.policy_reduce import REDUCTIONS
from fastalign.ops.slab import check_head, follow_autocast
from fastalign.ops.token_kl import check_same_precision
from fastalign.ops.token_logprobs import accumulation_dtype

OP = "linear_loss"


def at_hand(x: Tensor) -> bool:
    """Whether the value can be looked at without a wait (a fake tensor has none)."""
    return x.device.type == "cpu" and type(x) is Tensor


def check_loss(loss: Loss, learned: tuple[str, ...], has_reference: bool) -> None:
    """What the objects of fastalign.losses ask for beyond their inputs."""
    name = type(loss).__name__
    per_sequence = getattr(loss, "per_sequence", False)
    if learned and (fused(loss) or per_sequence):
        raise ValueError(
            f"{OP}: expected constants, because {name} has no gradient in its inputs; "
            f"{', '.join(learned)} requires grad"
        )
    if exact_kl_coef(loss) and not has_reference:
        raise ValueError(f"{OP}: expected ref_hidden and ref_weight for the exact KL of {loss}")
    if has_reference and not hasattr(loss, "required"):
        if not any(accepted(loss, given) for given in FROM_REFERENCE):
            raise ValueError(
                f"{OP}: ref_hidden is given, so expected a loss that takes kl or ref_logp, "
                f"got {loss}"
            )


def check_reduction(loss: Loss, reduction: str | None, groups: bool, per_group: bool) -> None:
    if reduction not in (None, *REDUCTIONS):
        raise ValueError(
            f"{OP}: expected reduction to be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    if reduction == "sequence_mean" and not groups:
        raise ValueError(f"{OP}: expected groups, the sequences of a sequence_mean")
    if reduction == "sequence_mean" and sequences_per_value(loss) > 1:
        raise ValueError(f"{OP}: expected reduction sum or None (the mean over pairs) for {loss}")
    if reduction == "token_mean" and per_group:
        raise ValueError(f"{OP}: expected reduction sequence_mean or sum for a loss per group")


def checked_normalizer(normalizer: float | Tensor | None) -> float | Tensor | None:
    if isinstance(normalizer, Tensor):
        if normalizer.requires_grad:
            raise ValueError(f"{OP}: normalizer has no gradient, got a tensor that requires grad")
        if normalizer.dim() != 0:
            raise ValueError(
                f"{OP}: expected normalizer as a number or a 0-d tensor, "
                f"got shape {tuple(normalizer.shape)}"
            )
        if at_hand(normalizer) and not normalizer > 0:
            raise ValueError(f"{OP}: expected normalizer > 0, got {normalizer.item()}")
        # One over a narrow number would be rounded.
        return wide(normalizer.detach()) if normalizer.is_floating_point() else normalizer
    if normalizer is not None and not normalizer > 0:
        raise ValueError(f"{OP}: expected normalizer > 0, got {normalizer}")
    return normalizer


def checked_groups(groups: Tensor | Sequence[int], n: int, inputs: dict[str, Any]) -> list[int]:
    """cu_seqlens on the host."""
    if isinstance(groups, Tensor):
        if groups.dim() != 1 or groups.is_floating_point():
            raise ValueError(
                f"{OP}: expected groups as integer cu_seqlens of shape [G + 1], "
                f"got shape {tuple(groups.shape)}, {groups.dtype}"
            )
        groups = groups.tolist()
    bounds = list(groups)
    if len(bounds) < 2:
        raise ValueError(f"{OP}: expected groups [G + 1] with G >= 1, got {len(bounds)} bounds")
    if "cu_seqlens" in inputs:
        raise ValueError(f"{OP}: expected no input named cu_seqlens beside groups")
    if bounds[0] != 0 or bounds[-1] != n or bounds != sorted(bounds):
        raise ValueError(
            f"{OP}: expected groups to rise from 0 to N = {n}, got {bounds[:3]}..{bounds[-1]}"
        )
    return bounds


def number_of_groups(loss: Loss, bounds: list[int]) -> int:
    per = sequences_per_value(loss)
    if (len(bounds) - 1) % per:
        raise ValueError(
            f"{OP}: expected groups with {per} sequences for each value of {loss}, "
            f"got {len(bounds) - 1}"
        )
    return (len(bounds) - 1) // per


def checked_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    inputs: dict[str, Any],
) -> Reference | None:
    if ref_hidden is None or ref_weight is None:
        if not (ref_hidden is ref_weight is ref_bias is None):
            raise ValueError(f"{OP}: expected ref_hidden and ref_weight together, got one of them")
        return None
    ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
    ref_bias = None if ref_bias is None else ref_bias.detach()
    ref_hidden, ref_weight, ref_bias = follow_autocast(ref_hidden, ref_weight, ref_bias)
    check_head(f"{OP} (reference)", ref_hidden, ref_weight, ref_bias)
    check_same_precision(OP, "ref_hidden", ref_hidden, hidden)
    fits = ref_hidden.shape[0] == hidden.shape[0] and ref_weight.shape[0] == weight.shape[0]
    if not fits or ref_hidden.device != hidden.device:
        raise ValueError(
            f"{OP}: expected ref_hidden [{hidden.shape[0]}, H'] and ref_weight "
            f"[{weight.shape[0]}, H'] on {hidden.device}, got {tuple(ref_hidden.shape)} and "
            f"{tuple(ref_weight.shape)} on {ref_hidden.device}"
        )
    for name in FROM_REFERENCE:
        if name in inputs:
            raise ValueError(f"{OP}: expected no input named {name} beside ref_hidden")
    return Reference(ref_hidden, ref_weight, ref_bias)


def checked_weight_grad(weight_grad: Tensor | None, weight: Tensor) -> Tensor | None:
    if weight_grad is None:
        return None
    dtype = accumulation_dtype(weight.dtype)
    if (
        weight_grad.shape != weight.shape
        or weight_grad.dtype != dtype
        or weight_grad.device != weight.device
        or not weight_grad.is_contiguous()
        or weight_grad.requires_grad
    ):
        raise ValueError(
            f"{OP}: expected weight_grad as a contiguous {dtype} buffer of shape "
            f"{tuple(weight.shape)} on {weight.device}, got {weight_grad.dtype}, "
            f"{tuple(weight_grad.shape)} on {weight_grad.device}"
        )
    return weight_grad


def check_inputs(
    inputs: dict[str, Any], hidden: Tensor, n_groups: int | None, bounds: list[int] | None
) -> None:
    n = hidden.shape[0]
    sizes = [n] + ([] if n_groups is None else [n_groups])
    ambiguous = n_groups == n and bounds != list(range(n + 1))
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            continue
        # A constant of 0-d on the host goes along with a launch; its gradient would be waited for.
        if x.device != hidden.device and (x.dim() > 0 or x.requires_grad):
            raise ValueError(f"{OP}: expected input {name!r} on {hidden.device}, got {x.device}")
        if x.dim() > 0 and x.shape[0] not in sizes:
            raise ValueError(
                f"{OP}: expected input {name!r} with leading dimension "
                f"{' or '.join(map(str, sizes))}, or 0-d, got shape {tuple(x.shape)}"
            )
        if x.dim() > 0 and ambiguous:
            raise ValueError(
                f"{OP}: expected groups of one row each where there are as many as rows, G = N = "
                f"{n}: nothing else tells whether input {name!r} is one per row or one per group; "
                "leave the empty groups out"
            )
