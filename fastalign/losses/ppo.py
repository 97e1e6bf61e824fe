"""Proximal policy optimisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.losses.inputs import constants, wide
from fastalign.losses.ratio import (
    bounded,
    check_coefficients,
    is_clipped,
    kl_inputs,
    log_band,
    ratio,
    regularised,
)


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation with clipped ratios, and optional KL and entropy terms.

        ratio  = exp(logp - old_logp)
        policy = -min(ratio * A, clamp(ratio, 1 - clip, 1 + clip_high) * A)
        with dual_clip c, where A < 0:  policy = min(policy, -c * A)
        loss   = policy + kl_coef * kl(logp, ref_logp) - entropy_coef * entropy

        dloss/dlogp = -ratio * A where no bound is active, else 0,
                      + kl_coef * dkl/dlogp;    dloss/dentropy = -entropy_coef

    kl is k1 = logp - ref_logp, k2 = k1^2 / 2 or k3 = exp(-k1) - 1 + k1 (``kl_kind``), which know of
    the token drawn only; or with "exact" the input ``kl`` itself, KL(policy || reference) over the
    whole vocabulary, as linear_loss makes it of the reference's hidden states: dloss/dkl = kl_coef.
    ``clip_high`` None means ``clip``. Log-ratios above 20 count as 20: the loss stays finite
    whatever the inputs, with gradient 0 from there on.

    Inputs: ``old_logp``, ``advantages``; when kl_coef > 0 ``ref_logp``, or ``kl`` for "exact" (the
    only input with a gradient).

    Source: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347, equation
    7; dual clip: Ye et al., arXiv 1912.09729, equation 5; clip_high: Yu et al., arXiv 2503.14476.
    """

    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        check_coefficients(
            self,
            self.clip,
            self.clip_high,
            self.dual_clip,
            self.kl_coef,
            self.kl_kind,
            self.entropy_coef,
        )

    @property
    def required(self) -> tuple[str, ...]:
        return ("old_logp", "advantages", *kl_inputs(self))

    @property
    def optional(self) -> tuple[str, ...]:
        return () if "ref_logp" in kl_inputs(self) else ("ref_logp",)

    def __call__(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        found = constants(self, logp, inputs, self.required, self.optional)
        logp, advantages = wide(logp), found["advantages"]
        band = log_band(self.clip, self.clip_high, self.dual_clip)
        policy = -torch.exp(bounded(logp - found["old_logp"], advantages, band)) * advantages
        return regularised(self, policy, logp, found, entropy)

    def statistics(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Of every token: "ratio"; "clip_fraction", 1 where a bound holds the gradient at 0."""
        found = constants(self, logp, inputs, self.required, self.optional)
        log_ratio = wide(logp).detach() - found["old_logp"]
        band = log_band(self.clip, self.clip_high, self.dual_clip)
        clipped = is_clipped(log_ratio, found["advantages"], band)
        return {"ratio": ratio(log_ratio), "clip_fraction": clipped}
