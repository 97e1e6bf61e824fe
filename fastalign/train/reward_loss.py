"""The loss of pairs for K reward heads, each with its own weights of the pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign import ops
from fastalign.streams import stream


def bootstrap_weights(n_pairs: int, heads: int, seed: int) -> Tensor:
    """int64 [n_pairs, heads]: how often each head's draw with replacement holds each pair."""
    weights = torch.zeros(n_pairs, heads, dtype=torch.int64)
    for k in range(heads):
        drawn = torch.randint(n_pairs, (n_pairs,), generator=stream(seed, "bootstrap", k))
        weights[:, k] = torch.bincount(drawn, minlength=n_pairs)
    return weights


def pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor,
    totals: Tensor,
    *,
    margin: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    soft: Tensor | None = None,
    center_coef: float = 0.0,
) -> Tensor:
    """The part of a batch's loss that some of its pairs carry; the parts add up to the whole.

        1/K sum_k  sum_b weights[b, k] (l[b, k] + center_coef (r_w + r_l)[b, k]^2) / totals[k]

    Args:
        chosen, rejected: fp32 [b, K], scores of these pairs.
        weights: int64 [b, K], how often each pair counts for each head.
        totals: int64 [K], the sum of the weights over the whole batch.
        margin, label_smoothing: as in `ops.bradley_terry_loss`.
        soft: bool [b], the pairs whose labels are smoothed; None: all.
        center_coef: weight of the squared sum of a pair's scores.
    """

    def loss(kept: Tensor, smoothing: float) -> Tensor:
        return ops.bradley_terry_loss(
            chosen,
            rejected,
            margin=margin,
            head_mask=kept,
            totals=totals,
            label_smoothing=smoothing,
        )

    if soft is None:
        total = loss(weights, label_smoothing)
    else:
        total = loss(weights * soft[:, None], label_smoothing) + loss(weights * ~soft[:, None], 0.0)
    if center_coef:
        squares = (weights * (chosen + rejected).square()).sum(0) / totals.clamp(min=1)
        total = total + center_coef * squares.mean()
    return total
