r"""Preference losses from packed log-probs: the sums over sequences, every pair's loss, what people
log of it, and the gradient, in one pass over the tokens each way.

    v_p = loss(chosen, rejected) of pair p       formula: fastalign/losses/preference_terms.py
    dv_p/dlogp_t = slope_s                       the same for all tokens t of sequence s

        slope of the chosen one    = v'(h) (gap + extra) / n - nll_sum - nll_mean / |y|  (+ optimism)
        slope of the rejected one  = -v'(h) (gap + extra) / n                            (+ optimism)
        n = |y| with ``average``, else 1;  + optimism for the response of the reference

        v'(h)   sigmoid: wrong sigmoid(h) - right sigmoid(-h)   hinge: -1 where h < 1, else 0
                square: 2 right (h - 1/2)
        KTO     dv/dr = -w sigmoid(x) sigmoid(-x) for a desirable response, + for another; w its weight

So the forward pass reads each log-prob once and writes nothing per token; the backward pass writes
the gradient and reads no log-prob.

C++: csrc/preference_loss.cpp. Triton: kernels/preference_loss.py. Tests:
tests/test_preference_loss.py. Benchmark: benchmarks/bench_preference_loss.py.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastalign.backend import CPP_BUILT, choose, once_differentiable, plain, refuse_forward_mode
from fastalign.losses.grpo import sequence_of_token
from fastalign.losses.inputs import wide
from fastalign.losses.preference import PreferenceLoss
from fastalign.losses.preference_terms import (
    KTO_STATISTICS,
    PAIR_STATISTICS,
    PREFERENCE_KINDS,
    PreferenceForm,
    Responses,
    preference_statistics,
    preference_values,
    responses,
)
from fastalign.ops.direct import CODES, Statistics, address, dense, direct
from fastalign.ops.policy_reduce import check_layout, check_like
from fastalign.ops.token_logprobs import FLOAT_DTYPES

if CPP_BUILT:
    from fastalign import _C

OP = "preference_loss"


def preference_loss_reference(
    form: PreferenceForm,
    logp: Tensor,
    ref_logp: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    flags: Tensor | None,
    z0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula above in plain PyTorch.

    Returns:
        losses [G], slopes [S], statistics [n, G] in the order of PAIR_STATISTICS or KTO_STATISTICS;
        G pairs (KTO: sequences).
    """
    ref_logp = None if ref_logp is None else wide(ref_logp)
    found = responses(form, wide(logp), ref_logp, cu_seqlens, mask)
    losses = preference_values(form, found, flags, z0)
    statistics = torch.stack(list(preference_statistics(form, found, flags).values()))
    return losses, slopes_reference(form, found, flags, z0), statistics


def slopes_reference(
    form: PreferenceForm, found: Responses, flags: Tensor | None, z0: Tensor | None
) -> Tensor:
    """dv/dlogp of the tokens of every sequence [S], by the closed forms above."""
    lengths = found.lengths.clamp(min=1.0)
    factor = torch.full_like(lengths, form.gap + form.extra)
    if form.average:
        factor = factor / lengths
    kind = PREFERENCE_KINDS[form.kind]
    if kind == "kto":
        assert flags is not None and z0 is not None
        x = found.rewards - form.gap * z0
        steep = factor * torch.sigmoid(x) * torch.sigmoid(-x)
        return torch.where(flags, -form.right * steep, form.wrong * steep)
    h = found.rewards[0::2] - found.rewards[1::2] - form.margin
    if kind == "sigmoid":
        slope = form.wrong * torch.sigmoid(h) - form.right * torch.sigmoid(-h)
    elif kind == "hinge":
        slope = torch.where(h >= 1.0, 0.0, -torch.ones_like(h))
    else:
        slope = 2.0 * form.right * (h - 0.5)
    chosen, rejected = slope * factor[0::2], -slope * factor[1::2]
    chosen = chosen - form.nll_sum - form.nll_mean / lengths[0::2]
    if flags is not None:
        chosen = torch.where(flags, chosen + form.optimism, chosen)
        rejected = torch.where(flags, rejected, rejected + form.optimism)
    return torch.stack([chosen, rejected], 1).flatten()


def _computed(
    form: PreferenceForm,
    logp: Tensor,
    ref_logp: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    flags: Tensor | None,
    z0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``preference_loss_reference``, by the backend in force."""
    args = (logp, ref_logp, cu_seqlens, mask, flags, z0)
    which = choose(OP, logp)
    if which == "triton":
        from fastalign.kernels.preference_loss import preference_loss_fwd

        return preference_loss_fwd(form, *args)
    if which == "cpp":
        if ref_logp is not None and ref_logp.dtype != logp.dtype:
            args = (logp.float(), ref_logp.float(), *args[2:])
        if direct(*args):
            return _by_address(form, *args)
        return torch.ops.fastalign_cpp.preference_loss(*form, *args)
    return preference_loss_reference(form, *args)


def _by_address(
    form: PreferenceForm,
    logp: Tensor,
    ref_logp: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    flags: Tensor | None,
    z0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``preference_loss_reference``, by C++."""
    logp, cu_seqlens = dense(logp), dense(cu_seqlens)
    rest = [None if x is None else dense(x) for x in (ref_logp, mask, flags, z0)]
    sequences = cu_seqlens.shape[0] - 1
    values = sequences // 2 if form.paired else sequences
    names = PAIR_STATISTICS if form.paired else KTO_STATISTICS
    losses = logp.new_empty(values, dtype=torch.float32)
    slopes = losses.new_empty(sequences)
    statistics = losses.new_empty(len(names), values)
    ref_at, *rest_at = map(address, rest)
    _C.preference_loss(
        *form, CODES[logp.dtype], logp.data_ptr(), ref_at, cu_seqlens.data_ptr(), *rest_at,
        sequences, logp.shape[0], losses.data_ptr(), slopes.data_ptr(), statistics.data_ptr(),
    )  # fmt: skip
    return losses, slopes, statistics


@torch.library.custom_op("fastalign::preference_loss", mutates_args=())
def _preference_loss(
    kind: int,
    average: bool,
    coefficients: list[float],
    logp: Tensor,
    ref_logp: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    flags: Tensor | None,
    z0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [G], slopes [S], statistics [n, G])."""
    form = PreferenceForm(kind, average, *coefficients)
    return _computed(form, logp, ref_logp, cu_seqlens, mask, flags, z0)


@_preference_loss.register_fake
def _(
    kind: int,
    average: bool,
    coefficients: list[float],
    logp: Tensor,
    ref_logp: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    flags: Tensor | None,
    z0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    paired = PreferenceForm(kind).paired
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    sequences = cu_seqlens.shape[0] - 1
    values = sequences // 2 if paired else sequences
    names = PAIR_STATISTICS if paired else KTO_STATISTICS
    return (
        logp.new_empty(values, dtype=dtype),
        logp.new_empty(sequences, dtype=dtype),
        logp.new_empty(len(names), values, dtype=dtype),
    )


def _computed_backward(
    grad: Tensor, slopes: Tensor, cu_seqlens: Tensor, mask: Tensor | None, n_tokens: int
) -> Tensor:
    """dlogp [N] = grad [G] of its pair times the slope [S] of its sequence, 0 where masked."""
    which = choose(OP, slopes)
    args = (grad, slopes, cu_seqlens, mask, n_tokens)
    if which == "triton":
        from fastalign.kernels.preference_loss import preference_loss_bwd

        return preference_loss_bwd(*args)
    if which == "cpp" and direct(grad, slopes, cu_seqlens, mask):
        grad, cu_seqlens = dense(grad), dense(cu_seqlens)
        mask = None if mask is None else dense(mask)
        dlogp = slopes.new_empty(n_tokens)
        _C.preference_loss_backward(
            grad.data_ptr(), grad.shape[0], slopes.data_ptr(), cu_seqlens.data_ptr(),
            slopes.shape[0], address(mask), n_tokens, dlogp.data_ptr(),
        )  # fmt: skip
        return dlogp
    if which == "cpp":
        return torch.ops.fastalign_cpp.preference_loss_backward(*args)
    if n_tokens == 0:
        return slopes.new_empty(0)
    per = len(slopes) // len(grad)
    of_token = sequence_of_token(cu_seqlens, n_tokens)
    dlogp = (slopes * grad.repeat_interleave(per))[of_token]
    return dlogp if mask is None else torch.where(mask, dlogp, 0.0)


@torch.library.custom_op("fastalign::preference_loss_backward", mutates_args=())
def _preference_loss_backward(
    grad: Tensor, slopes: Tensor, cu_seqlens: Tensor, mask: Tensor | None, n_tokens: int
) -> Tensor:
    return _computed_backward(grad, slopes, cu_seqlens, mask, n_tokens)


@_preference_loss_backward.register_fake
def _(
    grad: Tensor, slopes: Tensor, cu_seqlens: Tensor, mask: Tensor | None, n_tokens: int
) -> Tensor:
    return slopes.new_empty(n_tokens)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, slopes, statistics = output
    _, _, _, logp, _, cu_seqlens, mask, _, _ = inputs
    ctx.save_for_backward(slopes, cu_seqlens, mask)
    ctx.n_tokens = logp.shape[0]
    ctx.mark_non_differentiable(slopes, statistics)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
    """Autograd brings the gradient to the dtype of logp."""
    if grad is None or not ctx.needs_input_grad[3]:
        return (None,) * 9
    slopes, cu_seqlens, mask = ctx.saved_tensors
    dlogp = _preference_loss_backward(grad, slopes, cu_seqlens, mask, ctx.n_tokens)
    return None, None, None, dlogp, *[None] * 5


torch.library.register_autograd(
    "fastalign::preference_loss", once_differentiable(_backward), setup_context=_setup_context
)


class _PreferenceLoss(torch.autograd.Function):
    """The op without the dispatcher, which takes longer than the loss of 30,000 tokens."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _computed(*args)
        ctx.save_for_backward(output[1], args[3], args[4])
        ctx.n_tokens = args[1].shape[0]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # The slopes are constants to autograd: a second derivative would be wrong in silence.
        return (_dlogp_once if torch.is_grad_enabled() else _dlogp)(ctx, *grads)


def _dlogp(ctx: Any, *grads: Any) -> Any:
    if grads[0] is None:
        return (None,) * 7
    slopes, cu_seqlens, mask = ctx.saved_tensors
    dlogp = _computed_backward(grads[0], slopes, cu_seqlens, mask, ctx.n_tokens)
    return None, dlogp, *[None] * 5


_dlogp_once = once_differentiable(_dlogp)


def preference_loss(
    loss: PreferenceLoss,
    logp: Tensor,
    cu_seqlens: Tensor,
    *,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    chosen_is_ref: Tensor | None = None,
    desirable: Tensor | None = None,
    z0: float | Tensor | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """A preference loss of ``fastalign.losses`` on packed log-probs you have, one value per pair.

    Args:
        loss: DPO, RPO, XPO, SimPO or KTO.
        logp: [N] log-probs of the responses' tokens in nats, packed; float32, bfloat16, float16 or
            float64. The arithmetic is float32 (float64 for float64).
        cu_seqlens: [S + 1], int32 or int64, the bounds of the sequences, from 0 to N: chosen,
            rejected, chosen, rejected, ... (S = 2P); for KTO one response each. Empty ones are
            fine; a pair without any token costs 0. Its content is checked on CPU; on CUDA, pairs
            whose bounds make no sense have a NaN loss.
        ref_logp: [N], the reference model's, a constant; not for SimPO.
        mask: [N], bool or integer, True (nonzero) where the token counts. What stands in the other
            cells, NaN included, has no effect, and |y| does not count them; gradients are 0 there.
        chosen_is_ref: [P] bool, for XPO: whether the chosen response was sampled from the
            reference (else the rejected one was).
        desirable: [S] bool, for KTO.
        z0: number or 0-d tensor, for KTO: see ``KTO.baseline``.

    Returns:
        (losses, statistics): [P] (KTO: [S]) float32 (float64 for float64), differentiable in logp,
        to be averaged by the caller; and detached tensors of the same shape: "rewards/chosen",
        "rewards/rejected", "rewards/margins", "rewards/accuracies" (1 where the chosen reward is
        the larger one), "logps/chosen", "logps/rejected" (sums over tokens; means for a loss that
        averages). KTO: without margins and accuracies, and NaN in the place of the other kind.
        NaN where there is no token, so that ``nanmean`` is what to log.

    Raises:
        ValueError: a loss that is no preference loss of this package, missing or unknown inputs,
            shapes, dtypes or devices that do not fit.
    """
    # A subclass with a call of its own has its own maths.
    known = isinstance(loss, PreferenceLoss) and type(loss).__call__ is PreferenceLoss.__call__
    if not known:
        raise ValueError(f"{OP}: expected a preference loss of fastalign.losses, got {loss!r}")
    refuse_forward_mode(OP, logp)
    layout = check_layout(OP, logp, "logp", mask, cu_seqlens)
    for name, x in (("logp", logp), ("ref_logp", ref_logp)):
        if x is not None and x.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{OP}: expected {name} of a floating dtype, got {x.dtype}")
    offsets = layout.cu_seqlens
    given = dict(ref_logp=ref_logp, chosen_is_ref=chosen_is_ref, desirable=desirable, z0=z0)
    wanted = [name for name in given if name in loss.required]
    missing = [name for name in wanted if given[name] is None]
    unknown = [name for name, x in given.items() if x is not None and name not in wanted]
    if missing or unknown or offsets is None:
        raise ValueError(
            f"{OP}: expected {', '.join(wanted) or 'no inputs'} for {loss}, "
            f"missing: {', '.join(missing) or 'none'}, not taken: {', '.join(unknown) or 'none'}"
        )
    if ref_logp is not None:
        check_like(OP, "ref_logp", ref_logp, logp, "logp")
        ref_logp = ref_logp.detach()
    flags = chosen_is_ref if desirable is None else desirable
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    if z0 is not None:
        z0 = torch.as_tensor(z0, dtype=dtype, device=logp.device).detach()
    loss.check_extras(OP, len(offsets) - 1, flags, z0)
    if flags is not None and flags.device != logp.device:
        raise ValueError(f"{OP}: expected {loss.flags_name} on {logp.device}, got {flags.device}")
    flags = None if flags is None else flags.to(torch.bool)
    if dtype == torch.float64 and ref_logp is not None:
        ref_logp = ref_logp.double()
    form = loss.form
    args = (logp, ref_logp, offsets, layout.mask, flags, z0)
    names = PAIR_STATISTICS if form.paired else KTO_STATISTICS
    if plain(logp):
        differentiable = torch.is_grad_enabled() and logp.requires_grad
        call = _PreferenceLoss.apply if differentiable else _computed
        losses, _, statistics = call(form, *args)
        return losses, Statistics(statistics, {name: row for row, name in enumerate(names)})
    coefficients = list(form[2:])
    losses, _, statistics = _preference_loss(form.kind, form.average, coefficients, *args)
    return losses, dict(zip(names, statistics.unbind(), strict=True))
