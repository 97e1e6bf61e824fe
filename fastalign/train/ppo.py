"""Proximal policy optimisation (Schulman et al., 1707.06347), with a critic and a KL penalty.

    ratio = pi(a|s) / pi_old(a|s),   pi_old being the policy that sampled
    L_PPO = -mean over sampled tokens of min(ratio Adv, clamp(ratio, 1 - clip, 1 + clip_high) Adv)
    L     = L_PPO + vf_coef * L_V - entropy_coef * mean entropy + ptx_coef * L_ptx

The KL to pi_init is a penalty on every token, either in the reward (--kl_in reward, as in
1909.08593: r_t = -kl_coef K_t, by k1, k2 or k3), or in the loss (--kl_in loss: + kl_coef K_t, and
there also the exact KL over the vocabulary). L_V = (V - R)^2 / 2, or with --value_clip the larger
of it and the same for V held near its old value. L_ptx is the negative log-likelihood of other
data, a batch of which is added to every update (InstructGPT's PPO-ptx, 2203.02155).

`--preset ppo-max` follows PPO-max (Zheng et al., 2307.04964). From the paper: rewards normalised by
their running moments and clipped, a penalty of .05 on every token, a critic that begins as the
reward model and learns before the policy does, values clipped at .2, lam .9, a language-model term,
gradients clipped by their global norm. It does not say where rewards are clipped, how long the
critic learns alone, what the language-model term weighs or where gradients are clipped: 5, 50
updates, 0.1 and 1 are this project's choices. Its learning rates, batches and sampling (top-p, a
repetition penalty) are no part of the preset. The script released with it differs from the paper:
it scales rewards without centring or clipping them, with lam .95 and no language-model term. An
option that is given overrides the preset.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import losses, ops
from fastalign.data import source
from fastalign.data.packing import pack, token_budget_batches
from fastalign.data.tokens import tokenize_completions
from fastalign.losses.ratio import EXACT
from fastalign.models import Policy
from fastalign.models.flops import training_flops
from fastalign.ops.kl_estimate import KINDS
from fastalign.streams import stream
from fastalign.train import distributed, online
from fastalign.train.actor_critic import ActorCritic, ActorCriticConfig
from fastalign.train.meter import Meter
from fastalign.train.online import UNSET, one_of
from fastalign.train.run import RunError, at_least, autocast

log = logging.getLogger("fastalign")

PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {
        "kl_coef": 0.05,
        "center_reward": False,
        "clip_reward": 10.0,
        "value_clip": 0.2,
        "critic": "trunk",
        "critic_steps": 0,
        "ptx_coef": 0.0,
        "lam": 0.95,
        "grad_clip": 1.0,
    },
    # Ours, where the paper gives no number: clip_reward, critic_steps, ptx_coef, grad_clip.
    "ppo-max": {
        "kl_coef": 0.05,
        "center_reward": True,
        "clip_reward": 5.0,
        "value_clip": 0.2,
        "critic": "reward",
        "critic_steps": 50,
        "ptx_coef": 0.1,
        "lam": 0.9,
        "grad_clip": 1.0,
    },
}


@dataclass
class PPOConfig(ActorCriticConfig):
    """Align a policy with a reward by proximal policy optimisation."""

    output: str = "runs/ppo"
    """Folder of the run; the aligned policy is written to OUTPUT/model."""
    preset: str = "ppo"
    """ppo, or ppo-max: what kl_coef, center_reward, clip_reward, value_clip, critic,
    critic_steps, ptx_coef, lam and grad_clip are where they are not given."""
    clip: float = 0.2
    """The ratio gains nothing below 1 - clip ..."""
    clip_high: float | None = None
    """... and above 1 + clip_high; by default clip."""
    dual_clip: float | None = None
    """Bound c > 1 of the loss of tokens with a negative advantage, -c Adv (1912.09729)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_in: str = "reward"
    """Where the KL penalty stands: reward or loss."""
    kl_coef: float = UNSET
    """Weight of the KL penalty to pi_init (where adaptive: at the beginning); 0: none."""
    kl_kind: str = "k1"
    """Its estimator on a token: k1, k2 or k3; in the loss also exact, over the vocabulary."""
    center_reward: bool = UNSET
    """Subtract the running mean of all rewards before they are scaled."""
    clip_reward: float = UNSET
    """Bound of the magnitude of a scaled reward; 0: none."""
    value_clip: float = UNSET
    """Values may move this far from what they were when the round was sampled; 0: no bound."""
    critic: str = UNSET
    """trunk, separate or reward: where the values come from."""
    critic_steps: int = UNSET
    """Updates of the critic alone on pi_init's own responses, before the first step."""
    lam: float = UNSET
    """Decay of GAE."""
    grad_clip: float = UNSET
    """Global gradient norm above which gradients are scaled down."""
    ptx_coef: float = UNSET
    """Weight of the language-model loss on ptx_data; 0: none."""
    ptx_data: str | None = None
    """Responses to imitate meanwhile: JSONL(.gz), Parquet, a folder, a hub id, or synthetic."""
    ptx_split: str | None = None
    """Split of ptx_data, where it has more than one."""
    ptx_limit: int | None = None
    """Use at most this many of its records."""
    ptx_tokens: int = 1024
    """Its tokens in one update."""

    def __post_init__(self) -> None:
        one_of(self, "preset", tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is UNSET:
                setattr(self, name, value)
        one_of(self, "kl_in", ("reward", "loss"))
        if self.kl_kind == EXACT and self.kl_in == "reward":
            raise RunError(
                "--kl_kind exact has a gradient and belongs into the loss: give --kl_in loss, or "
                f"one of {', '.join(KINDS)} for the reward"
            )
        if self.kl_in == "loss" and self.kl_coef == 0:
            raise RunError("--kl_in loss with --kl_coef 0 is no penalty: give a kl_coef > 0")
        super().__post_init__()
        at_least(self, 0, "clip", "clip_high", "ptx_coef")
        at_least(self, 1, "ptx_tokens", "ptx_limit")
        if not self.clip > 0 or not (self.dual_clip is None or self.dual_clip > 1):
            raise RunError(
                f"expected clip > 0 and dual_clip > 1, got {self.clip} and {self.dual_clip}"
            )
        if self.ptx_coef > 0 and self.ptx_data is None:
            preset = f" (of --preset {self.preset})" if self.preset != "ppo" else ""
            raise RunError(
                f"ptx_coef {self.ptx_coef:g}{preset} is the weight of a loss on --ptx_data, which "
                "is not given; give the data, or --ptx_coef 0"
            )
        if self.ptx_coef == 0 and self.ptx_data is not None:
            raise RunError("--ptx_data is used with a --ptx_coef > 0; it is 0")

    def kl_kinds(self) -> tuple[str, ...]:
        return (*KINDS, EXACT)


class PPO(ActorCritic):
    """What a token learns from: its advantage, and its log-prob when it was sampled."""

    name = "ppo"
    config: PPOConfig

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        self.kl_in_reward = config.kl_in == "reward"

    def loss(self, kl_coef: float) -> Any:
        config = self.config
        return losses.PPO(
            clip=config.clip,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            kl_coef=0.0 if self.kl_in_reward else kl_coef,
            kl_kind=config.kl_kind,
            entropy_coef=config.entropy_coef,
        )

    # --- the language-model term ------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, float]:
        ptx = {"loss/ptx": self.config.ptx_coef} if self.config.ptx_coef > 0 else {}
        return super().weights | ptx

    def prepare(self, tokenizer: Any, policy: Policy) -> None:
        config = self.config
        if config.ptx_data is None:
            return
        records, report = source.completions(
            config.ptx_data, config.ptx_split, None, config.ptx_limit
        )
        self.imitated = tokenize_completions(
            records, tokenizer, report, max_length=policy.max_length
        )
        log.info("%s", report)

    def inputs(self) -> dict[str, Any]:
        return {} if self.config.ptx_data is None else {"ptx_data": self.imitated}

    def also(self, policy: Policy, step: int, update: int, meter: Meter) -> dict[str, Tensor]:
        """The mean loss of `ptx_tokens` tokens of the other data, drawn anew for every update."""
        config = self.config
        if config.ptx_coef == 0:
            return {}
        lengths = [len(e.prompt) + len(e.completion) for e in self.imitated]
        draw = stream(config.seed, "ptx", step, update)
        batch = token_budget_batches(lengths, config.ptx_tokens, generator=draw)[0]
        n_targets = sum(len(self.imitated[i].completion) for i in batch)
        meter.count(flops=training_flops(policy, [lengths[i] for i in batch], n_targets))
        device = policy.head_weight.device
        total = torch.zeros((), device=device)
        for micro in distributed.micros(policy, batch, lengths, config.micro_tokens):
            examples = [self.imitated[i] for i in micro.rows]
            pack_ = pack(
                [e.prompt + e.completion for e in examples], [len(e.prompt) for e in examples]
            )
            pack_ = pack_.to(device)
            with autocast(device, config.dtype):
                hidden = policy.response_hidden(pack_)
                out = ops.linear_loss(
                    hidden,
                    policy.head_weight.to(hidden.dtype),
                    pack_.response_targets,
                    losses.MLE(),
                    {},
                    bias=policy.head_bias,
                    softcap=policy.softcap,
                    ignore_index=None,
                    normalizer=micro.divisor(n_targets),
                )
            (config.ptx_coef * out.loss).backward()
            total += out.loss.detach()
        return {"loss/ptx": total}


def train(config: PPOConfig) -> Path:
    """Aligns the policy and evaluates it before and after; the folder of the model."""
    return online.train(config, PPO(config))
