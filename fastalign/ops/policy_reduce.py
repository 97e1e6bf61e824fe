"""From what callers of ``policy_loss`` hold to the kernels' flat tokens, and back to one number.

Checks at the door, tokens and sequences, padded [B, T] or packed [N], each token's share in the
mean, gspo's mean over a sequence, and the names of the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.losses.grpo import sequence_of_token
from fastalign.losses.inputs import constants, wide
from fastalign.losses.value import ValueLoss
from fastalign.ops.policy_terms import COLUMNS, KINDS, Form, Tokens, form_of

REDUCTIONS = ("token_mean", "sequence_mean", "sum")


class Layout(NamedTuple):
    """How tokens form sequences: rows of [B, T], or [N] cut by cu_seqlens; a mask may drop some."""

    shape: torch.Size
    mask: Tensor | None  # bool, of this shape
    cu_seqlens: Tensor | None  # [S + 1] int64

    def sums(self, x: Tensor) -> Tensor:
        """[S]: the sum of each sequence's kept tokens."""
        if self.mask is not None:
            x = torch.where(self.mask, x, 0.0)
        if self.cu_seqlens is None:
            return x.sum(1)
        return torch.segment_reduce(x, "sum", offsets=self.cu_seqlens, initial=0.0, unsafe=True)

    def lengths(self, like: Tensor) -> Tensor:
        """[S]: the number of kept tokens, in the dtype of ``like``."""
        if self.mask is None and self.cu_seqlens is not None:
            return self.cu_seqlens.diff().to(like.dtype)
        return self.sums(torch.ones(self.shape, dtype=like.dtype, device=like.device))

    def of_tokens(self, x: Tensor) -> Tensor:
        """[S] to flat [N]: its sequence's number for every token."""
        if self.cu_seqlens is not None:
            return x[sequence_of_token(self.cu_seqlens, self.shape[0])]
        return x[:, None].expand(self.shape).reshape(-1)


def check_layout(
    op: str, x: Tensor, name: str, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Layout:
    """The layout of ``x``; ValueError for what does not fit it."""
    if not x.is_floating_point() or x.dim() != 1 and (cu_seqlens is not None or x.dim() != 2):
        want = "[N] with cu_seqlens" if cu_seqlens is not None else "[N] or [B, T]"
        raise ValueError(
            f"{op}: expected {name} {want} of a floating dtype, "
            f"got shape {tuple(x.shape)}, {x.dtype}"
        )
    if mask is not None:
        check_like(op, "mask", mask, x, name)
        if mask.is_floating_point():
            raise ValueError(f"{op}: expected a bool or integer mask, got {mask.dtype}")
        mask = mask.to(torch.bool)
    if cu_seqlens is not None:
        _check_offsets(op, cu_seqlens, x)
        cu_seqlens = cu_seqlens.to(torch.int64)
    return Layout(x.shape, mask, cu_seqlens)


def check_like(op: str, name: str, x: Tensor, like: Tensor, of: str) -> None:
    """ValueError unless ``x`` has the shape and the device of ``like``."""
    if x.shape != like.shape or x.device != like.device:
        raise ValueError(
            f"{op}: expected {name} like {of}, {tuple(like.shape)} on {like.device}, "
            f"got {tuple(x.shape)} on {x.device}"
        )


def _check_offsets(op: str, cu_seqlens: Tensor, x: Tensor) -> None:
    if (
        cu_seqlens.dim() != 1
        or cu_seqlens.shape[0] < 1
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.device != x.device
    ):
        raise ValueError(
            f"{op}: expected cu_seqlens [S + 1] of int32 or int64 on {x.device}, "
            f"got shape {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype} on {cu_seqlens.device}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != len(x) or bounds != sorted(bounds):
            raise ValueError(
                f"{op}: expected cu_seqlens to rise from 0 to N = {len(x)}, "
                f"got {bounds[:3]}..{bounds[-1]}"
            )


def checked_inputs(
    op: str, loss: Any, logp: Tensor, inputs: Mapping[str, Tensor | None], layout: Layout
) -> dict[str, Tensor]:
    """The loss's constants; old_logp and ref_logp are welcome for the statistics of any loss."""
    required = tuple(name for name in loss.required if name != "cu_seqlens")
    optional = tuple({*loss.optional, "old_logp", "ref_logp"} - {*required})
    sequences = None
    if getattr(loss, "per_sequence", False):
        if layout.cu_seqlens is None and logp.dim() != 2:
            raise ValueError(f"{op}: expected cu_seqlens or logp [B, T] for {loss}")
        offsets = layout.cu_seqlens
        sequences = layout.shape[0] if offsets is None else offsets.shape[0] - 1
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.device != logp.device:
            raise ValueError(f"{op}: expected {name} on {logp.device}, got {x.device}")
    found = constants(loss, logp, inputs, required, optional, sequences)
    return {name: x.to(logp.dtype) for name, x in found.items()}


def take_tokens(
    form: Form, logp: Tensor | None, entropy: Tensor | None, found: dict[str, Tensor]
) -> Tokens:
    """The policy's part of the kernels' input, flat and in the dtype of logp."""

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None or logp is None else x.to(logp.dtype).reshape(-1)

    return Tokens(
        logp=flat(logp),
        entropy=flat(entropy),
        **{
            name: flat(found.get(name))
            for name in ("advantages", "old_logp", "ref_logp", "weights")
        },
    )


def over_sequences(found: dict[str, Tensor], logp: Tensor, layout: Layout) -> dict[str, Tensor]:
    """gspo: the mean log-ratio and advantage of its sequence for every token, flat [N].

    The gradient of a sequence's loss by each token's logp is 1 / length of that by the mean
    log-ratio, and so is the token's share: per token, the loss is PPO's with this log-ratio.
    """
    lengths = layout.lengths(logp).clamp(min=1.0)
    log_ratio = layout.sums(logp.detach() - found["old_logp"]) / lengths
    advantages = found["advantages"]
    if advantages.shape == logp.shape:
        advantages = layout.sums(advantages) / lengths
    return {
        "log_ratio": layout.of_tokens(log_ratio),
        "advantages": layout.of_tokens(advantages),
    }


def policy_tokens(
    op: str,
    loss: Any,
    logp: Tensor,
    inputs: Mapping[str, Tensor | None],
    entropy: Tensor | None,
    layout: Layout,
    reduction: str | None,
) -> tuple[Form, Tokens, str, bool]:
    """Of a call's policy: its form, its tokens, the reduction (its own if None), and whether it has
    one loss per sequence."""
    form = form_of(loss)
    if form is None:
        raise ValueError(f"{op}: expected a policy loss object of fastalign.losses, got {loss!r}")
    if entropy is not None:
        check_like(op, "entropy", entropy, logp, "logp")
    elif form.entropy_coef:
        raise ValueError(f"{op}: missing entropy (entropy_coef is not 0 in {loss})")
    logp = wide(logp)
    found = checked_inputs(op, loss, logp, inputs, layout)
    reduction = getattr(loss, "reduction", "token_mean") if reduction is None else reduction
    if not getattr(loss, "per_sequence", False):
        return form, take_tokens(form, logp, entropy, found), reduction, False
    averages = over_sequences(found, logp, layout)
    tokens = take_tokens(form, logp, entropy, found | averages)
    return form, tokens._replace(log_ratio=averages["log_ratio"]), reduction, True


def with_critic(
    op: str,
    form: Form,
    x: Tokens,
    value_loss: ValueLoss,
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    vf_coef: float,
) -> tuple[Form, Tokens]:
    """The form and the tokens with a critic's part beside the policy's, or alone."""
    if type(value_loss) is not ValueLoss:
        raise ValueError(f"{op}: expected a ValueLoss of fastalign.losses, got {value_loss!r}")
    if value_loss.clip is not None and old_values is None:
        raise ValueError(f"{op}: missing old_values (clip is set in {value_loss})")
    check_like(op, "returns", returns, values, "values")
    if old_values is not None:
        check_like(op, "old_values", old_values, values, "values")
    dtype = wide(values).dtype if x.logp is None else x.logp.dtype
    clip = value_loss.clip
    return (
        form._replace(vf_coef=float(vf_coef), value_clip=0.0 if clip is None else clip),
        x._replace(
            values=values.to(dtype).reshape(-1),
            returns=returns.detach().to(dtype).reshape(-1),
            old_values=None if old_values is None else old_values.detach().to(dtype).reshape(-1),
        ),
    )


def shares(
    op: str, reduction: str, layout: Layout, like: Tensor, per_sequence: bool
) -> tuple[Tensor | None, Tensor | float | None]:
    """(each token's share as the kernels take it, the normalizer; None: the tokens that count).

    ``per_sequence``: the loss is one number for each sequence, spread over its tokens.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: expected reduction to be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    if per_sequence and reduction == "token_mean":
        raise ValueError(f"{op}: expected reduction sequence_mean or sum for a loss per sequence")
    if reduction == "sum" and not per_sequence:
        return None, 1.0
    if reduction == "token_mean":
        return None, None if layout.mask is not None else float(max(layout.shape.numel(), 1))
    if layout.cu_seqlens is None and len(layout.shape) != 2:
        raise ValueError(f"{op}: expected cu_seqlens or [B, T] for sequence_mean, got [N] alone")
    lengths = layout.lengths(like)
    inverse = torch.where(lengths > 0.0, 1.0 / lengths.clamp(min=1.0), 0.0)
    count = (lengths > 0.0).sum().clamp(min=1).to(like.dtype)
    normalizer = 1.0 if reduction == "sum" else count
    return inverse if layout.cu_seqlens is None else layout.of_tokens(inverse), normalizer


def check_normalizer(op: str, normalizer: float | Tensor | None) -> None:
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0 or normalizer.requires_grad:
            raise ValueError(
                f"{op}: expected normalizer as a number or a 0-d tensor without gradient, "
                f"got shape {tuple(normalizer.shape)}"
            )
    elif normalizer is not None and not 0.0 < normalizer < math.inf:
        raise ValueError(f"{op}: expected normalizer > 0 and finite, got {normalizer}")


def named_statistics(form: Form, x: Tokens, means: Tensor) -> dict[str, Tensor]:
    """Of the kernels' columns those that this loss and its inputs fill, 0-d each."""
    column = dict(zip(COLUMNS, means.unbind(), strict=True))
    kind = KINDS[form.kind]
    names = []
    if x.entropy is not None:
        names.append("entropy")
    if x.old_logp is not None or x.log_ratio is not None:
        names.append("ratio")
    if kind in ("clip", "cispo") or kind == "awr" and form.upper < math.inf:
        names.append("clip_fraction")
    weighted = kind == "awr" or kind == "mle" and x.weights is not None
    if weighted:
        names.append("weight")
    for other, given in (("ref", x.ref_logp), ("old", x.old_logp)):
        names += [f"{other}_{k}" for k in ("k1", "k2", "k3") if given is not None]
    if form.value_clip:
        names.append("value_clip_fraction")
    named = {name: column[name] for name in names}
    if kind == "apa":
        named["residual"] = column["weight"]
    if weighted:
        squares = column["weight_squared"]
        size = column["count"] * column["weight"].square() / squares
        named["effective_sample_size"] = torch.where(squares > 0.0, size, 0.0)
    return named
