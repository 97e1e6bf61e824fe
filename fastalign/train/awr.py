"""Advantage-weighted regression (Peng et al., 1910.00177).

    w     = min(exp(Adv / beta), weight_cap)
    L_AWR = -mean over sampled tokens of w log pi(a|s)
    L     = L_AWR + vf_coef * mean of (V(s) - return)^2 / 2

A supervised loss on the policy's own tokens: no ratio, no clip, nothing that knows pi_init (a KL
penalty in the reward, --kl_coef, does). Its minimiser is the policy that sampled, tilted by
exp(Adv / beta), so it moves on from round to round.

The weights average to more than 1, and few large ones can carry the whole gradient: `weight/ess` is
the effective sample size (sum w)^2 / sum w^2 as a share of the update's tokens, `weight/capped` the
share that the cap holds.

microsoft/RLHF-APA has beta = 2 (whitened advantages times 0.5) and no cap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import losses
from fastalign.train import online
from fastalign.train.actor_critic import ActorCritic, ActorCriticConfig
from fastalign.train.run import RunError, at_least


@dataclass
class AWRConfig(ActorCriticConfig):
    """Align a policy with a reward by advantage-weighted regression."""

    output: str = "runs/awr"
    """Folder of the run; the aligned policy is written to OUTPUT/model."""
    beta: float = 1.0
    """Temperature of the weights exp(Adv / beta): smaller trusts fewer, better tokens."""
    weight_cap: float = 20.0
    """Largest weight; 0: no bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "beta", "weight_cap")
        if self.beta == 0:
            raise RunError("expected beta > 0, got 0")


class AWR(ActorCritic):
    """What a token learns from: the weight of its advantage."""

    name = "awr"
    config: AWRConfig

    def loss(self, kl_coef: float) -> Any:
        return losses.AWR(self.config.beta, self.config.weight_cap or None)

    def of_update(
        self, rows: dict[str, list[Tensor]]
    ) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
        rows, metrics = super().of_update(rows)
        log_weights = torch.cat(rows["advantages"]) / self.config.beta
        if self.config.weight_cap:
            log_weights = log_weights.clamp(max=math.log(self.config.weight_cap))
        ess = losses.effective_sample_size(log_weights, logs=True)
        return rows, metrics | {"weight/ess": ess.item() / len(log_weights)}


def train(config: AWRConfig) -> Path:
    """Aligns the policy and evaluates it before and after; the folder of the model."""
    return online.train(config, AWR(config))
