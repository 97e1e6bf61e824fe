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
they fit in ``workspace``: 4 products) or computed again (6 products, two of them the reference's).

Tests: tests/test_linear_kl.py. Benchmark: benchmarks/bench_linear_kl.py. The row kernels are
token_kl's (csrc/token_kl.cpp, kernels/token_kl.py).
"""

from __future__ import annotations

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
    logits_workspace,
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
    slab: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> kl [N], the statistics of kl_stats [N, 8], and the logits of policy and reference: [N, V],
    kept rows first, or [0, V]."""
    rows = Rows(targets, ignore_index)
    n, vocab = hidden.shape[0], weight.shape[0]
    logits = hidden.new_empty(n if keep else 0, vocab)
    ref_logits = ref_hidden.new_empty(n if keep else 0, vocab)
    stats = torch.empty(rows.count, 8, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    height = 0 if keep else min(slab, rows.count)
    with (
        logits_workspace(height, vocab, hidden) as work,
        logits_workspace(height, vocab, ref_hidden) as ref_work,
    ):
        for start in range(0, rows.count, slab):
            stop = min(start + slab, rows.count)
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
    logits[rows.count :] = 0.0
    ref_logits[rows.count :] = 0.0
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
    slab: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, vocab = hidden.shape[0], weight.shape[0]
    kl = torch.empty(n, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
    held = n if keep else 0
    return (
        kl,
        kl.new_empty(n, 8),
        hidden.new_empty(held, vocab),
        ref_hidden.new_empty(held, vocab),
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
    slab: int,
    stats: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dhidden, dweight, dbias; an empty tensor for each that ``need`` leaves out."""
    rows = Rows(targets, ignore_index)
    keep = logits.shape[0] > 0
    slabs = -(-rows.count // slab)
    grads = HeadGradients(hidden, weight, bias, rows, slabs, (need[0], need[1], need[2]))
    height, vocab = min(slab, rows.count), weight.shape[0]
    with (
        logits_workspace(height, vocab, hidden) as work,
        logits_workspace(0 if keep else height, vocab, ref_hidden) as ref_work,
    ):
        for start in range(0, rows.count, slab):
            stop = min(start + slab, rows.count)
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
    *tensors, ctx.softcap, ctx.ignore_index, ctx.slab, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_kl: Tensor | None, *_: Any) -> Any:
    *tensors, stats, logits, ref_logits = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:3])
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if grad_kl is not None:
        settings = (ctx.softcap, ctx.ignore_index, ctx.slab)
        every = linear_kl_backward(grad_kl, *tensors, *settings, stats, logits, ref_logits, need)
        grads = tuple(g if wanted else None for g, wanted in zip(every, need, strict=True))
    return *grads, *[None] * 9


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
        workspace: bytes of both models' logits that may be held at once; default as in ``plan``.

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
    slab, keep = _slab(op, hidden, weight, bias, ref_hidden.dtype, workspace)
    kl, *_ = linear_kl_op(
        hidden,
        weight,
        bias,
        ref_hidden.detach(),
        ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        targets,
        scale,
        cap,
        IGNORE_NOTHING if mask is None else -100,
        slab,
        keep,
    )
    return kl


def _slab(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_dtype: torch.dtype,
    workspace: int | None,
) -> tuple[int, bool]:
    """Tokens per slab, and whether both models' logits are kept: planned as by linear_logprobs, for
    a vocabulary that takes the bytes of both models' logits in the policy's dtype."""
    size = hidden.dtype.itemsize
    row = weight.shape[0] * (size + ref_dtype.itemsize)
    if workspace is not None and workspace < row:
        raise ValueError(
            f"{op}: expected workspace >= {row} bytes (one row of {weight.shape[0]} logits of both "
            f"models), got {workspace}"
        )
    vocab = -(-row // size)
    grad = torch.is_grad_enabled()
    chosen = plan(
        hidden.shape[0],
        hidden.shape[1],
        vocab,
        op="linear_logprobs",
        dtype=hidden.dtype,
        device=hidden.device,
        hidden_grad=grad and hidden.requires_grad,
        weight_grad=grad and (weight.requires_grad or (bias is not None and bias.requires_grad)),
        workspace=None if workspace is None else max(workspace, vocab * size),
    )
    return chosen.slab, chosen.mode == "keep logits"
