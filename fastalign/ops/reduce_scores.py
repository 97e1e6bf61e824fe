"""One statistic over the scores of K reward heads, and how much the heads disagree.

    mean    sum_k s_k / K
    min     the worst case over heads (WCO)
    median  the middle score; for even K the mean of the two middle ones
    lcb     mean - coef * std_k(s)         lower confidence bound
    uwo     mean - coef * variance_k(s)    uncertainty-weighted

std and variance are the unbiased ones (ddof = 1) and 0 for K = 1. A NaN among the scores makes
every statistic NaN. Where a source divides by K (ddof = 0), its uwo is this one with coef times
(K - 1) / K, its lcb with coef times sqrt((K - 1) / K).

Gradients with respect to s_k, where c_k = s_k - mean:

    mean    1 / K
    std     c_k / ((K - 1) std), and 0 where std is 0
    lcb     1 / K - coef * c_k / ((K - 1) std)
    uwo     1 / K - 2 coef * c_k / (K - 1)
    min     1 / (number of heads at the minimum) for each of them: heads that are equal share
    median  half of it to the lower and half to the upper middle score, shared in the same way

Sources: min over heads of one encoder, arXiv 2406.01013; uwo, Coste et al., arXiv 2310.02743;
lcb, Zhang et al., arXiv 2401.16635.

C++: csrc/reduce_scores.cpp. Triton: kernels/reduce_scores.py. Tests:
tests/test_reduce_scores.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.backend import choose, plain, refuse_forward_mode
from fastalign.ops.token_logprobs import FLOAT_DTYPES, accumulation_dtype

STATISTICS = ("mean", "min", "lcb", "uwo", "median")
NEED_COEF = ("lcb", "uwo")
MAX_HEADS = 64


class Statistic(NamedTuple):
    """A statistic as the kernels take it: the mean of the ascending scores ``lower`` and ``upper``
    where these are no -1, else mean - std_coef * std - variance_coef * variance."""

    lower: int
    upper: int
    std_coef: float
    variance_coef: float


def statistic(reduce: str, coef: float, n_heads: int) -> Statistic:
    if reduce == "min":
        return Statistic(0, 0, 0.0, 0.0)
    if reduce == "median":
        return Statistic((n_heads - 1) // 2, n_heads // 2, 0.0, 0.0)
    return Statistic(-1, -1, coef if reduce == "lcb" else 0.0, coef if reduce == "uwo" else 0.0)


def _ordered(scores: Tensor, position: int) -> Tensor:
    """[..., 1], the score at this place of the ascending order; NaN where there is a NaN."""
    at = scores.sort(-1).values[..., position, None]
    return at.masked_fill(scores.isnan().any(-1, keepdim=True), float("nan"))


def _centred(s: Tensor) -> Tensor:
    """Deviations from the mean, by way of the first score: equal scores are 0 from it, and not from
    a mean that is rounded."""
    apart = s - s[..., :1]
    return apart - apart.mean(-1, keepdim=True)


def reduce_scores_reference(scores: Tensor, reduce: str, coef: float) -> tuple[Tensor, Tensor]:
    """(statistic, std) by the formulas above in plain PyTorch, [...] from [..., K]."""
    s = scores.to(accumulation_dtype(scores.dtype))
    n_heads = s.shape[-1]
    mean = s.mean(-1)
    # A norm, because its gradient at equal scores is 0 where that of a square root is not finite.
    norm = torch.linalg.vector_norm(_centred(s), dim=-1)
    std = norm / math.sqrt(n_heads - 1) if n_heads > 1 else torch.zeros_like(mean)
    lower, upper, std_coef, variance_coef = statistic(reduce, coef, n_heads)
    if lower >= 0:
        return ((_ordered(s, lower) + _ordered(s, upper)) / 2)[..., 0], std
    if std_coef:
        return mean - std_coef * std, std
    if variance_coef:
        return mean - variance_coef * std.square(), std
    return mean, std


def dscores_reference(
    grad_reduced: Tensor | None, grad_std: Tensor | None, scores: Tensor, reduce: str, coef: float
) -> Tensor:
    """dL/dscores [..., K] by the closed forms above, in the accumulation dtype."""
    s = scores.to(accumulation_dtype(scores.dtype))
    n_heads = s.shape[-1]
    centred = _centred(s)
    std = reduce_scores_reference(s, "mean", 0.0)[1][..., None]
    ddof = max(1, n_heads - 1)
    dstd = torch.where(std == 0, torch.zeros_like(s), centred / (ddof * std))
    lower, upper, std_coef, variance_coef = statistic(reduce, coef, n_heads)
    share = torch.full_like(s, 1.0 / n_heads)
    if lower >= 0:
        first, second = ((s == _ordered(s, at)).to(s.dtype) for at in (lower, upper))
        share = 0.5 * first / first.sum(-1, keepdim=True)
        share = share + 0.5 * second / second.sum(-1, keepdim=True)
    if std_coef:
        share = share - std_coef * dstd
    if variance_coef:
        share = share - 2.0 * variance_coef * centred / ddof
    total = torch.zeros_like(s)
    if grad_reduced is not None:
        total = total + grad_reduced[..., None] * share
    if grad_std is not None:
        total = total + grad_std[..., None] * dstd
    return total


def _computed(scores: Tensor, reduce: str, coef: float) -> tuple[Tensor, Tensor]:
    """``reduce_scores_reference``, by the backend in force."""
    which = choose("reduce_scores", scores)
    chosen = statistic(reduce, coef, scores.shape[1])
    if which == "triton":
        from fastalign.kernels.reduce_scores import reduce_scores_fwd

        return reduce_scores_fwd(scores, chosen)
    if which == "cpp":
        return torch.ops.fastalign_cpp.reduce_scores(scores.float(), *chosen)
    return reduce_scores_reference(scores, reduce, coef)


_reduce_scores = torch.library.custom_op("fastalign::reduce_scores", _computed, mutates_args=())


@_reduce_scores.register_fake
def _(scores: Tensor, reduce: str, coef: float) -> tuple[Tensor, Tensor]:
    one = scores.new_empty(scores.shape[0], dtype=accumulation_dtype(scores.dtype))
    return one, torch.empty_like(one)


@torch.library.custom_op("fastalign::reduce_scores_backward", mutates_args=())
def _reduce_scores_backward(
    grad_reduced: Tensor | None, grad_std: Tensor | None, scores: Tensor, reduce: str, coef: float
) -> Tensor:
    which = choose("reduce_scores_backward", scores)
    chosen = statistic(reduce, coef, scores.shape[1])
    if which == "triton":
        from fastalign.kernels.reduce_scores import dscores_fwd

        return dscores_fwd(None, grad_reduced, grad_std, scores, None, chosen).to(scores.dtype)
    if which == "cpp":
        d = torch.ops.fastalign_cpp.dscores(grad_reduced, grad_std, scores.float(), *chosen)
        return d.to(scores.dtype)
    return dscores_reference(grad_reduced, grad_std, scores, reduce, coef).to(scores.dtype)


@_reduce_scores_backward.register_fake
def _(
    grad_reduced: Tensor | None, grad_std: Tensor | None, scores: Tensor, reduce: str, coef: float
) -> Tensor:
    return scores.new_empty(scores.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, ctx.reduce, ctx.coef = inputs
    ctx.save_for_backward(scores)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_reduced: Tensor | None, grad_std: Tensor | None) -> Any:
    (scores,) = ctx.saved_tensors
    return _reduce_scores_backward(grad_reduced, grad_std, scores, ctx.reduce, ctx.coef), None, None


torch.library.register_autograd("fastalign::reduce_scores", _backward, setup_context=_setup_context)


def check_statistic(op: str, reduce: str, coef: float | None) -> float:
    """The coefficient as a float; ValueError for an unknown statistic or a coef that is missing."""
    if reduce not in STATISTICS:
        raise ValueError(
            f"{op}: expected reduce to be one of {', '.join(STATISTICS)}, got {reduce!r}"
        )
    if reduce in NEED_COEF and (coef is None or not 0.0 <= coef < math.inf):
        raise ValueError(f"{op}: expected a finite coef >= 0 for {reduce!r}, got {coef}")
    return 0.0 if coef is None else float(coef)


def reduce_scores(scores: Tensor, reduce: str, coef: float | None = None) -> Tensor:
    """One reward per sample from the scores of K heads; formulas in this module's docstring.

    Args:
        scores: [..., K], 1 <= K <= 64; bfloat16, float16, float32 or float64.
        reduce: "mean", "min", "lcb", "uwo" or "median".
        coef: weight of the spread, required for "lcb" and "uwo" (0 is allowed and means 0, so the
            mean); the other statistics have no use for it.

    Returns:
        [...], float32 (float64 for float64). Differentiable; heads that are equal share a gradient.

    Raises:
        ValueError: an unknown statistic, no heads or more than 64, a dtype that is not one of the
            four, or a coef that is missing, negative or not finite.
    """
    refuse_forward_mode("reduce_scores", scores)
    number = check_statistic("reduce_scores", reduce, coef)
    if scores.dim() == 0 or not 1 <= scores.shape[-1] <= MAX_HEADS:
        raise ValueError(
            f"reduce_scores: expected scores [..., K] with 1 <= K <= {MAX_HEADS}, "
            f"got {tuple(scores.shape)}"
        )
    if scores.dtype not in FLOAT_DTYPES:
        raise ValueError(f"reduce_scores: expected a floating dtype, got {scores.dtype}")
    rows = scores.reshape(-1, scores.shape[-1])
    constant = not (rows.requires_grad and torch.is_grad_enabled())
    call = _computed if constant and plain(rows) else _reduce_scores
    return call(rows, reduce, number)[0].reshape(scores.shape[:-1])
