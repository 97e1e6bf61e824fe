"""Importance ratios and KL terms: what PPO and GRPO share.

    d = logp - old_logp,  ratio = exp(d)

A log-ratio above MAX_LOG_RATIO counts as MAX_LOG_RATIO, wherever it would be exponentiated: the
loss stays finite and is constant from there on, so its gradient is 0. (exp(20) = 4.9e8: at such a
distance from the policy that sampled the tokens a ratio says nothing any more.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastalign.losses.inputs import require, wide

MAX_LOG_RATIO = 20.0
KL_KINDS = ("k1", "k2", "k3")
# A KL that comes as a number for each token, over the whole vocabulary, with a gradient.
EXACT = "exact"


class Band(NamedTuple):
    """Bounds of the log-ratio."""

    lower: float
    """Tokens of negative advantage gain nothing below it."""
    upper: float
    """Tokens of positive advantage gain nothing above it."""
    most: float
    """Tokens of negative advantage lose nothing more above it (dual clip)."""


def log_band(clip: float, clip_high: float | None, dual_clip: float | None) -> Band:
    """The band [1 - clip, 1 + clip_high] of ratios, and dual_clip, as log-ratios."""
    return Band(
        lower=math.log1p(-clip) if clip < 1.0 else -math.inf,
        upper=min(math.log1p(clip if clip_high is None else clip_high), MAX_LOG_RATIO),
        most=MAX_LOG_RATIO if dual_clip is None else min(math.log(dual_clip), MAX_LOG_RATIO),
    )


def bounded(log_ratio: Tensor, advantages: Tensor, band: Band) -> Tensor:
    """The log-ratio whose exponential takes the place of PPO's minimum of two products.

    -min(ratio A, clamp(ratio) A) is -exp(bounded) A. The clip inside the exponential, because exp
    of an unbounded log-ratio would overflow in the branch that min() does not take, and send NaN
    through its gradient.
    """
    return torch.where(
        advantages >= 0.0,
        log_ratio.clamp(max=band.upper),
        log_ratio.clamp(min=band.lower, max=band.most),
    )


def is_clipped(log_ratio: Tensor, advantages: Tensor, band: Band) -> Tensor:
    """1 where the bound holds a token's gradient at 0, else 0."""
    moved = bounded(log_ratio, advantages, band) != log_ratio
    return (moved & (advantages != 0.0)).to(log_ratio.dtype)


def ratio(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.clamp(max=MAX_LOG_RATIO))


def kl(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """With d = ref_logp - logp: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d, d <= MAX_LOG_RATIO."""
    d = ref_logp - logp
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d.square()
    d = d.clamp(max=MAX_LOG_RATIO)
    # exp(d) - 1 would lose every digit for the small d of a policy near its reference.
    return torch.expm1(d) - d


def check_coefficients(
    loss: object,
    clip: float | None,
    clip_high: float | None,
    dual_clip: float | None,
    kl_coef: float,
    kl_kind: str,
    entropy_coef: float,
) -> None:
    """ValueError for the parameters that PPO and GRPO have in common."""
    require(clip is None or 0.0 < clip < math.inf, loss, "clip > 0 and finite")
    require(
        clip_high is None or 0.0 < clip_high < math.inf, loss, "clip_high > 0 and finite, or None"
    )
    require(
        dual_clip is None or 1.0 < dual_clip < math.inf, loss, "dual_clip > 1 and finite, or None"
    )
    require(0.0 <= kl_coef < math.inf, loss, "kl_coef >= 0 and finite")
    kinds = (*KL_KINDS, EXACT)
    require(kl_kind in kinds, loss, f"kl_kind to be one of {', '.join(kinds)}")
    require(math.isfinite(entropy_coef), loss, "a finite entropy_coef")


class Regularised(Protocol):
    """A loss with a KL and an entropy term."""

    @property
    def kl_coef(self) -> float: ...

    @property
    def kl_kind(self) -> str: ...

    @property
    def entropy_coef(self) -> float: ...


def kl_inputs(loss: Regularised) -> tuple[str, ...]:
    """What the KL term needs: the reference's log-probs, the KL itself, or nothing."""
    if loss.kl_coef == 0.0:
        return ()
    return ("kl",) if loss.kl_kind == EXACT else ("ref_logp",)


def exact_kl_coef(loss: object) -> float:
    """dloss/dkl of a loss that takes ``kl``, 0 of any other."""
    return getattr(loss, "kl_coef", 0.0) if getattr(loss, "kl_kind", None) == EXACT else 0.0


def regularised(
    loss: Regularised,
    policy: Tensor,
    logp: Tensor,
    found: Mapping[str, Tensor],
    entropy: Tensor | None,
) -> Tensor:
    """policy + kl_coef * kl - entropy_coef * entropy, the terms whose coefficient is not 0."""
    if loss.kl_coef > 0.0:
        exact = loss.kl_kind == EXACT
        term = found["kl"] if exact else kl(logp, found["ref_logp"], loss.kl_kind)
        policy = policy + loss.kl_coef * term
    if loss.entropy_coef != 0.0:
        if entropy is None:
            name = type(loss).__name__
            raise ValueError(f"{name}: missing inputs: entropy (entropy_coef is not 0)")
        policy = policy - loss.entropy_coef * wide(entropy)
    return policy
