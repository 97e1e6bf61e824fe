r"""Log-probability and entropy of each token from hidden states and the LM head, without a full
logits tensor.

    z_i = softcap(W h_i + b) / T_i
    logp_i = z_i[y_i] - logsumexp(z_i)
    H_i = -sum_v p_iv log p_iv

The rows are worked off in slabs (fastalign/ops/slab.py); within a slab the formulas are those of
fastalign/ops/token_logprobs.py. In the backward pass, for dZ of token_logprobs,

    dH = dZ W,    dW = dZ^T H,    db = sum_i dZ_i.

The upstream gradient is not known in the forward pass, so the logits are either kept (when they fit
in ``workspace`` beside a slab of their gradient: 3 products) or computed again (4 products).
``linear_loss`` needs neither.

The row kernels are token_logprobs' (csrc/token_logprobs.cpp, kernels/token_logprobs.py). Tests:
tests/test_linear_logprobs.py. Benchmark: benchmarks/bench_linear_logprobs.py.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastalign.ops.plan import plan
from fastalign.ops.slab import (
    IGNORE_NOTHING,
    HeadGradients,
    Rows,
    check_head,
    check_softcap,
    filled,
    follow_autocast,
    fresh,
    keep_if_room,
    logits_workspace,
    reserve,
    rows_ahead,
    slab_logits,
)
from fastalign.ops.token_logprobs import (
    accumulation_dtype,
    check_targets,
    dlogits_out,
    row_stats,
    row_stats_reference,
    temperature_tensor,
)


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """The formula with the whole logits tensor, differentiable by autograd: (logp, entropy), [N]
    each."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return row_stats_reference(logits, targets, temperature, softcap, ignore_index)[:2]


@torch.library.custom_op("fastalign::linear_logprobs", mutates_args=())
def linear_logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    index: Tensor | None,
    slab: int,
    keep: int,
    fill: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logp, entropy, row_max, log_sum [N] and the logits of the rows that count, [keep, V].

    ``index`` [count] are the rows that count, None when all do or when the targets are still to be
    looked at. ``keep`` is 0, when the logits need not be kept, or at least the number of rows that
    count; with ``fill``, where every product has ``slab`` rows, that number rounded up to slabs.
    """
    rows = Rows(targets, ignore_index, index)
    count, vocab = rows.count, weight.shape[0]
    logits = fresh((keep, vocab), hidden.dtype, hidden.device)
    stats = torch.empty(count, 4, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)

    def take(height: int) -> tuple[int, Tensor]:
        held = 0 if keep else height if fill else min(height, count)
        return height, stack.enter_context(logits_workspace(held, vocab, hidden))

    with ExitStack() as stack:
        # Logits that are kept reuse no workspace: one product makes them all.
        tallest = max(1, count) if keep and not fill else slab
        slab, work = reserve(stack, tallest, take, fixed=fill)
        for start in range(0, count, slab):
            stop = min(start + slab, count)
            height = slab if fill else stop - start
            z = logits[start : start + height] if keep else work[:height]
            slab_logits(filled(rows.take(hidden, start, stop), height), weight, bias, z)
            columns = row_stats(
                z[: stop - start],
                rows.take(targets, start, stop),
                rows.take_temperature(temperature, start, stop),
                softcap,
                ignore_index,
            )
            torch.stack(columns, dim=1, out=stats[start:stop])
    logits[count:] = 0.0
    logp, entropy, row_max, log_sum = rows.scatter(stats).t().contiguous().unbind(0)
    return logp.clone(), entropy.clone(), row_max.clone(), log_sum.clone(), logits


@linear_logprobs_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    index: Tensor | None,
    slab: int,
    keep: int,
    fill: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = hidden.shape[0]
    one = torch.empty(n, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    logits = hidden.new_empty(keep, weight.shape[0])
    return one, torch.empty_like(one), torch.empty_like(one), torch.empty_like(one), logits


@torch.library.custom_op("fastalign::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    index: Tensor | None,
    slab: int,
    fill: bool,
    logits: Tensor,
    logp: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dhidden, dweight, dbias; an empty tensor for each that ``need`` leaves out."""
    rows = Rows(targets, ignore_index, index)
    count, keep = rows.count, logits.shape[0] > 0

    def take(height: int) -> tuple[int, HeadGradients, Tensor]:
        slabs, wanted = -(-count // height), (need[0], need[1], need[2])
        grads = HeadGradients(hidden, weight, bias, rows, slabs, wanted)
        held = height if fill else min(height, count)
        return height, grads, stack.enter_context(logits_workspace(held, weight.shape[0], hidden))

    with ExitStack() as stack:
        slab, grads, work = reserve(stack, slab, take, fixed=fill)
        for start in range(0, count, slab):
            stop = min(start + slab, count)
            height = slab if fill else stop - start
            h = filled(rows.take(hidden, start, stop), height)
            dz = work[:height]
            own = dz[: stop - start]
            if not keep:
                slab_logits(h, weight, bias, dz)
            dlogits_out(
                own,
                rows.take(grad_logp, start, stop),
                None if grad_entropy is None else rows.take(grad_entropy, start, stop),
                logits[start:stop] if keep else own,
                rows.take(targets, start, stop),
                rows.take_temperature(temperature, start, stop),
                softcap,
                ignore_index,
                rows.take(logp, start, stop),
                rows.take(entropy, start, stop),
                rows.take(row_max, start, stop),
                rows.take(log_sum, start, stop),
            )
            dz[stop - start :] = 0.0
            grads.add(dz, h, start, stop)
    dhidden, dweight, dbias = (hidden.new_empty(0) if x is None else x for x in grads.result())
    return dhidden, dweight, dbias


@linear_logprobs_backward.register_fake
def _(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    index: Tensor | None,
    slab: int,
    fill: bool,
    logits: Tensor,
    logp: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dhidden, dweight, dbias = (
        hidden.new_empty(shape if wanted else (0,))
        for shape, wanted in zip(shapes, need, strict=True)
    )
    return dhidden, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, softcap, ignore_index, index, slab, _, fill = inputs
    ctx.settings = softcap, ignore_index, slab, fill
    logp, entropy, row_max, log_sum, logits = output
    ctx.save_for_backward(*tensors, index, logits, logp, entropy, row_max, log_sum)
    ctx.mark_non_differentiable(row_max, log_sum, logits)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> Any:
    hidden, weight, targets, bias, temperature, index, logits, *stats = ctx.saved_tensors
    softcap, ignore_index, slab, fill = ctx.settings
    if grad_logp is None:
        grad_logp = torch.zeros_like(stats[0])
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    grads = linear_logprobs_backward(
        grad_logp,
        grad_entropy,
        hidden,
        weight,
        targets,
        bias,
        temperature,
        softcap,
        ignore_index,
        index,
        slab,
        fill,
        logits,
        *stats,
        need,
    )
    dhidden, dweight, dbias = (g if wanted else None for g, wanted in zip(grads, need, strict=True))
    return dhidden, dweight, None, dbias, *[None] * 7


torch.library.register_autograd(
    "fastalign::linear_logprobs", _backward, setup_context=_setup_context
)


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    ignore_index: int | None = ...,
    return_entropy: Literal[False] = ...,
    workspace: int | None = ...,
    batch_invariant: bool = ...,
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    ignore_index: int | None = ...,
    return_entropy: Literal[True],
    workspace: int | None = ...,
    batch_invariant: bool = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    ignore_index: int | None = ...,
    return_entropy: bool,
    workspace: int | None = ...,
    batch_invariant: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    workspace: int | None = None,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(softcap(hidden @ weight.T + bias) / temperature) at ``targets``, in bounded
    memory.

    Differentiable in hidden, weight and bias, through the log-probs and through the entropy. A
    weight that does not require grad costs no product for its gradient; without any gradient there
    is one product and nothing is kept. The weight's gradient is summed over slabs in float32
    whatever the dtype.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64.
        weight: [V, H], same dtype and device.
        targets: [N] int64, in [0, V) or ``ignore_index``.
        bias: [V], same dtype.
        temperature: positive float, or a tensor [N] with one temperature per token.
        softcap: c of c * tanh(z / c), applied before the temperature; None for none.
        ignore_index: rows with this target are dropped before the first product: logp 0, entropy 0,
            gradient 0. Counting them makes the host wait once for a CUDA device; ``None`` drops
            nothing and never waits.
        return_entropy: also return the entropy of each row (nats).
        workspace: bytes of logits, and of gradients beside kept ones, that may be held at once; see
            ``plan``. Where a GPU has less left, no logits are kept and slabs are smaller.
        batch_invariant: as in ``linear_loss``.

    Returns:
        logp [N] in nats, float32 (float64 for float64 input); with ``return_entropy`` (logp,
        entropy).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; temperature or softcap <= 0; a
            workspace smaller than one row of logits.
    """
    op = "linear_logprobs"
    hidden, weight, bias = follow_autocast(hidden, weight, bias)
    check_head(op, hidden, weight, bias)
    vocab = weight.shape[0]
    check_targets(op, targets, hidden.shape[:1], hidden.device, vocab, ignore_index)
    scale = temperature_tensor(op, temperature, hidden, targets.shape)
    cap = check_softcap(op, softcap)
    ignored = IGNORE_NOTHING if ignore_index is None else ignore_index
    count, index, ignored = rows_ahead(targets, ignored)
    grad = torch.is_grad_enabled()
    chosen = plan(
        count,
        hidden.shape[1],
        weight.shape[0],
        op=op,
        dtype=hidden.dtype,
        device=hidden.device,
        hidden_grad=grad and hidden.requires_grad,
        weight_grad=grad and weight.requires_grad,
        bias_grad=grad and bias is not None and bias.requires_grad,
        batch_invariant=batch_invariant,
        workspace=workspace,
    )
    head = (hidden, weight, targets, bias, scale, cap, ignored, index, chosen.slab)
    logp, entropy, *_ = keep_if_room(
        chosen.kept, lambda keep: linear_logprobs_op(*head, keep, batch_invariant)
    )
    return (logp, entropy) if return_entropy else logp
