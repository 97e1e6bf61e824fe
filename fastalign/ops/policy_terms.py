"""The losses of fastalign.losses in the one form that the kernels of ``policy_loss`` take.

Five kinds of per-token loss v, with slope g = dv/dlogp; d = logp - old_logp is the log-ratio:

    kind     v                                          g
    mle      -w logp                                    -w             w: weights, or 1
    apa      e^2,  e = logp - scale A - ref_logp        2 e
    awr      -w logp,  w = exp(min(scale A, upper))     -w             scale: 1 / beta
    clip     -exp(b) A                                  v if b = d, else 0
             b = min(d, upper) where A >= 0, else min(max(d, lower), most)
    cispo    -w A logp,  w = exp(clamp(d, lower, upper))    -w A

"clip" is PPO and GRPO's grpo, dr_grpo and dapo; for gspo d is the mean log-ratio of the sequence.
"clip" and "cispo" may add, with k = logp - ref_logp (see ``fastalign.losses.ratio``):

    + kl_coef kl,  kl = k, k^2 / 2 or exp(-k) - 1 + k       slope 1, k or 1 - exp(-k)
    - entropy_coef H                                        dv/dH = -entropy_coef

(an exact KL, a number of each token, is added outside the kernels: slope kl_coef by itself)

and a critic's loss, ``fastalign.losses.ValueLoss``, may stand beside it (or alone, kind "none"):

    + vf_coef / 2 (V - R)^2, with a band: the larger of this and that of V clamped to the band
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastalign.losses.apa import APA
from fastalign.losses.awr import AWR
from fastalign.losses.grpo import GRPO
from fastalign.losses.mle import MLE
from fastalign.losses.ppo import PPO
from fastalign.losses.ratio import KL_KINDS, MAX_LOG_RATIO, log_band
from fastalign.losses.rwr import RWR

T = TypeVar("T")
FUSED = (MLE, RWR, APA, AWR, PPO, GRPO)
KINDS = ("none", "mle", "apa", "awr", "clip", "cispo")
KLS = ("none", *KL_KINDS)
# What is summed over the tokens that count, in the kernels' order; policy and value are scaled.
COLUMNS = (
    "policy",
    "value",
    "count",
    "ratio",
    "clip_fraction",
    "weight",  # apa: the residual e
    "weight_squared",
    "entropy",
    "ref_k1",
    "ref_k2",
    "ref_k3",
    "old_k1",
    "old_k2",
    "old_k3",
    "value_clip_fraction",
)


class Form(NamedTuple):
    """One loss: indices into KINDS and KLS, and the coefficients of the table above."""

    kind: int = 0
    kl: int = 0
    scale: float = 0.0
    lower: float = 0.0
    upper: float = 0.0
    most: float = 0.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    vf_coef: float = 0.0
    value_clip: float = 0.0  # 0: no band


class Tokens(NamedTuple):
    """Flat tensors [N], in one dtype (mask: bool, scale: [S] with N a multiple of S); what is None
    is not read."""

    logp: Tensor | None = None
    entropy: Tensor | None = None
    advantages: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    weights: Tensor | None = None
    log_ratio: Tensor | None = None  # takes the place of logp - old_logp in "clip": gspo
    values: Tensor | None = None
    returns: Tensor | None = None
    old_values: Tensor | None = None
    mask: Tensor | None = None
    scale: Tensor | None = None

    @property
    def leading(self) -> Tensor:
        """The tensor whose shape, dtype and device the others share."""
        found = self.values if self.logp is None else self.logp
        assert found is not None
        return found


def form_of(loss: Any) -> Form | None:
    """The form of a loss object, None for any other callable (subclasses have their own maths)."""
    return kept(_form)(loss) if type(loss) in FUSED else None


def kept(f: Callable[..., T]) -> Callable[..., T]:
    """``f`` with a cache, but not while compiling: torch.compile warns of caches."""
    return f if torch.compiler.is_compiling() else _cached(f)


@lru_cache
def _cached(f: Callable[..., T]) -> Callable[..., T]:
    return lru_cache(maxsize=256)(f)


def _form(loss: Any) -> Form:
    if isinstance(loss, MLE):
        return Form(KINDS.index("mle"))
    if isinstance(loss, APA):
        scale = 1.0 / loss.lambda_ if loss.form == "paper" else loss.lambda_
        return Form(KINDS.index("apa"), scale=scale)
    if isinstance(loss, AWR):
        upper = math.inf if loss.weight_cap is None else math.log(loss.weight_cap)
        return Form(KINDS.index("awr"), scale=1.0 / loss.beta, upper=upper)
    if isinstance(loss, PPO):
        kind, band = "clip", log_band(loss.clip, loss.clip_high, loss.dual_clip)
    else:
        kind, band = "cispo" if loss.variant == "cispo" else "clip", loss.band
    # An exact KL is a number that every token brings, not a function of its log-prob: see
    # ``fastalign.losses.ratio.exact_kl_coef``.
    estimated = loss.kl_coef > 0.0 and loss.kl_kind in KL_KINDS
    return Form(
        KINDS.index(kind),
        KLS.index(loss.kl_kind) if estimated else 0,
        lower=band.lower,
        upper=band.upper,
        most=band.most,
        kl_coef=loss.kl_coef if estimated else 0.0,
        entropy_coef=loss.entropy_coef,
    )


class Terms(NamedTuple):
    """Per-token results of ``terms_reference``; what does not apply is 0."""

    policy: Tensor
    slope: Tensor
    value: Tensor
    value_slope: Tensor
    columns: dict[str, Tensor]


def terms_reference(form: Form, x: Tokens) -> Terms:
    """The table above in plain PyTorch, without reductions; mask and scale are not looked at."""
    zero = torch.zeros_like(x.leading)
    policy, slope, value, value_slope = zero, zero, zero, zero
    columns: dict[str, Tensor] = {}
    if x.logp is not None:
        policy, slope, columns = _policy_terms(form, x, x.logp)
    if x.values is not None:
        assert x.returns is not None
        error = x.values - x.returns
        held = torch.zeros_like(zero, dtype=torch.bool)
        worst = error
        if form.value_clip:
            assert x.old_values is not None
            low, high = x.old_values - form.value_clip, x.old_values + form.value_clip
            in_band = torch.maximum(torch.minimum(x.values, high), low) - x.returns
            held = in_band.square() > error.square()
            worst = torch.where(held, in_band, error)
        value, value_slope = 0.5 * worst.square(), torch.where(held, 0.0, error)
        columns["value_clip_fraction"] = held.to(zero.dtype)
    return Terms(policy, slope, value, form.vf_coef * value_slope, columns)


def _policy_terms(form: Form, x: Tokens, logp: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    kind = KINDS[form.kind]
    columns = _gaps(x, logp)
    log_ratio = x.log_ratio
    if log_ratio is None and x.old_logp is not None:
        log_ratio = logp - x.old_logp
    if log_ratio is not None:
        columns["ratio"] = torch.exp(log_ratio.clamp(max=MAX_LOG_RATIO))
    if kind == "mle":
        weight = torch.ones_like(logp) if x.weights is None else x.weights
        policy, slope = -weight * logp, -weight
    elif kind == "apa":
        assert x.advantages is not None and x.ref_logp is not None
        weight = logp - (form.scale * x.advantages + x.ref_logp)
        policy, slope = weight.square(), 2.0 * weight
    elif kind == "awr":
        assert x.advantages is not None
        scaled = form.scale * x.advantages
        weight = torch.exp(scaled.clamp(max=form.upper))
        policy, slope = -weight * logp, -weight
        columns["clip_fraction"] = (scaled > form.upper).to(logp.dtype)
    elif kind == "cispo":
        assert x.advantages is not None and log_ratio is not None
        inside = log_ratio.clamp(form.lower, form.upper)
        weight = torch.exp(inside)
        policy, slope = -weight * x.advantages * logp, -weight * x.advantages
        columns["clip_fraction"] = (inside != log_ratio).to(logp.dtype)
    else:
        assert x.advantages is not None and log_ratio is not None
        inside = torch.where(
            x.advantages >= 0.0,
            log_ratio.clamp(max=form.upper),
            log_ratio.clamp(form.lower, form.most),
        )
        weight = torch.exp(inside)
        policy = -weight * x.advantages
        held = inside != log_ratio
        slope = torch.where(held, 0.0, policy)
        columns["clip_fraction"] = (held & (x.advantages != 0.0)).to(logp.dtype)
    columns |= {"weight": weight, "weight_squared": weight.square()}
    if form.kl:
        assert x.ref_logp is not None
        policy = policy + form.kl_coef * columns[f"ref_{KLS[form.kl]}"]
        slope = slope + form.kl_coef * _kl_slope(logp - x.ref_logp, KLS[form.kl])
    if form.entropy_coef:
        assert x.entropy is not None
        policy = policy - form.entropy_coef * x.entropy
    return policy, slope, columns


def _gaps(x: Tokens, logp: Tensor) -> dict[str, Tensor]:
    """k1, k2, k3 to the reference and to the old policy, and the entropy, where they are given."""
    columns = {} if x.entropy is None else {"entropy": x.entropy}
    for name, other in (("ref", x.ref_logp), ("old", x.old_logp)):
        if other is not None:
            d = other - logp
            near = d.clamp(max=MAX_LOG_RATIO)
            columns[f"{name}_k1"], columns[f"{name}_k2"] = -d, 0.5 * d.square()
            columns[f"{name}_k3"] = torch.expm1(near) - near
    return columns


def _kl_slope(k: Tensor, kind: str) -> Tensor:
    if kind == "k1":
        return torch.ones_like(k)
    if kind == "k2":
        return k
    return torch.where(k < -MAX_LOG_RATIO, 0.0, -torch.expm1(-k))
