"""Labels that a trained ensemble doubts, and what is done about them (2401.06080).

    strength of a pair    mu = mean over heads of r_k(chosen) - r_k(rejected)

The weakest pairs are more often labelled the wrong way round than not: those below one quantile of
mu are flipped. Those between it and a second one say little: their labels are softened. And mu
itself can be the margin of the loss, -log sigma(r_w - r_l - mu): what is sure is to be far apart,
what is doubtful need not be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastalign.data.tokens import TokenizedPreference


@dataclass(frozen=True)
class Labels:
    """Pairs, and what the loss takes of each beside its scores."""

    pairs: list[TokenizedPreference]
    margin: Tensor | float | None = None
    """fp32 [n] or one for all, subtracted from r_w - r_l."""
    soft: Tensor | None = None
    """bool [n], which labels are smoothed; None: all."""

    def of(self, rows: list[int], device: torch.device) -> dict[str, Any]:
        """Those of some pairs, as `pair_loss` takes them."""
        cut = {"margin": self.margin, "soft": self.soft}
        return {k: x[rows].to(device) if isinstance(x, Tensor) else x for k, x in cut.items()}


def strength(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """[n, K] scores each -> mean and deviation (ddof 0) over the heads of their difference, [n]."""
    gaps = chosen - rejected
    return gaps.mean(1), gaps.std(1, correction=0)


def relabel(
    labels: Labels, mu: Tensor, flip_below: float, soft_label_below: float, adaptive_margin: bool
) -> tuple[Labels, dict[str, float]]:
    """What becomes of the labels, and the counts of it.

    Args:
        labels: as the data have them.
        mu: [n], strengths.
        flip_below: quantile; the floor(flip_below n) weakest pairs change sides, mu its sign.
        soft_label_below: quantile; of the floor(soft_label_below n) weakest those that stay as they
            are get soft labels. 0: none of this, all labels are treated alike.
        adaptive_margin: mu is the margin.
    """
    n = len(labels.pairs)
    place = torch.empty(n, dtype=torch.int64)
    place[mu.argsort(stable=True)] = torch.arange(n)
    flipped = place < int(flip_below * n)
    weak = (place < int(soft_label_below * n)) & ~flipped
    pairs = [
        replace(p, chosen=p.rejected, rejected=p.chosen) if flip else p
        for p, flip in zip(labels.pairs, flipped.tolist(), strict=True)
    ]
    margin = torch.where(flipped, -mu, mu) if adaptive_margin else labels.margin
    counts = {"flipped": float(flipped.sum()), "softened": float(weak.sum())}
    return Labels(pairs, margin, weak if soft_label_below else None), counts
