"""Group-relative policy optimisation and its relatives: no critic.

    A     = (r - mean of the prompt's r) / (std of the prompt's r + 1e-4), the same for all tokens
            of a response; dr_grpo does not divide
    ratio = pi(a|s) / pi_old(a|s)
    L     = -min(ratio A, clamp(ratio, 1 - clip, 1 + clip_high) A) + kl_coef * K(pi, pi_init)
            - entropy_coef * entropy

--variant says how tokens are clipped and averaged, and what else its authors do:

    grpo     clip .2, .2        mean over a response, then over responses   kl_coef .04 (k3)
    dr_grpo  clip .2, .2        sum over max_new_tokens and responses       no KL
    dapo     clip .2, .28       mean over tokens; prompts whose responses   no KL
                                are all worth the same are left out
    cispo    weight up to 1+4   mean over tokens; clipped tokens learn too  no KL
    gspo     clip 3e-4, 4e-4    one ratio per response, mean over them      no KL

A prompt whose responses all have the same reward teaches nothing (A = 0). `groups/flat` is the
share of such prompts; --drop_flat takes them out of the update, so that they do not dilute its
mean. --drop_unfinished takes out responses that were cut off at max_new_tokens, once the advantages
are known (the overlong filter of DAPO).

Sources: Shao et al., 2402.03300; dr_grpo: Liu et al., 2503.20783; dapo: Yu et al., 2503.14476;
cispo: MiniMax-M1, 2506.13585; gspo: Zheng et al., 2507.18071.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import losses
from fastalign.losses.grpo import VARIANTS
from fastalign.losses.ratio import EXACT
from fastalign.ops.kl_estimate import KINDS
from fastalign.train import online
from fastalign.train.experience import Experience
from fastalign.train.guards import flat
from fastalign.train.online import UNSET, Method, OnlineConfig, Signal, one_of
from fastalign.train.run import RunError, at_least


@dataclass
class GRPOConfig(OnlineConfig):
    """Align a policy with a reward by group-relative policy optimisation, without a critic."""

    output: str = "runs/grpo"
    """Folder of the run; the aligned policy is written to OUTPUT/model."""
    variant: str = "grpo"
    """grpo, dr_grpo, dapo, cispo or gspo."""
    samples_per_prompt: int = 8
    """Responses to each prompt: the group whose mean is the baseline."""
    epochs: int = 1
    """Passes over a round's responses."""
    clip: float | None = None
    """The ratio gains nothing below 1 - clip ..."""
    clip_high: float | None = None
    """... and above 1 + clip_high; both by default as the variant has them."""
    dual_clip: float | None = None
    """Bound c > 1 of the loss of tokens with a negative advantage, -c A (not for cispo)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_coef: float = UNSET
    """Weight of the KL to pi_init in the loss (where adaptive: at the beginning); 0: none. By
    default 0.04 for grpo, 0 for the others."""
    kl_kind: str = "k3"
    """Its estimator on a token: k1, k2, k3, or exact, over the vocabulary."""
    drop_flat: bool = UNSET
    """Leave out prompts whose responses all have the same reward; by default for dapo only."""
    drop_unfinished: bool = False
    """Leave out responses that were cut off."""

    def __post_init__(self) -> None:
        one_of(self, "variant", tuple(VARIANTS))
        if self.kl_coef is UNSET:
            self.kl_coef = 0.04 if self.variant == "grpo" else 0.0
        if self.drop_flat is UNSET:
            self.drop_flat = self.variant == "dapo"
        super().__post_init__()
        if self.samples_per_prompt < 2:
            raise RunError(
                "grpo compares the responses to one prompt, so it needs a --samples_per_prompt of "
                f"at least 2; got {self.samples_per_prompt}"
            )
        at_least(self, 0, "clip", "clip_high")
        if self.clip == 0 or not (self.dual_clip is None or self.dual_clip > 1):
            raise RunError(
                f"expected clip > 0 and dual_clip > 1, got {self.clip} and {self.dual_clip}"
            )
        if self.variant == "cispo" and self.dual_clip is not None:
            raise RunError("--dual_clip bounds a loss that --variant cispo does not have")

    def kl_kinds(self) -> tuple[str, ...]:
        return (*KINDS, EXACT)


class GRPO(Method):
    """What a token learns from: how much better its response was than its prompt's others."""

    name = "grpo"

    def __init__(self, config: GRPOConfig) -> None:
        self.config = config

    def loss(self, kl_coef: float) -> Any:
        config = self.config
        return losses.GRPO(
            config.variant,
            config.clip,
            config.clip_high,
            config.dual_clip,
            kl_coef,
            config.kl_kind,
            config.entropy_coef,
        )

    def signal(self, found: Experience, values: Tensor | None, kl_coef: float) -> Signal:
        config = self.config
        rewards = found.proxy.reshape(-1, config.samples_per_prompt)
        of_response, same = group_advantages(rewards, divide=config.variant != "dr_grpo")
        lengths = found.cu_seqlens.diff().long()
        tokens = {
            "advantages": of_response.flatten().repeat_interleave(lengths),
            "old_logp": found.logp,
            "ref_logp": found.ref_logp,
        }
        dropped = torch.zeros(len(lengths), dtype=torch.bool)
        if config.drop_flat:
            dropped |= same.repeat_interleave(config.samples_per_prompt)
        if config.drop_unfinished:
            dropped |= ~found.finished
        metrics = {
            "advantage/std": of_response.std().item(),
            "groups/flat": same.double().mean().item(),
            "groups/dropped": dropped.double().mean().item(),
        }
        return Signal(tokens, metrics, (~dropped).nonzero()[:, 0].tolist())


def group_advantages(rewards: Tensor, *, divide: bool) -> tuple[Tensor, Tensor]:
    """Advantages over the mean of each row, and which rows are flat.

    Args:
        rewards: [G, n], the responses to one prompt in each row.
        divide: by the row's standard deviation (unbiased) + 1e-4.

    Returns:
        [G, n], 0 in flat rows, and bool [G].
    """
    same = flat(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    if divide:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-4)
    return centred.masked_fill(same[:, None], 0.0), same


def train(config: GRPOConfig) -> Path:
    """Aligns the policy and evaluates it before and after; the folder of the model."""
    return online.train(config, GRPO(config))
