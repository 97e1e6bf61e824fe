r"""KL(pi || pi_ref) of each token, exact, from the hidden states of both models, without a full
logits tensor of either.

    x_i = W h_i + b            the policy's logits      [N, H] with [V, H]
    y_i = W' h'_i + b'         the reference's          [N, H'] with [V, H'], of any width H'
    KL_i = sum_v p_iv (log p_iv - log r_iv)             soft-cap, temperature and formula: token_kl

The rows are worked off in slabs (fastalign/ops/slab.py) with a workspace for each model's logits;
within a slab the formulas are those of fastalign/ops/token_kl.py. In the backward pass, for dX of
token_kl,

    dH = dX W,    dW = dX^T H,    db = sum_i dX_i;     the reference gets no gradient.

The upstream gradient is not known in the forward pass, so both models' logits are either kept (when
they fit in ``workspace`` beside a slab of the policy's gradient: 4 products) or computed again (6
products, two of them the reference's).

Tests: tests/test_linear_kl.py. Benchmark: benchmarks/bench_linear_kl.py. The row kernels are
token_kl's (csrc/token_kl.cpp, kernels/token_kl.py).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.plan import plan
from fastalign.ops.slab import (
    IGNORE_NOTHING,
    HeadGradients,
    Rows,
    check_head,
    check_softcap,
    follow_autocast,
    fresh,
    keep_if_room,
    logits_workspace,
    reserve,
    rows_ahead,
    slab_logits,
)
from fastalign.ops.token_kl import (
    check_mask,
    check_same_precision,
    kl_dlogits_out,
    kl_stats,
    kl_stats_reference,
)
from fastalign.ops.token_logprobs import accumulation_dtype, temperature_tensor


def linear_kl_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    temperature: Tensor,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """The formula with both whole logits tensors, differentiable by autograd: kl [N]."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    ref_logits = torch.nn.functional.linear(ref_hidden, ref_weight, ref_bias)
    return kl_stats_reference(logits, ref_logits, targets, temperature, softcap, ignore_index)[4]


@torch.library.custom_op("fastalign::linear_kl", mutates_args=())
def linear_kl_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    index: Tensor | None,
    slab: int,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> kl [N], the statistics of kl_stats [N, 8], and the logits of policy and reference of the
    rows that count, [keep, V]. ``index`` and ``keep`` as in linear_logprobs."""
    rows = Rows(targets, ignore_index, index)
    count, vocab = rows.count, weight.shape[0]
    logits = fresh((keep, vocab), hidden.dtype, hidden.device)
    ref_logits = fresh((keep, vocab), ref_hidden.dtype, ref_hidden.device)
    stats = torch.empty(count, 8, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)

    def take(height: int) -> tuple[int, Tensor, Tensor]:
        held = 0 if keep else min(height, count)
        work = stack.enter_context(logits_workspace(held, vocab, hidden))
        return height, work, stack.enter_context(logits_workspace(held, vocab, ref_hidden))

    with ExitStack() as stack:
        slab, work, ref_work = reserve(stack, max(1, count) if keep else slab, take)
        for start in range(0, count, slab):
            stop = min(start + slab, count)
            x = logits[start:stop] if keep else work[: stop - start]
            y = ref_logits[start:stop] if keep else ref_work[: stop - start]
            slab_logits(rows.take(hidden, start, stop), weight, bias, x)
            slab_logits(rows.take(ref_hidden, start, stop), ref_weight, ref_bias, y)
            columns = kl_stats(
                x,
                y,
                rows.take(targets, start, stop),
                rows.take_temperature(temperature, start, stop),
                softcap,
                ignore_index,
            )
            torch.stack(columns, dim=1, out=stats[start:stop])
    logits[count:] = 0.0
    ref_logits[count:] = 0.0
    stats = rows.scatter(stats)
    return stats[:, 4].clone(), stats, logits, ref_logits


@linear_kl_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    index: Tensor | None,
    slab: int,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, vocab = hidden.shape[0], weight.shape[0]
    kl = torch.empty(n, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    return (
        kl,
        kl.new_empty(n, 8),
        hidden.new_empty(keep, vocab),
        ref_hidden.new_empty(keep, vocab),
    )


@torch.library.custom_op("fastalign::linear_kl_backward", mutates_args=())
def linear_kl_backward(
    grad_kl: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    index: Tensor | None,
    slab: int,
    stats: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dhidden, dweight, dbias; an empty tensor for each that ``need`` leaves out."""
    rows = Rows(targets, ignore_index, index)
    count, vocab, keep = rows.count, weight.shape[0], logits.shape[0] > 0

    def take(height: int) -> tuple[int, HeadGradients, Tensor, Tensor]:
        slabs, wanted = -(-count // height), (need[0], need[1], need[2])
        grads = HeadGradients(hidden, weight, bias, rows, slabs, wanted)
        held = min(height, count)
        work = stack.enter_context(logits_workspace(held, vocab, hidden))
        ref_rows = 0 if keep else held
        return (
            height,
            grads,
            work,
            stack.enter_context(logits_workspace(ref_rows, vocab, ref_hidden)),
        )

    with ExitStack() as stack:
        slab, grads, work, ref_work = reserve(stack, slab, take)
        for start in range(0, count, slab):
            stop = min(start + slab, count)
            h = rows.take(hidden, start, stop)
            dx = work[: stop - start]
            y = ref_logits[start:stop] if keep else ref_work[: stop - start]
            if not keep:
                slab_logits(h, weight, bias, dx)
                slab_logits(rows.take(ref_hidden, start, stop), ref_weight, ref_bias, y)
            k = rows.take(grad_kl, start, stop)
            logp, entropy, row_max, log_sum, kl, _, *ref = rows.take(stats, start, stop).unbind(1)
            kl_dlogits_out(
                dx,
                torch.zeros_like(k),
                None,
                k,
                logits[start:stop] if keep else dx,
                y,
                rows.take(targets, start, stop),
                rows.take_temperature(temperature, start, stop),
                softcap,
                ignore_index,
                logp,
                entropy,
                row_max,
                log_sum,
                kl,
                *ref,
            )
            grads.add(dx, h, start, stop)
    dhidden, dweight, dbias = (hidden.new_empty(0) if x is None else x for x in grads.result())
    return dhidden, dweight, dbias


@linear_kl_backward.register_fake
def _(
    grad_kl: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    index: Tensor | None,
    slab: int,
    stats: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dhidden, dweight, dbias = (
        hidden.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, need, strict=True)
    )
    return dhidden, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softcap, ctx.ignore_index, index, ctx.slab, _ = inputs
    ctx.save_for_backward(*tensors, index, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_kl: Tensor | None, *_: Any) -> Any:
    *tensors, index, stats, logits, ref_logits = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:3])
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad_kl is not None:
        settings = (ctx.softcap, ctx.ignore_index, index, ctx.slab)
        every = linear_kl_backward(grad_kl, *tensors, *settings, stats, logits, ref_logits, need)
        grads = tuple(g if wanted else None for g, wanted in zip(every, need, strict=True))
    return *grads, *[None] * 10


torch.library.register_autograd("fastalign::linear_kl", _backward, setup_context=_setup_context)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    workspace: int | None = None,
) -> Tensor:
    """KL of softmax(softcap(hidden @ weight.T + bias) / temperature) from the reference's, exact
    and in bounded memory.

    Differentiable in hidden, weight and bias. A weight that does not require grad costs no product
    for its gradient; without any gradient there are two products and nothing is kept. The weight's
    gradient is summed over slabs in float32 whatever the dtype.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64.
        weight: [V, H], same dtype and device.
        ref_hidden: [N, H'], the reference model's hidden states of the same tokens, on the same
            device; its dtype may be another one (float64 only beside float64).
        ref_weight: [V, H'], like ref_hidden. The vocabulary must be the policy's. Neither gets a
            gradient.
        bias: [V], like hidden.
        ref_bias: [V], like ref_hidden.
        temperature: positive float, or a tensor [N] with one temperature per token, for both.
        softcap: c of c * tanh(z / c), applied before the temperature, for both; None for none.
        mask: [N] bool; rows with False are dropped before the first product: KL 0, gradient 0.
            Counting them makes the host wait once for a CUDA device; ``None`` drops nothing and
            never waits.
        workspace: bytes of both models' logits, and of gradients beside kept ones, that may be held
            at once; see ``plan``. Where a GPU has less left, no logits are kept and slabs are
            smaller.

    Returns:
        kl [N] in nats, float32 (float64 for float64 input). +inf where the reference excludes a
            token that the policy does not; such a row has gradient 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; temperature or softcap <= 0; a
            workspace smaller than one row of both models' logits.
    """
    op = "linear_kl"
    hidden, weight, bias = follow_autocast(hidden, weight, bias)
    ref_hidden, ref_weight, ref_bias = follow_autocast(ref_hidden, ref_weight, ref_bias)
    check_head(op, hidden, weight, bias)
    check_head(f"{op}: reference", ref_hidden, ref_weight, ref_bias)
    n, vocab = hidden.shape[0], weight.shape[0]
    if ref_hidden.shape[0] != n or ref_weight.shape[0] != vocab:
        raise ValueError(
            f"{op}: expected ref_hidden [{n}, H'] and ref_weight [{vocab}, H'], "
            f"got {tuple(ref_hidden.shape)} and {tuple(ref_weight.shape)}"
        )
    check_same_precision(op, "ref_hidden", ref_hidden, hidden)
    check_mask(op, mask, hidden.shape[:1], hidden.device)
    scale = temperature_tensor(op, temperature, hidden, hidden.shape[:1])
    cap = check_softcap(op, softcap)
    # Column 0 stands for the target, whose log-prob is not asked for.
    targets = torch.zeros(n, dtype=torch.int64, device=hidden.device)
    if mask is not None:
        targets = targets.masked_fill(~mask, -100)
    count, index, ignored = rows_ahead(targets, IGNORE_NOTHING if mask is None else -100)
    grad = torch.is_grad_enabled()
    chosen = plan(
        count,
        hidden.shape[1],
        vocab,
        op=op,
        dtype=hidden.dtype,
        device=hidden.device,
        hidden_grad=grad and hidden.requires_grad,
        weight_grad=grad and weight.requires_grad,
        bias_grad=grad and bias is not None and bias.requires_grad,
        reference_width=ref_hidden.shape[1],
        reference_dtype=ref_hidden.dtype,
        workspace=workspace,
    )
    models = (
        hidden,
        weight,
        bias,
        ref_hidden.detach(),
        ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
    )
    rest = (targets, scale, cap, ignored, index, chosen.slab)
    kl, *_ = keep_if_room(chosen.kept, lambda keep: linear_kl_op(*models, *rest, keep))
    return kl
