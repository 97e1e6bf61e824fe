"""APA and AWR from given responses with rewards: advantages of data, not of samples.

    r_T = (R - mean) / std on a response's last token, 0 before        over the data set
    A, returns = GAE(r, V_init),  A whitened over the data set

    L_APA = mean over tokens of (log pi - A / lambda - log pi_init)^2             2306.02231
    L_AWR = mean over tokens of -min(exp(A / beta), weight_cap) log pi            1910.00177
    L     = L_APA or L_AWR  +  vf_coef * mean (V - return)^2 / 2

log pi_init and V_init are computed once; as in the code of 2306.02231 (`apa_off_hh.py`) the values
then stay what they were, and with a new value head they are 0. `refresh` computes them anew before
each epoch. Off-policy, APA's minimiser is not the normalised tilt pi_init exp(A / lambda) / Z that
it is on-policy: the tokens weigh as often as the data, not the policy, have them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import losses, ops
from fastalign.data.packing import Packed, token_budget_batches
from fastalign.losses import effective_sample_size
from fastalign.models.flops import forward_flops
from fastalign.train import distributed
from fastalign.train.kept import key_of
from fastalign.train.labels import (
    FromLabels,
    Labelled,
    LabelledConfig,
    load_labelled,
    standardised,
)
from fastalign.train.meter import Meter
from fastalign.train.optim import Optimizer
from fastalign.train.run import Run, RunError, Stateful, at_least, autocast, begin
from fastalign.train.rwr import warn_of_few
from fastalign.train.same_run import weights_digest
from fastalign.train.supervised import Samples

log = logging.getLogger("fastalign")


@dataclass
class OfflineConfig(LabelledConfig):
    """What both methods have."""

    gamma: float = 1.0
    """Discount of GAE."""
    lam: float = 0.95
    """Decay of GAE."""
    vf_coef: float = 1.0
    """Weight of the value loss."""
    whiten: bool = True
    """Whiten the advantages over the data set's response tokens."""
    refresh: bool = False
    """Compute values and advantages anew before each epoch, from the value head as it is then."""
    value_lr: float = 3e-3
    """Peak learning rate of the value head, which starts from nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "gamma", "lam", "vf_coef", "value_lr")
        if self.gamma > 1 or self.lam > 1:
            raise RunError(f"expected gamma <= 1 and lam <= 1, got {self.gamma} and {self.lam}")


@dataclass
class OfflineAPAConfig(OfflineConfig):
    """Advantage-Induced Policy Alignment on given responses with rewards."""

    output: str = "runs/apa-offline"
    """Folder of the run; the model is written to OUTPUT/model."""
    lambda_: float = 1.0
    """Temperature of the target pi_init exp(Adv / lambda): smaller moves further from pi_init."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lambda_ > 0:
            raise RunError(f"expected lambda_ > 0, got {self.lambda_}")


@dataclass
class OfflineAWRConfig(OfflineConfig):
    """Advantage-weighted regression on given responses with rewards."""

    output: str = "runs/awr-offline"
    """Folder of the run; the model is written to OUTPUT/model."""
    beta: float = 1.0
    """Temperature of the weights exp(Adv / beta): smaller listens to fewer tokens."""
    weight_cap: float | None = 20.0
    """Largest weight; null for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise RunError(f"expected beta > 0, got {self.beta}")
        if self.weight_cap is not None and not self.weight_cap > 0:
            raise RunError(f"expected weight_cap > 0, got {self.weight_cap}")


class Offline(FromLabels):
    """Advantages are inputs of the loss; the value head learns the returns beside it."""

    config: OfflineConfig
    # log pi must be that of pi_init's twin, and values those of the data.
    dropout = False

    def __init__(self, config: OfflineConfig, data: Labelled, method: str, loss: Any) -> None:
        self.name = method
        super().__init__(config, data, data.train, data.held_out, {}, loss)
        self.optimizer = Optimizer(
            config, self.policy, len(self.schedule), {"value_head": config.value_lr}
        )
        digest = weights_digest(self.policy)
        held_z = standardised(data.held_out_rewards, data.rewards)
        self.parts = [(data.train, standardised(data.rewards)), (data.held_out, held_z)]
        values = []
        for (samples, _), name in zip(self.parts, ("reference", "held_out_reference"), strict=True):
            compute = partial(self.look, samples, data.meter)
            found = data.kept.get(name, key_of(samples.examples, data.meter, model=digest), compute)
            samples.inputs["ref_logp"] = found["logp"]
            values.append(found["values"])
        self.set_advantages(values)
        self.facts = self.describe()

    @torch.no_grad()
    def look(self, samples: Samples, meter: Meter) -> dict[str, Tensor]:
        """fp32 [N] each: log-probs of the response tokens, and values of the states before them."""
        was_training = self.policy.training
        self.policy.eval()
        found = torch.empty(2, samples.starts[-1])
        with meter.phase("reference"):
            for batch in token_budget_batches(samples.lengths, self.config.micro_tokens):
                pack_, _ = samples.of(batch, self.device)
                rows = torch.cat([torch.arange(*samples.starts[i : i + 2]) for i in batch])
                found[:, rows] = torch.stack(self.forward(pack_)).cpu()
            flops = forward_flops(self.policy, samples.lengths, samples.starts[-1])
            meter.count(flops=flops)
        self.policy.train(was_training)
        return {"logp": found[0], "values": found[1]}

    def forward(self, pack_: Packed) -> tuple[Tensor, Tensor]:
        """fp32 [M] each: log-probs of the targets that count, and values."""
        with autocast(self.device, self.config.dtype):
            hidden = self.policy.response_hidden(pack_)
            logp = ops.linear_logprobs(
                hidden,
                self.policy.head_weight.to(hidden.dtype),
                pack_.response_targets,
                bias=self.policy.head_bias,
                softcap=self.policy.softcap,
                ignore_index=None,
            )
        return logp, self.policy.values(hidden)

    def set_advantages(self, values: list[Tensor]) -> None:
        """Advantages and returns of training and held-out samples from values [N] each."""
        config, found = self.config, []
        for (samples, z), value in zip(self.parts, values, strict=True):
            rewards = torch.zeros(samples.starts[-1])
            rewards[torch.tensor(samples.starts[1:], dtype=torch.int64) - 1] = z.float()
            bounds = torch.tensor(samples.starts, dtype=torch.int32)
            found.append(
                ops.gae(rewards, value, gamma=config.gamma, lam=config.lam, cu_seqlens=bounds)
            )
        of = found[0][0]
        mean, scale = of.mean(), torch.rsqrt(of.var() + 1e-8)
        for (samples, _), (advantages, returns) in zip(self.parts, found, strict=True):
            whitened = (advantages - mean) * scale if config.whiten else advantages
            samples.inputs |= {"advantages": whitened, "returns": returns}

    def weights(self, advantages: Tensor) -> Tensor | None:
        """AWR's, of tokens."""
        if not isinstance(self.loss, losses.AWR):
            return None
        return self.loss.statistics(advantages, None, advantages=advantages)["weight"]

    def describe(self) -> dict[str, float]:
        advantages = self.train.inputs["advantages"]
        facts = {
            "samples": len(self.train.examples),
            "reward": self.data.rewards.mean().item(),
            "reward_std": self.data.rewards.std().item(),
            "advantage_mean": advantages.mean().item(),
            "advantage_std": advantages.std().item(),
        }
        weights = self.weights(advantages)
        if weights is not None:
            facts["ess"] = effective_sample_size(weights).item()
            log.info("weights of %s tokens: effective sample size %.1f", len(weights), facts["ess"])
            warn_of_few(facts["ess"], len(weights), "tokens")
        return facts

    # --- a step -----------------------------------------------------------------------------------

    def update(self, run: Run, step: int, batch: list[int]) -> dict[str, float]:
        if self.config.refresh and step > 1 and self.begins_epoch(step):
            self.set_advantages([self.look(s, run.meter)["values"] for s, _ in self.parts])
        metrics = super().update(run, step, batch)
        weights = self.weights(
            torch.cat([self.train.inputs["advantages"][self.train.rows(i)] for i in batch])
        )
        if weights is not None:
            metrics["ess"] = effective_sample_size(weights).item()
        return metrics

    def begins_epoch(self, step: int) -> bool:
        return sum(map(len, self.schedule[: step - 1])) % len(self.train.examples) == 0

    def backward(
        self, pack_: Packed, inputs: dict[str, Tensor], n_tokens: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        taken = {name: inputs[name] for name in self.loss.required}
        hidden, out = self.policy_loss(pack_, taken, n_tokens)
        values = self.policy.values(hidden)
        critic = losses.ValueLoss()(values, inputs["returns"]).sum() / n_tokens
        loss = out.loss + self.config.vf_coef * critic
        loss.backward()
        parts = {"loss": loss.detach(), "loss/policy": out.loss.detach()}
        parts |= {"loss/value": critic.detach(), "entropy": out.entropy.sum() / n_tokens}
        parts |= {k: v / n_tokens for k, v in of_data(out.logp, inputs["ref_logp"]).items()}
        return parts, {**inputs, "hidden states": hidden, "logp": out.logp, "values": values}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On the held-out samples, of both losses and of the distance from pi_init."""
        was_training = self.policy.training
        self.policy.eval()
        sums: dict[str, Tensor] = {}
        count = self.held_out.starts[-1]
        for micro in distributed.looks(self.held_out.lengths, self.config.micro_tokens):
            pack_, inputs = self.held_out.of(micro.rows, self.device)
            logp, values = self.forward(pack_)
            taken = {name: inputs[name] for name in self.loss.required}
            parts = of_data(logp, inputs["ref_logp"])
            parts["loss/policy"] = self.loss(logp, None, **taken).sum()
            parts["loss/value"] = losses.ValueLoss()(values, inputs["returns"]).sum()
            for name, part in parts.items():
                sums[name] = sums.get(name, 0.0) + part.double() / micro.divisor(count)
        self.policy.train(was_training)
        numbers = distributed.total(torch.stack(list(sums.values()))).tolist()
        found: dict[str, float] = dict(zip(sums, numbers, strict=True))
        loss = found["loss/policy"] + self.config.vf_coef * found["loss/value"]
        return found | {"loss": loss}

    # --- resuming ---------------------------------------------------------------------------------

    def stateful(self) -> Stateful:
        found = super().stateful()
        if self.config.refresh:
            found.others["advantages"] = self
        return found

    def state_dict(self) -> dict[str, Any]:
        """What was refreshed: the policy it came from is gone."""
        names = ("advantages", "returns")
        return {str(k): {n: s.inputs[n] for n in names} for k, (s, _) in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for k, (samples, _) in enumerate(self.parts):
            samples.inputs |= state[str(k)]


def of_data(logp: Tensor, ref_logp: Tensor) -> dict[str, Tensor]:
    """Sums over tokens: nats, and the estimators of KL(pi || pi_init), k1 and k3, on tokens that
    the data have and neither policy drew; k1 may be below 0."""
    found = {"nll": -logp.sum()}
    for kind in ("k1", "k3"):
        found[f"data_kl/{kind}"] = ops.kl_estimate(logp, ref_logp, kind=kind).sum()
    return found


def train_apa(config: OfflineAPAConfig) -> Path:
    """Offline APA; the folder of the model."""
    begin(config)
    data = load_labelled(config, value_head=True)
    return Offline(config, data, "apa-offline", losses.APA(lambda_=config.lambda_)).run()


def train_awr(config: OfflineAWRConfig) -> Path:
    """Offline AWR; the folder of the model."""
    begin(config)
    data = load_labelled(config, value_head=True)
    return Offline(config, data, "awr-offline", losses.AWR(config.beta, config.weight_cap)).run()
