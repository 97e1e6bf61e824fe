"""Rewards for given responses: those in the data, or a reward's own, each computed once.

`--reward` names what labels them: a reward ensemble's folder or Python functions, as for the
methods that sample, or `gold`, the built-in task's own. Without it, the data carry their rewards in
a field `reward` or `score`, as `fastalign score` writes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import losses
from fastalign.data import source
from fastalign.data.packing import held, same_prompts, token_budget_batches
from fastalign.data.tokens import TokenizedCompletion
from fastalign.models import Policy, load_tokenizer
from fastalign.ops.reduce_scores import STATISTICS
from fastalign.rollout import Rollout
from fastalign.train import distributed
from fastalign.train.asking import Asking
from fastalign.train.kept import Kept, key_of
from fastalign.train.meter import Meter
from fastalign.train.reward_source import GOLD, RewardSource, make_reward
from fastalign.train.run import Run, RunError, at_least, check_context, choose_device, forward_dtype
from fastalign.train.sampled import Request, Sampled
from fastalign.train.setup import load_policy
from fastalign.train.supervised import Samples, Supervised, SupervisedConfig, read, tokenize

log = logging.getLogger("fastalign")


@dataclass
class LabelledConfig(SupervisedConfig):
    """What every command has that learns from responses with rewards."""

    data: str = "synthetic"
    """JSONL(.gz), Parquet, a folder, a hub id, or synthetic. Without --reward, records with reward
    or score; with it, also preference data, of which both responses are scored."""
    reward: str | None = None
    """What scores the responses: a reward ensemble's folder, or my_file.py:function, or gold (the
    built-in task's own reward). By default the rewards are in the data."""
    statistic: str | None = None
    """Statistic of the reward ensemble, where it is not to be the one it was saved with."""
    coef: float | None = None
    """Coefficient of lcb and uwo, likewise."""
    lr: float = 1e-4
    """Peak learning rate (1e-4 suits small models; 5e-6 those of billions of weights)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "coef")
        if self.statistic not in (None, *STATISTICS):
            raise RunError(
                f"unknown statistic {self.statistic!r}: expected one of {', '.join(STATISTICS)}"
            )
        if self.reward in (None, GOLD) and (self.statistic, self.coef) != (None, None):
            raise RunError("--statistic and --coef are a reward ensemble's: give it with --reward")


@dataclass(frozen=True)
class Labels:
    """The rewards of S responses, on the CPU."""

    rewards: Tensor  # float64 [S]
    heads: Tensor | None = None  # fp32 [S, K], of a reward ensemble


@dataclass
class Labelled:
    """A policy, training and held-out samples with their rewards, and what it took to have them."""

    policy: Policy
    tokenizer: Any
    train: Samples
    rewards: Tensor  # float64 [S]
    held_out: Samples
    held_out_rewards: Tensor  # float64 [S']
    scorer: Scorer | None
    meter: Meter
    kept: Kept


class Scorer:
    """Scores responses that are token ids.

    Args:
        reward: an ensemble or functions; or the built-in task's gold reward.
        tokenizer: makes text of ids, for rewards that read text.
    """

    def __init__(self, reward: RewardSource | Callable[[str, str], float], tokenizer: Any) -> None:
        self.reward, self.tokenizer = reward, tokenizer

    @property
    def facts(self) -> dict[str, Any]:
        """What it is, for the key of what it computed and for whoever reads the labels."""
        if isinstance(self.reward, RewardSource):
            return self.reward.describe()
        return {"proxy": GOLD}

    @property
    def max_length(self) -> int:
        """Tokens of prompt and response that it can read."""
        return self.reward.max_length if isinstance(self.reward, RewardSource) else 1 << 30

    def texts(self, examples: list[TokenizedCompletion]) -> tuple[list[str], list[str]]:
        """Prompts as the model reads them, without BOS, and responses without special tokens."""
        bos = self.tokenizer.bos_token or ""
        prompts = [self.tokenizer.decode(e.prompt).removeprefix(bos) for e in examples]
        return prompts, [
            self.tokenizer.decode(e.completion, skip_special_tokens=True) for e in examples
        ]

    def label(self, examples: list[TokenizedCompletion], meter: Meter) -> Labels:
        """Rewards of prompts and responses as they are trained on (cut to length).

        Raises:
            RunError: a reward that is not finite, or a function that fails.
            ValueError: gold, where a prompt is not one of the built-in task.
        """
        prompts, responses = self.texts(examples)
        if not isinstance(self.reward, RewardSource):
            pairs = zip(prompts, responses, strict=True)
            return Labels(torch.tensor([self.reward(*p) for p in pairs], dtype=torch.float64))
        rollouts = [Rollout(i, e.prompt, e.completion, [], True) for i, e in enumerate(examples)]
        with meter.phase("score"):
            scored = self.reward.score(rollouts, prompts, responses)
            lengths = [len(e.prompt) + len(e.completion) for e in examples]
            share = self.reward.shares_prompts
            asked = same_prompts(e.prompt for e in examples) if share else None
            passes = token_budget_batches(lengths, self.reward.micro_tokens, prompts=asked)
            meter.count(flops=self.reward.flops(*held(passes, lengths, asked)))
        return Labels(scored.total.double(), scored.scores)


def make_scorer(config: Any, model: str, tokenizer: Any, device: torch.device) -> Scorer:
    """What `config.reward` names.

    Raises:
        UserError: see `make_reward`; or gold for data that are not the built-in task's; or
            sequences of `config.max_length` that the ensemble cannot read.
    """
    if config.reward == GOLD:
        gold = source.gold_for(config.data)
        if gold is None:
            raise RunError(f"--reward gold is the built-in task's; {config.data} has none")
        return Scorer(gold, tokenizer)
    request = Request(
        config.reward, config.statistic, config.coef, model, config.micro_tokens, config.dtype
    )
    reward = make_reward(request, tokenizer, device)
    if (config.max_length or 0) > reward.max_length:
        raise RunError(
            f"max_length {config.max_length} is more than the {reward.max_length} tokens that "
            f"{config.reward} can read"
        )
    return Scorer(reward, tokenizer)


def load_labelled(config: LabelledConfig, *, value_head: bool = False) -> Labelled:
    """The policy, and tokenized samples with rewards, of training and held out.

    Raises:
        UserError: data or reward that cannot be used; rewards that are all equal.
    """
    device = choose_device(config.device)
    tokenizer = load_tokenizer(config.model)
    policy = load_policy(config, config.model, tokenizer, device=device, value_head=value_head)
    check_context(config.max_length, policy.max_length, config.model)
    kept, meter = Kept(Path(config.output)), Meter(device, forward_dtype(device, config.dtype))
    scorer = None
    if config.reward is not None:
        scorer = make_scorer(config, config.model, tokenizer, device)
    meter.start(say=False)
    found = read(config, source.rewarded if scorer is None else source.responses)
    samples, rewards = [], []
    for part, name in zip(found, ("labels", "held_out_labels"), strict=True):
        examples = tokenize(part, tokenizer, config.max_length)
        if scorer is None or not examples:
            values = torch.tensor([e.reward for e in examples], dtype=torch.float64)
        else:
            values = _labels(scorer, examples, name, kept, meter).rewards
        labelled = zip(examples, values.tolist(), strict=True)
        samples.append(Samples([replace(e, reward=value) for e, value in labelled]))
        rewards.append(values)
    if len(rewards[0]) < 2 or bool((rewards[0] == rewards[0][0]).all()):
        raise RunError(
            f"all {len(rewards[0]):,} rewards are {rewards[0][0].item():g}: there is nothing to "
            "tell good responses from bad ones by"
        )
    return Labelled(
        policy, tokenizer, samples[0], rewards[0], samples[1], rewards[1], scorer, meter, kept
    )


def _labels(
    scorer: Scorer, examples: list[TokenizedCompletion], name: str, kept: Kept, meter: Meter
) -> Labels:
    """The run's own labels of these examples by this reward, or new ones."""

    def compute() -> dict[str, Tensor]:
        log.info("scoring %s responses with %s", f"{len(examples):,}", scorer.facts["proxy"])
        labels = scorer.label(examples, meter)
        heads = {} if labels.heads is None else {"heads": labels.heads}
        return {"rewards": labels.rewards, **heads}

    tensors = kept.get(name, key_of(examples, meter, **scorer.facts), compute)
    return Labels(tensors["rewards"], tensors.get("heads"))


class FromLabels(Supervised):
    """A method on responses with rewards.

    Args:
        data: as loaded; its samples are those the rewards are of.
        facts: of the data, logged once, before the first step, by their names after "data/".
    """

    config: LabelledConfig

    def __init__(
        self,
        config: LabelledConfig,
        data: Labelled,
        train: Samples,
        held_out: Samples,
        facts: dict[str, float],
        loss: Any = losses.MLE(),  # noqa: B008, frozen
    ) -> None:
        self.data, self.facts = data, facts
        super().__init__(config, data.policy, data.tokenizer, train, held_out, loss)

    def make_sampled(self) -> Sampled:
        same = self.config.reward in (None, self.config.eval_reward)
        scorer = self.data.scorer.reward if same and self.data.scorer is not None else None
        return Sampled(
            self.config,
            self.policy,
            self.tokenizer,
            self.data.held_out.examples,
            "reward/proxy" if same else "reward/held_out",
            scorer if isinstance(scorer, RewardSource) else None,
            self.asking(),
        )

    def asking(self) -> Asking | None:
        """How the trained policy is asked, where it is conditioned."""
        return None

    def begin(self, run: Run, new: bool) -> None:
        distributed.on_main(self.data.kept.write)
        self.data.meter.stop()
        if new:
            run.meter.absorb(self.data.meter)
            run.log(0, "data", {f"data/{name}": value for name, value in self.facts.items()})


def standardised(rewards: Tensor, of: Tensor | None = None) -> Tensor:
    """float64 z = (reward - mean) / std, with the mean and the unbiased std `of` a whole data set
    (by default of the rewards themselves)."""
    whole = rewards if of is None else of
    return (rewards.double() - whole.double().mean()) / whole.double().std()
