"""From what callers of ``policy_loss`` hold to the kernels' flat tokens, and back to one number.

Checks at the door, tokens and sequences, padded [B, T] or packed [N], each token's share in the
mean, gspo's mean over a sequence, and the names of the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.losses.awr import effective_sample_size
from fastalign.losses.grpo import check_reading, sequence_of_token
from fastalign.losses.inputs import constants, sequence_offsets, wide
from fastalign.losses.ratio import exact_kl_coef
from fastalign.losses.value import ValueLoss
from fastalign.ops.direct import Statistics, direct
from fastalign.ops.policy_terms import COLUMNS, FUSED, KINDS, Form, Tokens, form_of, kept

REDUCTIONS = ("token_mean", "sequence_mean", "sum")
TAKEN = ("advantages", "old_logp", "ref_logp", "weights", "log_ratio")
# The log of weights whose squares, a million of them, float32 still holds.
LARGEST_SQUARED = 36.0


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
        mask = mask if mask.dtype == torch.bool else mask != 0
    if cu_seqlens is not None:
        cu_seqlens = sequence_offsets(op, cu_seqlens, x)
    return Layout(x.shape, mask, cu_seqlens)


def check_like(op: str, name: str, x: Tensor, like: Tensor, of: str) -> None:
    """ValueError unless ``x`` has the shape and the device of ``like``."""
    if x.shape != like.shape or x.device != like.device:
        raise ValueError(
            f"{op}: expected {name} like {of}, {tuple(like.shape)} on {like.device}, "
            f"got {tuple(x.shape)} on {x.device}"
        )


class Traits(NamedTuple):
    """What a call asks a loss object, cached because asking takes longer than some kernels."""

    form: Form
    required: tuple[str, ...]  # without cu_seqlens
    optional: tuple[str, ...]  # old_logp and ref_logp are welcome for any loss's statistics
    reduction: str
    per_sequence: bool
    kl_coef: float  # of an exact KL


def traits_of(op: str, loss: Any) -> Traits:
    if type(loss) not in FUSED:
        raise ValueError(f"{op}: expected a policy loss object of fastalign.losses, got {loss!r}")
    return kept(_traits)(loss)


def _traits(loss: Any) -> Traits:
    form = form_of(loss)
    assert form is not None
    required = tuple(name for name in loss.required if name != "cu_seqlens")
    return Traits(
        form,
        required,
        tuple(sorted({*loss.optional, "old_logp", "ref_logp"} - {*required})),
        getattr(loss, "reduction", "token_mean"),
        getattr(loss, "per_sequence", False),
        exact_kl_coef(loss),
    )


def checked_inputs(
    op: str,
    loss: Any,
    traits: Traits,
    logp: Tensor,
    inputs: Mapping[str, Tensor | None],
    layout: Layout,
) -> dict[str, Tensor]:
    """The loss's constants and its kl, in the dtype of logp."""
    sequences = None
    if traits.per_sequence:
        if layout.cu_seqlens is None and logp.dim() != 2:
            raise ValueError(f"{op}: expected cu_seqlens or logp [B, T] for {loss}")
        offsets = layout.cu_seqlens
        sequences = layout.shape[0] if offsets is None else offsets.shape[0] - 1
    found = constants(loss, logp, inputs, traits.required, traits.optional, sequences)
    device = logp.device
    for name, x in found.items():
        if x.device != device:
            raise ValueError(f"{op}: expected {name} on {device}, got {x.device}")
    if traits.per_sequence and layout.cu_seqlens is not None:
        check_reading(op, found["advantages"], logp, layout.cu_seqlens)
    return found


def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[N] in this dtype."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.dim() == 1 else x.reshape(-1)


def take_tokens(
    logp: Tensor, entropy: Tensor | None, found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The policy's part of the kernels' input, flat and in the dtype of logp, by name."""
    dtype = logp.dtype
    tokens = {name: flat(x, dtype) for name, x in found.items() if name in TAKEN}
    tokens["logp"] = flat(logp, dtype)
    if entropy is not None:
        tokens["entropy"] = flat(entropy, dtype)
    return tokens


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


class Policy(NamedTuple):
    """A call's policy, ready to be reduced."""

    form: Form
    tokens: dict[str, Tensor]  # of Tokens, by name
    reduction: str
    per_sequence: bool = False
    kl: Tensor | None = None  # flat, with its gradient
    kl_coef: float = 0.0


def policy_tokens(
    op: str,
    loss: Any,
    logp: Tensor,
    inputs: Mapping[str, Tensor | None],
    entropy: Tensor | None,
    layout: Layout,
    reduction: str | None,
) -> Policy:
    """Of a call's policy: its form, its tokens, the reduction (its own if None)."""
    traits = traits_of(op, loss)
    form = traits.form
    if entropy is not None:
        check_like(op, "entropy", entropy, logp, "logp")
    elif form.entropy_coef:
        raise ValueError(f"{op}: missing entropy (entropy_coef is not 0 in {loss})")
    logp = wide(logp)
    found = checked_inputs(op, loss, traits, logp, inputs, layout)
    kl = flat(found["kl"], logp.dtype) if traits.kl_coef else None
    if traits.per_sequence:
        found |= over_sequences(found, logp, layout)
    tokens = take_tokens(logp, entropy, found)
    reduction = traits.reduction if reduction is None else reduction
    return Policy(form, tokens, reduction, traits.per_sequence, kl, traits.kl_coef)


def with_critic(
    op: str,
    policy: Policy,
    value_loss: ValueLoss,
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None,
    vf_coef: float,
) -> Policy:
    """The form and the tokens with a critic's part beside the policy's, or alone."""
    if type(value_loss) is not ValueLoss:
        raise ValueError(f"{op}: expected a ValueLoss of fastalign.losses, got {value_loss!r}")
    if value_loss.clip is not None and old_values is None:
        raise ValueError(f"{op}: missing old_values (clip is set in {value_loss})")
    check_like(op, "returns", returns, values, "values")
    if old_values is not None:
        check_like(op, "old_values", old_values, values, "values")
    logp = policy.tokens.get("logp")
    dtype = wide(values).dtype if logp is None else logp.dtype
    tokens = policy.tokens | {"values": flat(values, dtype)}
    tokens["returns"] = flat(returns.detach(), dtype)
    if old_values is not None:
        tokens["old_values"] = flat(old_values.detach(), dtype)
    clip = 0.0 if value_loss.clip is None else value_loss.clip
    form = Form(*policy.form[:-2], float(vf_coef), clip)
    return Policy(form, tokens, *policy[2:])


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
        # A look at one on a GPU would wait.
        known = normalizer.device.type == "cpu" and direct(normalizer)
        if known and not 0.0 < normalizer.item() < math.inf:
            raise ValueError(f"{op}: expected normalizer > 0 and finite, got {normalizer.item()}")
    elif normalizer is not None and not 0.0 < normalizer < math.inf:
        raise ValueError(f"{op}: expected normalizer > 0 and finite, got {normalizer}")


def named_statistics(
    form: Form, x: Tokens, means: Tensor, others: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Of the kernels' columns those that this loss and its inputs fill, 0-d; and ``others``."""
    given = (
        x.entropy is not None,
        x.old_logp is not None,
        x.ref_logp is not None,
        x.log_ratio is not None,
    )
    kind = KINDS[form.kind]
    weighted = kind == "awr" or kind == "mle" and x.weights is not None
    rows = kept(_filled)(kind, given, weighted, form.upper, form.value_clip > 0)
    if not torch.compiler.is_compiling():
        more: dict[str, Tensor | Callable[[], Tensor]] = {**others}
        if weighted:
            more["effective_sample_size"] = _effective_sample_size(form, x, means)
        return Statistics(means, rows, more)
    named = {name: means[at] for name, at in rows.items()} | {**others}
    if weighted:
        named["effective_sample_size"] = _effective_sample_size(form, x, means)()
    return named


def _filled(
    kind: str, given: tuple[bool, ...], weighted: bool, upper: float, banded: bool
) -> dict[str, int]:
    """Names and columns."""
    entropy, old, ref, of_sequences = given
    names = ["entropy"] if entropy else []
    if old or of_sequences:
        names.append("ratio")
    if kind in ("clip", "cispo") or kind == "awr" and upper < math.inf:
        names.append("clip_fraction")
    if weighted:
        names.append("weight")
    for other, there in (("ref", ref), ("old", old)):
        names += [f"{other}_{k}" for k in ("k1", "k2", "k3") if there]
    if banded:
        names.append("value_clip_fraction")
    residual = {"residual": COLUMNS.index("weight")} if kind == "apa" else {}
    return {name: COLUMNS.index(name) for name in names} | residual


def _effective_sample_size(form: Form, x: Tokens, means: Tensor) -> Callable[[], Tensor]:
    """How to compute it; what it keeps of the call is small."""
    if KINDS[form.kind] == "awr" and form.upper > LARGEST_SQUARED:
        assert x.advantages is not None
        logs = (form.scale * x.advantages).clamp(max=form.upper)
        logs = logs if x.mask is None else logs.masked_fill(~x.mask, -math.inf)
        size = effective_sample_size(logs, logs=True)
        return lambda: size

    def of_columns() -> Tensor:
        count, weight, squares = (means[at] for at in _ESS_COLUMNS)
        return torch.where(squares == 0.0, 0.0, count * weight.square() / squares)

    return of_columns


_ESS_COLUMNS = [COLUMNS.index(name) for name in ("count", "weight", "weight_squared")]
