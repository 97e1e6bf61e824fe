r"""Losses on log-probs, value losses, their gradients and statistics, in one pass over the tokens.

    loss = (1 / normalizer) sum_i c_i (v_i + vf_coef u_i)

v_i is the loss of token i by a loss object of ``fastalign.losses``, u_i its critic's loss, and c_i
the token's share by the ``reduction``:

    token_mean       c_i = 1                          normalizer: the number of tokens
    sequence_mean    c_i = 1 / length of its sequence  normalizer: the number of sequences
    sum              c_i = 1                          normalizer: 1

Lengths and numbers count the tokens that the mask keeps, and the sequences that have any. The
slopes dv/dlogp, dv/dH and du/dV are known in closed form as soon as v is, so the forward pass
writes them and the backward pass only multiplies them by the upstream gradient.
fastalign/ops/policy_terms.py has the table of the losses and slopes, per token;
fastalign/ops/policy_loss_terms.py gives them without the sum.

C++: csrc/policy_loss.cpp. Triton: kernels/policy_loss.py. Tests: tests/test_policy_loss.py.
Benchmark: benchmarks/bench_policy_loss.py. The public functions' checks, and what they make of
sequences: fastalign/ops/policy_reduce.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastalign.backend import CPP_BUILT, choose, once_differentiable, plain, refuse_forward_mode
from fastalign.losses.value import ValueLoss
from fastalign.ops.direct import address, dense, direct
from fastalign.ops.policy_reduce import (
    Layout,
    Policy,
    check_layout,
    check_like,
    check_normalizer,
    flat,
    named_statistics,
    policy_tokens,
    shares,
    with_critic,
)
from fastalign.ops.policy_terms import COLUMNS, Form, Tokens, terms_reference

if CPP_BUILT:
    from fastalign import _C

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def policy_loss_reference(form: Form, x: Tokens) -> Results:
    """The sums above in plain PyTorch.

    Returns:
        total: 0-d, the sum before it is divided by the normalizer.
        statistics: [15], of policy_terms.COLUMNS; sums of the first three, means of the others.
        dlogp, dentropy, dvalues: d total by each token's, [N]; [0] where there is none.
    """
    like = x.leading
    kept = torch.ones_like(like, dtype=torch.bool) if x.mask is None else x.mask
    clean = [
        t.masked_fill(~kept, 0.0) if t is not None and name not in ("mask", "scale") else None
        for name, t in zip(Tokens._fields, x, strict=True)
    ]
    terms = terms_reference(form, Tokens(*clean))
    share = kept.to(like.dtype)
    if x.scale is not None and like.numel() > 0:
        share = torch.where(kept, x.scale.repeat_interleave(like.numel() // x.scale.numel()), 0.0)
    count = kept.sum().to(like.dtype)
    policy, value = (share * terms.policy).sum(), (share * terms.value).sum()
    means = [
        torch.where(kept, terms.columns[name], 0.0).sum() / count.clamp(min=1.0)
        if name in terms.columns
        else torch.zeros_like(count)
        for name in COLUMNS[3:]
    ]
    none = like.new_empty(0)
    return (
        policy + form.vf_coef * value,
        torch.stack([policy, value, count, *means]),
        share * terms.slope if x.logp is not None else none,
        share * -form.entropy_coef if form.entropy_coef else none.clone(),
        share * terms.value_slope if x.values is not None else none.clone(),
    )


def _computed(form: Form, x: Tokens, which: str) -> Results:
    """``policy_loss_reference``, by this backend."""
    if which == "triton":
        from fastalign.kernels.policy_loss import policy_loss_fwd

        return policy_loss_fwd(form, x)
    if which == "cpp":
        return torch.ops.fastalign_cpp.policy_loss(*form, *x, 1.0)
    return policy_loss_reference(form, x)


@torch.library.custom_op("fastalign::policy_loss", mutates_args=())
def _policy_loss(
    kind: int,
    kl: int,
    coefficients: list[float],
    logp: Tensor | None,
    entropy: Tensor | None,
    advantages: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    weights: Tensor | None,
    log_ratio: Tensor | None,
    values: Tensor | None,
    returns: Tensor | None,
    old_values: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = Tokens(
        logp, entropy, advantages, old_logp, ref_logp, weights, log_ratio, values, returns,
        old_values, mask, scale,
    )  # fmt: skip
    return _computed(Form(kind, kl, *coefficients), x, choose("policy_loss", x.leading))


@_policy_loss.register_fake
def _(
    kind: int,
    kl: int,
    coefficients: list[float],
    logp: Tensor | None,
    entropy: Tensor | None,
    advantages: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    weights: Tensor | None,
    log_ratio: Tensor | None,
    values: Tensor | None,
    returns: Tensor | None,
    old_values: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    form = Form(kind, kl, *coefficients)
    like = values if logp is None else logp
    assert like is not None
    n = like.numel()
    return (
        like.new_empty(()),
        like.new_empty(len(COLUMNS)),
        like.new_empty(0 if logp is None else n),
        like.new_empty(n if form.entropy_coef else 0),
        like.new_empty(0 if values is None else n),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _, statistics, dlogp, dentropy, dvalues = output
    ctx.n_tokens = Tokens(*inputs[3:]).leading.numel()
    ctx.save_for_backward(dlogp, dentropy, dvalues)
    ctx.mark_non_differentiable(statistics, dlogp, dentropy, dvalues)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> Any:
    wanted = [ctx.needs_input_grad[i] and grad_total is not None for i in (3, 4, 10)]
    logp, entropy, values = (
        slope * grad_total if want and slope.numel() == ctx.n_tokens else None
        for slope, want in zip(ctx.saved_tensors, wanted, strict=True)
    )
    return None, None, None, logp, entropy, *[None] * 5, values, *[None] * 4


torch.library.register_autograd(
    "fastalign::policy_loss", once_differentiable(_backward), setup_context=_setup_context
)


def _computed_on_cpu(
    form: Form, x: Tokens, divisor: float, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The loss and the statistics over ``divisor`` (0: the tokens that count), by C++; and those of
    dlogp, dentropy and dvalues that are wanted."""
    like = x.leading
    if not direct(like, *x):
        loss, statistics, *found = torch.ops.fastalign_cpp.policy_loss(*form, *x, divisor)
        pairs = zip(found, wanted, strict=True)
        return loss, statistics, [slope if want else None for slope, want in pairs]
    n = like.numel()
    read = [None if t is None else dense(t) for t in x]
    slopes = [like.new_empty(n) if want else None for want in wanted]
    loss, statistics = like.new_empty(()), like.new_empty(len(COLUMNS))
    _C.policy_loss(
        *form, *map(address, read), 0 if x.scale is None else x.scale.numel(), n, divisor,
        loss.data_ptr(), statistics.data_ptr(), *map(address, slopes),
    )  # fmt: skip
    return loss, statistics, slopes


class _PolicyLoss(torch.autograd.Function):
    """The op and its division by the normalizer, without the dispatcher: that takes 0.1 ms for so
    many arguments on a CPU, as long as the loss of 30,000 tokens. The statistics come in a list
    that is given: autograd has to wrap what is returned."""

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[Form, Tokens, float | Tensor | None, list[Tensor]],
        logp: Tensor | None,
        entropy: Tensor | None,
        values: Tensor | None,
    ) -> Tensor:
        form, x, normalizer, means = call
        which = choose("policy_loss", x.leading)
        ctx.on_cpu = which == "cpp"
        wanted = ctx.needs_input_grad[1:]
        if which == "cpp":
            divisor = 0.0 if normalizer is None else float(normalizer)
            loss, found, slopes = _computed_on_cpu(form, x, divisor, wanted)
            ctx.normalizer = 1.0
        else:
            total, found, *slopes = _computed(form, x, which)
            slopes = [slope if want else None for slope, want in zip(slopes, wanted, strict=True)]
            ctx.normalizer = _tokens_kept(found) if normalizer is None else normalizer
            found[:2] /= ctx.normalizer
            loss = total / ctx.normalizer
        means.append(found)
        ctx.save_for_backward(*slopes)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # The slopes are constants to autograd: a second derivative would be wrong in silence.
        return (_slopes_once if torch.is_grad_enabled() else _slopes)(ctx, grad)


def _slopes(ctx: Any, grad: Tensor) -> Any:
    slopes = ctx.saved_tensors
    # On a CPU looking at the factor is free, and multiplying by one is not.
    if not ctx.on_cpu or grad.item() != 1.0:
        factor = grad / ctx.normalizer
        slopes = [None if slope is None else slope * factor for slope in slopes]
    return None, *slopes


_slopes_once = once_differentiable(_slopes)


def _tokens_kept(means: Tensor) -> Tensor:
    return means[COLUMNS.index("count")].clamp(min=1.0)


def _reduced(
    op: str, policy: Policy, layout: Layout, normalizer: float | Tensor | None
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The loss and its statistics, with "policy_loss" and "value_loss" where both are there."""
    check_normalizer(op, normalizer)
    form, tokens = policy.form, policy.tokens
    like = tokens["logp" if "logp" in tokens else "values"]
    scale, own = shares(op, policy.reduction, layout, like, policy.per_sequence)
    moving = (tokens.get(name) for name in ("logp", "entropy", "values"))
    refuse_forward_mode(op, *moving, policy.kl)
    mask = None if layout.mask is None else flat(layout.mask, torch.bool)
    x = Tokens(**tokens, mask=mask, scale=scale)
    normalizer = own if normalizer is None else normalizer
    if plain(like):
        found: list[Tensor] = []
        entropy = x.entropy if form.entropy_coef else None
        loss = _PolicyLoss.apply((form, x, normalizer, found), x.logp, entropy, x.values)
        means = found[0]
    else:
        total, means, *_ = _policy_loss(form.kind, form.kl, list(form[2:]), *x)
        divisor = _tokens_kept(means) if normalizer is None else normalizer
        loss = total / divisor
        means = torch.cat([means[:2] / divisor, means[2:]])
    others: dict[str, Tensor] = {}
    if policy.kl is not None:
        kl = policy.kl if x.mask is None else torch.where(x.mask, policy.kl, 0.0)
        share = kl if scale is None else kl * scale.repeat_interleave(len(kl) // len(scale))
        count = _tokens_kept(means)
        penalty = policy.kl_coef * share.sum() / (count if normalizer is None else normalizer)
        loss = loss + penalty
        others["kl"] = kl.detach().sum() / count
    if x.values is not None and x.logp is not None:
        policy_part = means[0] if policy.kl is None else means[0] + penalty.detach()
        others |= {"policy_loss": policy_part, "value_loss": means[1]}
    return loss, named_statistics(form, x, means, others)


def policy_loss(
    loss: Any,
    logp: Tensor,
    inputs: Mapping[str, Tensor | None],
    *,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """A loss of ``fastalign.losses`` on log-probs you have, reduced to one number, with statistics.

    The formula and the reductions stand in this module's docstring. Gradients flow to ``logp`` and
    ``entropy``; they are formed in the same launch as the loss. With an exact KL (``kl_kind``
    "exact") the input ``kl`` has a gradient too; its term is added after the launch.

    Args:
        loss: MLE, APA, AWR, PPO or GRPO. (Any other callable: call it, or ``linear_loss``.)
        logp: [B, T] or packed [N], float32, bfloat16, float16 or float64; the arithmetic is float32
            (float64 for float64).
        inputs: the loss's inputs by name, each of the shape of ``logp`` (gspo's advantages: or [B],
            [S], see ``GRPO``); constants but for ``kl``. ``old_logp`` and ``ref_logp`` are welcome
            with any loss, for the statistics.
        entropy: of the shape of ``logp``, in nats.
        mask: of that shape, bool or integer, True (nonzero) where the token counts. What stands in
            the other cells, NaN included, has no effect; gradients are 0 there.
        cu_seqlens: [S + 1], int32 or int64, the bounds of the packed sequences, from 0 to N.
            Without it the rows of [B, T] are the sequences. Its content is checked on CPU only.
        reduction: "token_mean", "sequence_mean" or "sum"; None: the loss's own (``loss.reduction``,
            token_mean for a loss that has none).
        normalizer: number or 0-d tensor to divide by in place of the reduction's own: for instance
            the tokens of all micro-batches, or dr_grpo's responses times length limit.

    Returns:
        (loss, statistics): 0-d, differentiable; and 0-d means over the tokens that count, detached:
        "ratio" and "old_k1", "old_k2", "old_k3" with ``old_logp``, "ref_k1", "ref_k2", "ref_k3"
        with ``ref_logp`` (k1 = logp - other, k2 = k1^2 / 2, k3 = exp(-k1) - 1 + k1, log-ratios
        above 20 counting as 20 in ratio and k3), "entropy", "clip_fraction" (the share of tokens
        whose gradient a bound holds at 0; cispo and awr: whose weight a bound holds), "residual"
        (APA), "weight" and "effective_sample_size" = (sum w)^2 / sum w^2 (AWR, weighted MLE).

    Raises:
        ValueError: a loss that is no policy loss of this package, missing or unknown inputs,
            shapes, dtypes or devices that do not fit, an unknown reduction, normalizer <= 0.
    """
    op = "policy_loss"
    layout = check_layout(op, logp, "logp", mask, cu_seqlens)
    policy = policy_tokens(op, loss, logp, inputs, entropy, layout, reduction)
    return _reduced(op, policy, layout, normalizer)


def actor_critic_loss(
    loss: Any,
    logp: Tensor,
    inputs: Mapping[str, Tensor | None],
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    value_loss: ValueLoss | None = None,
    vf_coef: float = 1.0,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Policy, entropy and critic in one launch: ``policy_loss`` + vf_coef * ``value_loss``.

    Args:
        loss, logp, inputs, entropy, mask, cu_seqlens, reduction, normalizer: as in ``policy_loss``.
        values: of the shape of ``logp``, differentiable; float like it.
        returns, old_values: of that shape, constants; old_values where the critic's loss is
            clipped.
        value_loss: a ``fastalign.losses.ValueLoss``; None: plain.
        vf_coef: its weight; the critic's loss is reduced as the policy's.

    Returns:
        (loss, statistics) as in ``policy_loss``; beside its statistics "policy_loss", "value_loss"
        (both reduced, without vf_coef) and, with a clip, "value_clip_fraction".

    Raises:
        ValueError: as in ``policy_loss``; or values, returns, old_values that do not fit.
    """
    op = "actor_critic_loss"
    layout = check_layout(op, logp, "logp", mask, cu_seqlens)
    check_like(op, "values", values, logp, "logp")
    policy = policy_tokens(op, loss, logp, inputs, entropy, layout, reduction)
    critic = ValueLoss() if value_loss is None else value_loss
    policy = with_critic(op, policy, critic, values, returns, old_values, vf_coef)
    return _reduced(op, policy, layout, normalizer)


def value_loss(
    loss: ValueLoss,
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """A critic's loss, plain or clipped, reduced to one number; differentiable in ``values``.

    Args:
        loss: a ``fastalign.losses.ValueLoss``.
        values: [B, T] or packed [N], float32, bfloat16, float16 or float64.
        returns, old_values: of that shape, constants; old_values where the loss is clipped.
        mask, cu_seqlens, reduction, normalizer: as in ``policy_loss``.

    Returns:
        (loss, statistics): 0-d, and {"value_clip_fraction"} with a clip, {} without.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown reduction, a normalizer <=
            0.
    """
    op = "value_loss"
    layout = check_layout(op, values, "values", mask, cu_seqlens)
    none = Policy(Form(), {}, reduction)
    policy = with_critic(op, none, loss, values, returns, old_values, 1.0)
    return _reduced(op, policy, layout, normalizer)
