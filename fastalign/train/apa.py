"""Advantage-Induced Policy Alignment (2306.02231, squared form).

    L_APA = mean over sampled tokens of (log pi(a|s) - Adv(s, a) / lambda - log pi_init(a|s))^2
    L     = L_APA + vf_coef * mean of (V(s) - return)^2 / 2

Tokens are sampled from pi; Adv is whitened. There is no ratio, no clip and (unless --kl_coef asks
for one) no KL penalty: pi_init is in the regression's target. On-policy, its fixed point is
pi_init exp(Adv / lambda) / Z.

`--form repo` is the authors' code (microsoft/RLHF-APA): the coefficient on the other side,
log pi - lambda * Adv - log pi_init with lambda = 10, and Adv whitened over each update's matrix of
responses padded with zeros. Its critic is a network of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign import losses
from fastalign.losses.apa import FORMS
from fastalign.train import online
from fastalign.train.actor_critic import ActorCritic, ActorCriticConfig
from fastalign.train.online import UNSET
from fastalign.train.run import RunError, at_least


@dataclass
class APAConfig(ActorCriticConfig):
    """Align a policy with a reward by Advantage-Induced Policy Alignment."""

    output: str = "runs/apa"
    """Folder of the run; the aligned policy is written to OUTPUT/model."""
    lambda_: float = 1.0
    """Temperature of the target pi_init exp(Adv / lambda): smaller moves further from pi_init. In
    the repo form the target is pi_init exp(lambda Adv)."""
    form: str = "paper"
    """paper, or repo: the authors' code."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise RunError(f"unknown form {self.form!r}: expected one of {', '.join(FORMS)}")
        if self.form == "repo" and self.whiten and self.whiten_over is UNSET:
            self.whiten_over = "padded"
        super().__post_init__()
        at_least(self, 0, "lambda_")
        if self.lambda_ == 0:
            raise RunError("expected lambda_ > 0, got 0")


class APA(ActorCritic):
    """What a token learns from: its advantage and pi_init's log-prob."""

    name = "apa"
    config: APAConfig

    def loss(self, kl_coef: float) -> Any:
        return losses.APA(self.config.lambda_, self.config.form)


def train(config: APAConfig) -> Path:
    """Aligns the policy and evaluates it before and after; the folder of the model."""
    return online.train(config, APA(config))
