"""Reward-weighted regression: maximum likelihood, each response weighted by its reward.

    z = (R - mean) / std                                       over the data set, std with n - 1
    w = min(exp(z / beta), weight_cap) / mean of that
    L = - sum over response tokens of w log pi(y_t | x, y_<t) / their number

There is no baseline besides the mean and no value function. A small beta leaves few responses that
count: the effective sample size (sum w)^2 / sum w^2 tells how many.

Sources: see `fastalign.losses.RWR`; 2308.12050 for language models.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastalign import losses
from fastalign.data.packing import Packed
from fastalign.losses import effective_sample_size
from fastalign.train.labels import FromLabels, LabelledConfig, load_labelled
from fastalign.train.run import Run, RunError, begin

log = logging.getLogger("fastalign")

FEW = 10  # an effective sample size below this is warned of


@dataclass
class RWRConfig(LabelledConfig):
    """Fine-tune on all responses, weighted by their rewards."""

    output: str = "runs/rwr"
    """Folder of the run; the model is written to OUTPUT/model."""
    beta: float = 1.0
    """Temperature of the weights exp(z / beta), in standard deviations of the reward: smaller
    listens to fewer responses."""
    weight_cap: float | None = 20.0
    """Largest exp(z / beta) that counts; null for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise RunError(f"expected beta > 0, got {self.beta}")
        if self.weight_cap is not None and not self.weight_cap > 0:
            raise RunError(f"expected weight_cap > 0, got {self.weight_cap}")


def warn_of_few(ess: float, n: int, of: str) -> None:
    if ess < FEW:
        log.warning(
            "the effective sample size is %.1f of %s %s: a few of them carry the whole gradient; "
            "raise --beta",
            *(ess, f"{n:,}", of),
        )


class RWR(FromLabels):
    """The weights of the responses are an input of the loss at each of their tokens."""

    name = "rwr"

    def backward(
        self, pack_: Packed, inputs: dict[str, Tensor], n_tokens: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        hidden, out = self.policy_loss(pack_, inputs, n_tokens)
        out.loss.backward()
        parts = {"loss": out.loss.detach(), "nll": -out.logp.sum() / n_tokens}
        return parts, {"hidden states": hidden, "weights": inputs["weights"]}

    def update(self, run: Run, step: int, batch: list[int]) -> dict[str, float]:
        weights = self.train.inputs["weights"][[self.train.starts[i] for i in batch]]
        metrics = super().update(run, step, batch)
        return metrics | {"ess": effective_sample_size(weights).item()}


def train(config: RWRConfig) -> Path:
    """Weighs and trains; the folder of the model."""
    begin(config)
    data = load_labelled(config)
    loss = losses.RWR(config.beta, config.weight_cap)
    weights = loss.weights(data.rewards)
    ess = effective_sample_size(weights).item()
    facts = {
        "samples": len(weights),
        "reward": data.rewards.mean().item(),
        "reward_std": data.rewards.std().item(),
        "ess": ess,
        "weight_max": weights.max().item(),
    }
    log.info("weights of %s responses: effective sample size %.1f", f"{len(weights):,}", ess)
    warn_of_few(ess, len(weights), "responses")
    held = loss.weights(
        data.held_out_rewards, mean=data.rewards.mean().item(), std=data.rewards.std().item()
    )
    for samples, w in ((data.train, weights), (data.held_out, held)):
        samples.inputs["weights"] = samples.per_token(w.float())
    return RWR(config, data, data.train, data.held_out, facts, loss).run()
