"""Advantage-induced policy alignment."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fastalign.losses.inputs import constants, require, wide

FORMS = ("paper", "repo")


@dataclass(frozen=True)
class APA:
    """Advantage-induced policy alignment, the squared loss.

        e = logp - advantages / lambda_ - ref_logp        form "paper"
        e = logp - lambda_ * advantages - ref_logp        form "repo"
        loss = e^2                  dloss/dlogp = 2 e

    ``ref_logp`` is the log-probability under the initial policy, not under the one that sampled the
    tokens. With tokens sampled from the policy itself the fixed point is ref * exp(advantages /
    lambda_) / Z; a smaller lambda_ of the paper's form moves further from the initial policy.

    The authors' code has the coefficient on the other side, ``adv_coeff_sq`` = 10, with whitened
    advantages: APA(10, form="repo") is APA(0.1). Its name for ``ref_logp`` is old_logprobs, but
    what it stores there are the initial model's. It averages over all tokens of a batch
    (``token_mean``), and neither clips nor puts a KL penalty into the reward.

    Inputs: ``advantages``, ``ref_logp``.

    Source: Zhu et al., "Fine-Tuning Language Models with Advantage-Induced Policy Alignment", arXiv
    2306.02231, and its code, microsoft/RLHF-APA.
    """

    lambda_: float
    form: str = "paper"

    required = ("advantages", "ref_logp")
    optional = ()

    def __post_init__(self) -> None:
        require(0.0 < self.lambda_ < math.inf, self, "lambda_ > 0 and finite")
        require(self.form in FORMS, self, f"form to be one of {', '.join(FORMS)}")

    def __call__(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        return self._residual(logp, inputs).square()

    def statistics(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Of every token: "residual" e."""
        return {"residual": self._residual(logp.detach(), inputs)}

    def _residual(self, logp: Tensor, inputs: dict[str, Tensor | None]) -> Tensor:
        found = constants(self, logp, inputs, self.required)
        advantages = found["advantages"]
        step = advantages / self.lambda_ if self.form == "paper" else self.lambda_ * advantages
        return wide(logp) - (step + found["ref_logp"])
