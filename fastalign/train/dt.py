"""Return-conditioned fine-tuning: the "decision transformer", later "conditional alignment", of
2308.12050.

    L = - mean over response tokens of log pi(y_t | x, c(R), y_<t)

c(R) is the reward as text at the end of the prompt (`data/condition.py` has the exact form). Every
response is learned from, the poor ones as poor ones; then the model is asked for a high reward. The
statistics that a reward is standardised by are saved with the model.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.data import source
from fastalign.data.condition import Condition, Tagger
from fastalign.data.tokens import TokenizedCompletion
from fastalign.models import Policy
from fastalign.rollout import TransformersEngine
from fastalign.streams import stream
from fastalign.train import distributed, strict_json
from fastalign.train.asking import Asking
from fastalign.train.evaluate import standard_error
from fastalign.train.labels import (
    FromLabels,
    Labelled,
    LabelledConfig,
    Scorer,
    load_labelled,
    standardised,
)
from fastalign.train.meter import Meter
from fastalign.train.run import Run, RunError, autocast, begin
from fastalign.train.supervised import Samples
from fastalign.train.whole import write_text

log = logging.getLogger("fastalign")


@dataclass
class DTConfig(LabelledConfig):
    """Fine-tune on all responses, each with its reward written at the end of its prompt."""

    output: str = "runs/dt"
    """Folder of the run; the model is written to OUTPUT/model, the rewards' statistics with it."""
    target_reward: float | None = None
    """Standardised reward that the trained model is asked for where --eval_reward measures it; by
    default the highest of the training data."""
    eval_targets: str | None = None
    """Standardised rewards to ask the trained model for, such as 1,2,3,5: what it then achieves on
    held-out prompts is written to targets.json. Needs --reward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_reward is not None and not math.isfinite(self.target_reward):
            raise RunError(f"--target_reward: expected a finite number, got {self.target_reward}")
        if self.target_reward is not None and self.eval_reward is None:
            raise RunError("--target_reward is asked for in the evaluation: give --eval_reward")
        if self.targets and self.reward is None:
            raise RunError("--eval_targets needs a reward to measure with: give --reward")

    @property
    def targets(self) -> list[float]:
        """Of --eval_targets."""
        try:
            found = [float(word) for word in (self.eval_targets or "").split(",") if word.strip()]
        except ValueError:
            found = [math.nan]
        if not all(map(math.isfinite, found)):
            raise RunError(f"--eval_targets: expected numbers as in 1,2,3, got {self.eval_targets}")
        return found


def tagged(samples: Samples, z: Tensor, tagger: Tagger, max_length: int) -> tuple[Samples, int]:
    """The samples with their rewards in the prompts, and how many had no room for that."""
    found = [
        tagger.sample(example, reward, max_length)
        for example, reward in zip(samples.examples, z.tolist(), strict=True)
    ]
    kept = [example for example in found if example is not None]
    return Samples(kept), len(found) - len(kept)


class DT(FromLabels):
    """Plain fine-tuning on tagged samples; at its end, what asking for a reward brings."""

    name = "dt"
    config: DTConfig

    def __init__(
        self,
        config: DTConfig,
        data: Labelled,
        train: Samples,
        held_out: Samples,
        facts: dict[str, float],
        tagger: Tagger,
    ) -> None:
        self.tagger = tagger
        super().__init__(config, data, train, held_out, facts)

    def asking(self) -> Asking:
        target = self.config.target_reward
        return Asking(self.tagger, self.tagger.condition.highest if target is None else target)

    def save(self, folder: Path) -> None:
        super().save(folder)
        if distributed.world().is_main:
            self.tagger.condition.save(folder)

    def finish(self, run: Run) -> None:
        if not self.config.targets:
            return
        whole = distributed.unsharded(self.policy)
        if isinstance(whole, Policy):  # in the main process
            policy, meter = whole.to(self.device), run.meter
            with meter.phase("evaluate"):
                found = [self.achieved(policy, target, meter) for target in self.config.targets]
            write_text(run.folder / "targets.json", strict_json.dumps(found, indent=2) + "\n")

    @torch.no_grad()
    def achieved(self, policy: Policy, target: float, meter: Meter) -> dict[str, float]:
        """What its responses to the held-out prompts are worth when `target` is asked for."""
        config, scorer = self.config, self.data.scorer
        assert scorer is not None
        # The prompts without tags, each once; every target draws from the same stream.
        distinct = dict.fromkeys(tuple(e.prompt) for e in self.data.held_out.examples)
        prompts = list(distinct)[: config.eval_prompts]
        torch.manual_seed(stream(config.seed, "targets").initial_seed())
        with autocast(self.device, config.dtype):
            rollouts = TransformersEngine(policy, self.tokenizer).generate(
                [self.tagger.prompt(list(p), target) for p in prompts],
                config.eval_samples,
                config.sampling,
            )
        answers = [
            TokenizedCompletion(
                list(prompts[r.prompt_index]), self.tagger.answer(r.completion), None
            )
            for r in rollouts
        ]
        rewards = scorer.label(answers, meter).rewards
        z = standardised(rewards, self.data.rewards).reshape(-1, config.eval_samples).mean(1)
        found = {
            "target": target,
            "achieved": z.mean().item(),
            "reward": rewards.mean().item(),
            "length": sum(len(a.completion) for a in answers) / len(answers),
            "finished": sum(r.finished for r in rollouts) / len(rollouts),
            "n": len(rollouts),
        }
        error = standard_error(z)
        if error is not None:
            found["achieved_stderr"] = error
        gold = source.gold_for(config.data)
        if gold is not None:
            labels = Scorer(gold, self.tokenizer).label(answers, meter)
            found["gold"] = labels.rewards.mean().item()
        log.info("asked for %+.2f standard deviations, got %+.2f", target, found["achieved"])
        return found


def train(config: DTConfig) -> Path:
    """Tags and trains; the folder of the model."""
    begin(config)
    data = load_labelled(config)
    facts_of_reward: dict[str, Any] = {} if data.scorer is None else data.scorer.facts
    tagger = Tagger(Condition.of(data.rewards, facts_of_reward), data.tokenizer)
    if config.targets:
        check_room(config, data, tagger)
    z = standardised(data.rewards)
    train, dropped = tagged(data.train, z, tagger, config.max_length)
    held_z = standardised(data.held_out_rewards, data.rewards)
    held_out, _ = tagged(data.held_out, held_z, tagger, config.max_length)
    if not train.examples:
        raise RunError(
            f"no prompt leaves room for its reward and an answer in max_length {config.max_length}"
        )
    facts = {
        "samples": len(train.examples),
        "dropped": dropped,
        "reward": data.rewards.mean().item(),
        "reward_std": data.rewards.std().item(),
        "highest": z.max().item(),
    }
    log.info(
        "rewards of %s responses: mean %.3f, std %.3f, the highest %+.2f std from the mean; "
        "%s more dropped: their prompts leave no room for the reward",
        *(f"{facts['samples']:,}", facts["reward"], facts["reward_std"], facts["highest"], dropped),
    )
    return DT(config, data, train, held_out, facts, tagger).run()


def check_room(config: DTConfig, data: Labelled, tagger: Tagger) -> None:
    """RunError where --eval_targets could not be measured in the end."""
    if not data.held_out.examples:
        raise RunError("--eval_targets needs held-out prompts: give --eval_data or --eval_lines")
    assert data.scorer is not None
    prompt = max(len(e.prompt) for e in data.held_out.examples)
    tag, new = (
        max(len(tagger.prompt([], t)) for t in config.targets),
        config.sampling.max_new_tokens,
    )
    for context, of in (
        (data.policy.max_length, config.model),
        (data.scorer.max_length, "--reward"),
    ):
        if prompt + tag + new > context:
            raise RunError(
                f"--eval_targets: a held-out prompt of {prompt} tokens, its tag of {tag} and "
                f"sampling.max_new_tokens {new} are more than the {context} tokens that {of} can "
                "read"
            )
