"""Scores of an ensemble of K linear reward heads on one encoder, and one statistic of them.

    scores[b, k] = hidden[index[b]] . weight[k] + bias[k]

and, in the same pass, a statistic of each row of scores and their standard deviation
(fastalign/ops/reduce_scores.py has the formulas). With d[b, k] = dL/dscores[b, k], that of the
statistic and of the standard deviation included:

    dL/dhidden[n] = sum over b with index[b] = n of  sum_k d[b, k] weight[k]
    dL/dweight[k] = sum_b d[b, k] hidden[index[b]]
    dL/dbias[k]   = sum_b d[b, k]

Sums over samples are taken in an order that only the shapes and the index decide: same inputs, same
bits. Rows that the index does not name are neither read nor given a gradient other than 0.

Source: one encoder with several linear heads, arXiv 2406.01013.

C++: csrc/reward_heads.cpp. Triton: kernels/reward_heads.py. Tests: tests/test_reward_heads.py.
Benchmark: benchmarks/bench_reward_heads.py.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastalign.backend import choose, once_differentiable, plain, refuse_forward_mode
from fastalign.ops.reduce_scores import (
    MAX_HEADS,
    check_statistic,
    dscores_reference,
    reduce_scores_reference,
    statistic,
)
from fastalign.ops.slab import fresh
from fastalign.ops.token_logprobs import FLOAT_DTYPES, accumulation_dtype


def reward_heads_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    reduce: str = "mean",
    coef: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [B, K], statistic [B], std [B]) by the formulas above in plain PyTorch."""
    rows = hidden if index is None else hidden.index_select(0, index)
    wide = accumulation_dtype(hidden.dtype)
    scores = rows.to(wide) @ weight.to(wide).t()
    if bias is not None:
        scores = scores + bias.to(wide)
    return scores, *reduce_scores_reference(scores, reduce, coef)


def reward_heads_backward_reference(
    grad_scores: Tensor | None,
    grad_reduced: Tensor | None,
    grad_std: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor | None,
    scores: Tensor,
    reduce: str,
    coef: float,
    needs_hidden: bool,
    needs_heads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dhidden, dL/dweight and dL/dbias by the closed forms above; empty where not needed."""
    d = dscores_reference(grad_reduced, grad_std, scores, reduce, coef)
    if grad_scores is not None:
        d = d + grad_scores
    dhidden, dweight, dbias = _empty_gradients(hidden, weight, needs_hidden, needs_heads)
    if needs_hidden:
        drows = d @ weight.to(d.dtype)
        if index is not None:
            drows = torch.zeros_like(hidden, dtype=d.dtype).index_add(0, index, drows)
        dhidden = drows.to(hidden.dtype)
    if needs_heads:
        rows = hidden if index is None else hidden.index_select(0, index)
        dweight = (d.t() @ rows.to(d.dtype)).to(weight.dtype)
        dbias = d.sum(0)
    return dhidden, dweight, dbias


def _empty_gradients(
    hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_heads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradients of hidden, weight and bias, not filled; of no elements if not needed."""
    n_heads, width = weight.shape if needs_heads else (0, 0)
    wide = accumulation_dtype(hidden.dtype)
    return (
        fresh(hidden.shape if needs_hidden else (0, 0), hidden.dtype, hidden.device),
        weight.new_empty(n_heads, width),
        weight.new_empty(n_heads, dtype=wide),
    )


def _computed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    reduce: str,
    coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reward_heads_reference``, by the backend in force."""
    which = choose("reward_heads", hidden)
    chosen = statistic(reduce, coef, weight.shape[0])
    if which == "triton":
        from fastalign.kernels.reward_heads import reward_heads_fwd

        return reward_heads_fwd(hidden, weight, bias, index, chosen)
    if which == "cpp":
        return torch.ops.fastalign_cpp.reward_heads(
            hidden,
            weight.float(),
            None if bias is None else bias.float(),
            None if index is None else index.long(),
            *chosen,
        )
    # Autocast would round the scores to its dtype, and rewards close to each other into ties.
    with torch.autocast(hidden.device.type, enabled=False):
        return reward_heads_reference(hidden, weight, bias, index, reduce, coef)


@torch.library.custom_op("fastalign::reward_heads", mutates_args=())
def _reward_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    reduce: str,
    coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _computed(hidden, weight, bias, index, reduce, coef)


@_reward_heads.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    reduce: str,
    coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    n = hidden.shape[0] if index is None else index.shape[0]
    wide = accumulation_dtype(hidden.dtype)
    scores = hidden.new_empty(n, weight.shape[0], dtype=wide)
    return scores, hidden.new_empty(n, dtype=wide), hidden.new_empty(n, dtype=wide)


def _gradients(
    grad_scores: Tensor | None,
    grad_reduced: Tensor | None,
    grad_std: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor | None,
    scores: Tensor,
    reduce: str,
    coef: float,
    needs_hidden: bool,
    needs_heads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reward_heads_backward_reference``, by the backend in force."""
    which = choose("reward_heads_backward", hidden)
    gradients = (grad_scores, grad_reduced, grad_std)
    chosen = statistic(reduce, coef, weight.shape[0])
    out = _empty_gradients(hidden, weight, needs_hidden, needs_heads)
    if which == "triton":
        from fastalign.kernels.reward_heads import reward_heads_bwd

        reward_heads_bwd(*out, *gradients, hidden, weight, index, scores, chosen)
        return out
    if which == "cpp":
        dweight = out[1].float()
        rows = None if index is None else index.long()
        torch.ops.fastalign_cpp.reward_heads_backward(
            out[0], dweight, out[2], *gradients, hidden, weight.float(), rows, scores, *chosen
        )
        return out[0], dweight.to(weight.dtype), out[2]
    with torch.autocast(hidden.device.type, enabled=False):
        return reward_heads_backward_reference(
            *gradients, hidden, weight, index, scores, reduce, coef, needs_hidden, needs_heads
        )


@torch.library.custom_op("fastalign::reward_heads_backward", mutates_args=())
def _reward_heads_backward(
    grad_scores: Tensor | None,
    grad_reduced: Tensor | None,
    grad_std: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor | None,
    scores: Tensor,
    reduce: str,
    coef: float,
    needs_hidden: bool,
    needs_heads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(
        grad_scores,
        grad_reduced,
        grad_std,
        hidden,
        weight,
        index,
        scores,
        reduce,
        coef,
        needs_hidden,
        needs_heads,
    )


@_reward_heads_backward.register_fake
def _(
    grad_scores: Tensor | None,
    grad_reduced: Tensor | None,
    grad_std: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor | None,
    scores: Tensor,
    reduce: str,
    coef: float,
    needs_hidden: bool,
    needs_heads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, weight, needs_hidden, needs_heads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, index, ctx.reduce, ctx.coef = inputs
    ctx.save_for_backward(hidden, weight, index, output[0])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *gradients: Tensor | None, call: Any = _reward_heads_backward) -> Any:
    hidden, weight, index, scores = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dhidden, dweight, dbias = call(
        *gradients,
        hidden,
        weight,
        index,
        scores,
        ctx.reduce,
        ctx.coef,
        needs_hidden,
        needs_weight or needs_bias,
    )
    return (
        dhidden if needs_hidden else None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        None,
        None,
        None,
    )


torch.library.register_autograd("fastalign::reward_heads", _backward, setup_context=_setup_context)


class _RewardHeads(torch.autograd.Function):
    """The op without the dispatcher, which takes as long on a CPU as 5 heads on 256 samples."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _computed(*args)
        _setup_context(ctx, args, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return _backward(ctx, *gradients, call=_gradients)


@overload
def reward_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    reduce: None = None,
    coef: float | None = None,
    return_std: Literal[False] = False,
) -> Tensor: ...
@overload
def reward_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    reduce: str,
    coef: float | None = None,
    return_std: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def reward_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    reduce: str | None = None,
    coef: float | None = None,
    return_std: Literal[True],
) -> tuple[Tensor, ...]: ...
def reward_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    reduce: str | None = None,
    coef: float | None = None,
    return_std: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Scores of K linear heads, and with ``reduce`` their statistic, in one read of hidden.

    Args:
        hidden: [N, D], the encoder's last hidden states; bfloat16, float16, float32 or float64.
        weight: [K, D], one row per head, 1 <= K <= 64.
        bias: [K].
        index: [B], int64 or int32, the row of each sequence's last token, in [0, N); a row may be
            named more than once. Other values: an error on the CPU, NaN scores and no gradient on
            CUDA. None scores all N rows (B = N).
        reduce, coef: as in :func:`reduce_scores`.
        return_std: also return the disagreement of the heads, the standard deviation of each row of
            scores (ddof = 1; 0 for K = 1).

    Returns:
        scores [B, K]; a tuple of scores, the statistic [B] with ``reduce`` and the disagreement [B]
        with ``return_std``, when one of these is asked for. float32, or float64 for float64 hidden.
        All are differentiable in hidden, weight and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a statistic or coef that
            :func:`reduce_scores` refuses.
    """
    fits = hidden.dim() == 2 == weight.dim() and hidden.shape[1] == weight.shape[1] > 0
    if not fits:
        raise ValueError(
            "reward_heads: expected hidden [N, D] and weight [K, D], D >= 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not 1 <= weight.shape[0] <= MAX_HEADS:
        raise ValueError(
            f"reward_heads: expected 1 <= K <= {MAX_HEADS} heads, got weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"reward_heads: expected bias [K] = ({weight.shape[0]},), got {tuple(bias.shape)}"
        )
    if index is not None and (index.dim() != 1 or index.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            "reward_heads: expected index [B] of int32 or int64, "
            f"got {tuple(index.shape)} {index.dtype}"
        )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"reward_heads: expected {name} of a floating dtype, got {tensor.dtype}"
            )
    for name, tensor in (("weight", weight), ("bias", bias), ("index", index)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"reward_heads: expected {name} on the device of hidden, {hidden.device}, "
                f"got {tensor.device}"
            )
    refuse_forward_mode("reward_heads", hidden, weight, bias)
    number = 0.0 if reduce is None else check_statistic("reward_heads", reduce, coef)
    if not plain(hidden):
        call: Any = _reward_heads
    else:
        call = _RewardHeads.apply if torch.is_grad_enabled() else _computed
    scores, reduced, std = call(hidden, weight, bias, index, reduce or "mean", number)
    if reduce is None and not return_std:
        return scores
    return (scores, *([] if reduce is None else [reduced]), *([std] if return_std else []))
