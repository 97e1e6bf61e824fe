"""Losses as objects: frozen dataclasses whose call is their reference mathematics in plain PyTorch.

    loss(logp, entropy, **inputs) -> float32 loss of every token, the shape of logp (float64 for
    float64)

``logp`` holds the log-probabilities in nats of the tokens that were chosen, ``entropy`` the
entropies in nats of the distributions they were drawn from (None where the loss has no entropy
term). ``inputs`` are named tensors of the shape of ``logp``; they are constants, the gradient flows
to ``logp`` and ``entropy`` only. ``required`` and ``optional`` say which names an object takes. The
caller sums or averages; so any callable of this form is a loss.

``ValueLoss`` has its own form, ``loss(values, returns, old_values)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.ops.kl_estimate import KINDS, kl_estimate_reference


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _constants(
    loss: object,
    logp: Tensor,
    inputs: dict[str, Tensor | None],
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The inputs that were given, detached; ValueError where they do not fit."""
    name = type(loss).__name__
    missing = [key for key in required if inputs.get(key) is None]
    if missing:
        raise ValueError(f"{name}: missing inputs: {', '.join(missing)}")
    unknown = [key for key in inputs if key not in required + optional]
    if unknown:
        raise ValueError(
            f"{name}: unknown inputs: {', '.join(unknown)}; "
            f"it takes {', '.join(required + optional)}"
        )
    constants = {}
    for key, tensor in inputs.items():
        if tensor is None:
            continue
        if tensor.shape != logp.shape:
            raise ValueError(
                f"{name}: expected {key} of the shape of logp, {tuple(logp.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        constants[key] = _wide(tensor.detach())
    return constants


def _require(condition: bool, loss: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{type(loss).__name__}: expected {expected}, got {loss}")


@dataclass(frozen=True)
class MLE:
    """Weighted maximum likelihood: supervised, filtered or reward-weighted fine-tuning.

        loss = -w * logp            dloss/dlogp = -w

    Inputs: ``weights`` w, optional (1 without it).
    """

    required = ()
    optional = ("weights",)

    def __call__(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        constants = _constants(self, logp, inputs, self.required, self.optional)
        return -constants["weights"] * _wide(logp) if "weights" in constants else -_wide(logp)


@dataclass(frozen=True)
class APA:
    """Advantage-induced policy alignment, the squared loss in the paper's form.

        e = logp - advantages / lambda_ - ref_logp
        loss = e^2                  dloss/dlogp = 2 e

    ``ref_logp`` is the log-probability under the initial policy, not under the one that sampled the
    tokens. With tokens sampled from the policy itself the fixed point is ref * exp(advantages /
    lambda_) / Z; a smaller lambda_ moves further from the initial policy. The authors' code uses
    lambda_ = 0.1 with whitened advantages.

    Inputs: ``advantages``, ``ref_logp``.

    Source: Zhu et al., "Fine-Tuning Language Models with Advantage-Induced Policy Alignment", arXiv
    2306.02231.
    """

    lambda_: float

    required = ("advantages", "ref_logp")
    optional = ()

    def __post_init__(self) -> None:
        _require(0.0 < self.lambda_ < math.inf, self, "lambda_ > 0 and finite")

    def __call__(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        constants = _constants(self, logp, inputs, self.required)
        target = constants["advantages"] / self.lambda_ + constants["ref_logp"]
        return (_wide(logp) - target).square()


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation with clipped ratios, and optional KL and entropy terms.

        ratio = exp(logp - old_logp)
        loss  = -min(ratio * A, clamp(ratio, 1 - clip, 1 + clip_high) * A)
                + kl_coef * kl(logp, ref_logp) - entropy_coef * entropy

        dloss/dlogp = -ratio * A where the min takes its first term, 0 where clipped,
                      + kl_coef * dkl/dlogp;    dloss/dentropy = -entropy_coef

    ``kl_kind`` is an estimator of ``fastalign.ops.kl_estimate``; ``clip_high`` None means ``clip``.

    Inputs: ``old_logp``, ``advantages``; ``ref_logp`` when kl_coef > 0.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347, equation
    7.
    """

    clip: float = 0.2
    clip_high: float | None = None
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        _require(0.0 < self.clip < math.inf, self, "clip > 0 and finite")
        _require(
            self.clip_high is None or 0.0 < self.clip_high < math.inf,
            self,
            "clip_high > 0 and finite, or None",
        )
        _require(0.0 <= self.kl_coef < math.inf, self, "kl_coef >= 0 and finite")
        _require(self.kl_kind in KINDS, self, f"kl_kind to be one of {', '.join(KINDS)}")
        _require(math.isfinite(self.entropy_coef), self, "a finite entropy_coef")

    @property
    def required(self) -> tuple[str, ...]:
        return ("old_logp", "advantages") + (("ref_logp",) if self.kl_coef > 0.0 else ())

    @property
    def optional(self) -> tuple[str, ...]:
        return () if self.kl_coef > 0.0 else ("ref_logp",)

    def __call__(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        constants = _constants(self, logp, inputs, self.required, self.optional)
        advantages = constants["advantages"]
        logp = _wide(logp)
        # The same function with the clip inside the exponential: exp of an unbounded log-ratio
        # would overflow in the branch that min() does not take, and send NaN through its gradient.
        log_ratio = logp - constants["old_logp"]
        upper = math.log1p(self.clip if self.clip_high is None else self.clip_high)
        lower = math.log1p(-self.clip) if self.clip < 1.0 else -math.inf
        log_ratio = torch.where(
            advantages >= 0.0, log_ratio.clamp(max=upper), log_ratio.clamp(min=lower)
        )
        loss = -torch.exp(log_ratio) * advantages
        if self.kl_coef > 0.0:
            kl = kl_estimate_reference(logp, constants["ref_logp"], self.kl_kind)
            loss = loss + self.kl_coef * kl
        if self.entropy_coef != 0.0:
            if entropy is None:
                raise ValueError("PPO: missing inputs: entropy (entropy_coef is not 0)")
            loss = loss - self.entropy_coef * _wide(entropy)
        return loss


@dataclass(frozen=True)
class ValueLoss:
    """Squared error of a critic, optionally clipped to a band around its old values.

        loss = 0.5 (V - R)^2
        with clip c:  0.5 max( (V - R)^2, (clamp(V, V_old - c, V_old + c) - R)^2 )

        dloss/dV = V - R, and 0 where the second term of the max is taken outside the band

    Source: the clipped form is that of the PPO code accompanying arXiv 1707.06347.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        _require(
            self.clip is None or 0.0 < self.clip < math.inf, self, "clip > 0 and finite, or None"
        )

    def __call__(self, values: Tensor, returns: Tensor, old_values: Tensor | None = None) -> Tensor:
        """Per-token loss of the shape of ``values``; the other two are constants."""
        for name, tensor in (("returns", returns), ("old_values", old_values)):
            if tensor is not None and tensor.shape != values.shape:
                raise ValueError(
                    f"ValueLoss: expected {name} of the shape of values, {tuple(values.shape)}, "
                    f"got {tuple(tensor.shape)}"
                )
        values, returns = _wide(values), _wide(returns.detach())
        loss = (values - returns).square()
        if self.clip is not None:
            if old_values is None:
                raise ValueError("ValueLoss: missing inputs: old_values (clip is set)")
            old = _wide(old_values.detach())
            clipped = torch.maximum(torch.minimum(values, old + self.clip), old - self.clip)
            loss = torch.maximum(loss, (clipped - returns).square())
        return 0.5 * loss
