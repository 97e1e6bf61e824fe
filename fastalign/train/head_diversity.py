"""How different reward heads are, and what to say when they have become one.

A minimum over heads, and a bound that subtracts what they disagree by, guard against errors of
single heads. Heads that all err alike are one head: min, median, lcb and uwo are then the mean.
With a frozen encoder each head's problem is convex, so that heads trained long enough on the same
pairs meet in one optimum wherever they began; a trained encoder, or pairs drawn anew for each head,
keeps them apart.

Disagreement is the standard deviation over heads, the mean over responses. Out of distribution it
is taken on held-out responses whose tokens are in random order: the same words, and no sentence
that the heads were trained on.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch
from torch import Tensor

from fastalign.data.tokens import TokenizedPreference
from fastalign.ops.reduce_scores import NEED_COEF
from fastalign.streams import stream

log = logging.getLogger("fastalign")

ONE_HEAD = 0.999
"""Correlation above which heads count as one."""
LEAST = 5
"""Responses or pairs that a correlation takes."""
NEED_DIFFERENCE = ("min", "median", *NEED_COEF)
"""Statistics that are the mean where all heads say the same."""


def correlation(scores: Tensor, name: str = "heads/correlation") -> dict[str, float]:
    """The metric of that name: of two heads on [n, K] scores, the mean over all two of them.
    Nothing where a head says the same of every response, and for n < LEAST: of two responses any
    two heads correlate at 1 or -1."""
    if len(scores) < LEAST or bool((scores == scores[0]).all(0).any()):
        return {}
    table = torch.corrcoef(scores.double().T)
    return {name: float(table[~torch.eye(len(table), dtype=torch.bool)].mean())}


def shuffled(pairs: list[TokenizedPreference], seed: int) -> list[TokenizedPreference]:
    """The pairs with the tokens of each response in random order, its last one (the end of the
    sequence, at which heads read) in its place."""
    generator = stream(seed, "shuffled")

    def mixed(tokens: list[int]) -> list[int]:
        order = torch.randperm(max(len(tokens) - 1, 0), generator=generator).tolist()
        return [tokens[i] for i in order] + tokens[-1:]

    return [replace(p, chosen=mixed(p.chosen), rejected=mixed(p.rejected)) for p in pairs]


def warn_of_one_head(metrics: dict[str, float]) -> None:
    """After training: says where an ensemble has become K copies of one head."""
    found = metrics.get("heads/correlation", 0.0)
    if found > ONE_HEAD:
        log.warning(
            "the heads have become one: their margins on held-out pairs correlate at %.5f (%.5f "
            "with tokens in random order), and min, median, lcb and uwo say what the mean says. On "
            "a frozen encoder each head's problem is convex: train fewer steps, or with "
            "--bootstrap resample",
            found,
            metrics.get("heads/correlation/shuffled", math.nan),
        )


def warn_of_statistic(metrics: dict[str, float], statistic: str) -> None:
    """Before a policy learns from heads: says where the statistic is to guard by differences that
    there are not."""
    found = metrics.get("heads/correlation", 0.0)
    if statistic in NEED_DIFFERENCE and found > ONE_HEAD:
        log.warning(
            "--statistic %s has nothing to guard with: the heads' rewards of the first responses "
            "correlate at %.5f (disagreement %.4f), so that it is their mean. Take heads that "
            "differ: an encoder that is not frozen, --bootstrap resample, or several models, A+B",
            statistic,
            found,
            metrics.get("reward/disagreement", 0.0),
        )
