"""Scores of an ensemble of K linear reward heads on one encoder, and one statistic of them.

    scores[b, k] = hidden[index[b]] . weight[k] + bias[k]

    mean    sum_k s_k / K
    min     the worst case over heads (WCO)
    median  the middle score; for even K the mean of the two middle ones
    lcb     mean - coef * std_k(s)         lower confidence bound
    uwo     mean - coef * variance_k(s)    uncertainty-weighted

std and variance are the unbiased ones (ddof = 1) and 0 for K = 1.

Sources: one encoder with several heads and their minimum, arXiv 2406.01013; uwo, Coste et al.,
arXiv 2310.02743; lcb, Zhang et al., arXiv 2401.16635.

Sibling file: tests/test_reward_heads.py.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

STATISTICS = ("mean", "min", "lcb", "uwo", "median")
NEED_COEF = ("lcb", "uwo")


def reward_heads_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None
) -> Tensor:
    """The scores [B, K]; rows are gathered first, so only they are widened to float32."""
    rows = hidden if index is None else hidden.index_select(0, index)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scores = rows.to(wide) @ weight.to(wide).t()
    return scores if bias is None else scores + bias.to(wide)


def reduce_scores_reference(scores: Tensor, reduce: str, coef: float) -> Tensor:
    """One statistic over the last dimension, as in this module's docstring."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    n_heads = scores.shape[-1]
    if reduce == "min":
        return scores.amin(-1)
    if reduce == "median":
        ordered = scores.sort(-1).values
        return (ordered[..., (n_heads - 1) // 2] + ordered[..., n_heads // 2]) / 2
    mean = scores.mean(-1)
    if reduce == "mean" or n_heads == 1:
        return mean
    centred = scores - mean[..., None]
    if reduce == "uwo":
        return mean - coef * centred.square().sum(-1) / (n_heads - 1)
    # A norm, because its gradient at equal scores is 0 where that of a square root is not finite.
    return mean - coef * torch.linalg.vector_norm(centred, dim=-1) / math.sqrt(n_heads - 1)


torch.library.define(
    "fastalign::reward_heads",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? index) -> Tensor",
)
torch.library.impl("fastalign::reward_heads", "CompositeImplicitAutograd", reward_heads_reference)
torch.library.define(
    "fastalign::reduce_scores", "(Tensor scores, str reduce, float coef) -> Tensor"
)
torch.library.impl("fastalign::reduce_scores", "CompositeImplicitAutograd", reduce_scores_reference)


def reduce_scores(scores: Tensor, reduce: str, coef: float | None = None) -> Tensor:
    """One reward per sample from the scores of K heads; formulas in this module's docstring.

    Args:
        scores: [..., K], K >= 1; bfloat16, float16, float32 or float64.
        reduce: "mean", "min", "lcb", "uwo" or "median".
        coef: weight of the spread, required for "lcb" and "uwo" (0 is allowed and means 0, so the
            mean); the other statistics have no use for it.

    Returns:
        [...], float32 (float64 for float64). Differentiable; equal minima share the gradient.

    Raises:
        ValueError: an unknown statistic, no heads, or a coef that is missing or negative.
    """
    if reduce not in STATISTICS:
        raise ValueError(
            f"reduce_scores: expected reduce to be one of {', '.join(STATISTICS)}, got {reduce!r}"
        )
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(f"reduce_scores: expected scores [..., K >= 1], got {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise ValueError(f"reduce_scores: expected a floating dtype, got {scores.dtype}")
    if reduce in NEED_COEF and (coef is None or not coef >= 0.0):
        raise ValueError(f"reduce_scores: expected coef >= 0 for {reduce!r}, got {coef}")
    return torch.ops.fastalign.reduce_scores(scores, reduce, 0.0 if coef is None else float(coef))


@overload
def reward_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    reduce: None = None,
    coef: float | None = None,
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
) -> tuple[Tensor, Tensor]: ...


def reward_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    reduce: str | None = None,
    coef: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scores of K linear heads and, with ``reduce``, their statistic.

    Args:
        hidden: [N, D], the encoder's last hidden states; bfloat16, float16, float32 or float64.
        weight: [K, D], one row per head.
        bias: [K].
        index: [B], int64 or int32, the row of each sequence's last token. None scores all N rows (B
            = N).
        reduce, coef: as in :func:`reduce_scores`.

    Returns:
        scores [B, K]; with ``reduce`` the pair (scores, reduced [B]). float32, or float64 for
        float64 hidden. Differentiable in hidden, weight and bias.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or what :func:`reduce_scores`
            refuses.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "reward_heads: expected hidden [N, D] and weight [K, D], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"reward_heads: expected K >= 1 heads, got weight {tuple(weight.shape)}")
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
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(
                f"reward_heads: expected {name} of a floating dtype, got {tensor.dtype}"
            )
    for name, tensor in (("weight", weight), ("bias", bias), ("index", index)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"reward_heads: expected {name} on the device of hidden, {hidden.device}, "
                f"got {tensor.device}"
            )
    # Autocast would round the scores to its dtype, and rewards close to each other into ties.
    with torch.autocast(hidden.device.type, enabled=False):
        scores = torch.ops.fastalign.reward_heads(hidden, weight, bias, index)
    if reduce is None:
        return scores
    return scores, reduce_scores(scores, reduce, coef)
