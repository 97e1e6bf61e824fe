"""Filtered maximum likelihood, the "filtering alignment" of 2308.12050.

    L = - mean over the response tokens of { (x, y) : R(x, y) > t } of log pi(y_t | x, y_<t)

t is such that at most the share `keep` of all responses is above it, or of those to each prompt, or
it is given in standard deviations from the mean. Responses of the same reward stay or go together.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastalign.train.labels import (
    FromLabels,
    LabelledConfig,
    load_labelled,
    standardised,
)
from fastalign.train.run import RunError, begin
from fastalign.train.supervised import Samples

log = logging.getLogger("fastalign")

FILTERS = ("global", "per_prompt")


@dataclass
class MLEConfig(LabelledConfig):
    """Fine-tune on the responses with the highest rewards."""

    output: str = "runs/mle"
    """Folder of the run; the model is written to OUTPUT/model."""
    keep: float = 0.3
    """Keep at most this share of the responses, those of the highest rewards."""
    filter: str = "global"
    """Of what --keep is a share: global (all responses; prompts whose responses are all poor are
    lost, and counted), or per_prompt (those to each prompt, of which at least the best stays)."""
    threshold: float | None = None
    """Instead of --keep: responses whose reward is more than this many standard deviations above
    the mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise RunError(f"expected 0 < keep <= 1, got {self.keep}")
        if self.filter not in FILTERS:
            raise RunError(f"unknown filter {self.filter!r}: expected {' or '.join(FILTERS)}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise RunError(f"expected a finite threshold, got {self.threshold}")
        if self.threshold is not None and self.filter == "per_prompt":
            raise RunError("--threshold is one for all prompts: --filter per_prompt contradicts it")


def threshold_of(rewards: Tensor, keep: float) -> float:
    """The smallest t with at most `keep` of the rewards above it; -inf where all may stay."""
    allowed = math.floor(keep * len(rewards) + 1e-9)
    ordered = rewards.sort(descending=True).values
    return ordered[allowed].item() if allowed < len(rewards) else -math.inf


def best_of_prompts(rewards: Tensor, prompts: list[tuple[int, ...]], keep: float) -> Tensor:
    """bool [S]: which responses are among the best `keep` of their prompt; the best always is."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    kept = torch.zeros(len(rewards), dtype=torch.bool)
    for rows in groups.values():
        mine = rewards[rows]
        kept[rows] = (mine > threshold_of(mine, keep)) | (mine == mine.max())
    return kept


def kept_of(samples: Samples, rewards: Tensor, train_rewards: Tensor, config: MLEConfig) -> Tensor:
    """bool [S]: which samples are kept; a global threshold is that of the training samples."""
    if config.filter == "per_prompt":
        return best_of_prompts(rewards, [tuple(e.prompt) for e in samples.examples], config.keep)
    if config.threshold is not None:
        return standardised(rewards, train_rewards) > config.threshold
    return rewards > threshold_of(train_rewards, config.keep)


def chosen(samples: Samples, kept: Tensor) -> Samples:
    return Samples([e for e, stays in zip(samples.examples, kept.tolist(), strict=True) if stays])


def train(config: MLEConfig) -> Path:
    """Filters and trains; the folder of the model."""
    begin(config)
    data = load_labelled(config)
    kept = kept_of(data.train, data.rewards, data.rewards, config)
    if not kept.any():
        highest = data.rewards == data.rewards.max()
        z = standardised(data.rewards).max().item()
        raise RunError(
            f"the filter keeps none of {len(kept):,} responses: {int(highest.sum()):,} share the "
            f"highest reward, {z:.2f} standard deviations above the mean; lower --threshold, or "
            f"raise --keep to {math.ceil(1000 * highest.double().mean().item()) / 1000:g}"
        )
    train = chosen(data.train, kept)
    before, after = ({tuple(e.prompt) for e in s.examples} for s in (data.train, train))
    facts = {
        "samples": len(kept),
        "kept": len(train.examples),
        "prompts": len(before),
        "prompts_lost": len(before) - len(after),
        "reward": data.rewards.mean().item(),
        "reward_kept": data.rewards[kept].mean().item(),
        "lowest_kept": data.rewards[kept].min().item(),
    }
    log.info(
        "kept %s of %s responses: mean reward %.3f -> %.3f; %s of %s prompts have none left",
        *(f"{facts[name]:,}" for name in ("kept", "samples")),
        *(facts[name] for name in ("reward", "reward_kept")),
        *(f"{facts[name]:,}" for name in ("prompts_lost", "prompts")),
    )
    held_kept = kept_of(data.held_out, data.held_out_rewards, data.rewards, config)
    held_out = chosen(data.held_out, held_kept)
    return FilteredMLE(config, data, train, held_out, facts).run()


class FilteredMLE(FromLabels):
    """Fine-tuning on what is left; the held-out loss is that of held-out responses as good."""

    name = "mle"
