"""What samples are worth before and after a method learned from given responses.

Such a method never samples, so its loss says little of the policy it makes. With --eval_reward the
policy answers held-out prompts as it begins and as it ends, and what comes is measured as for the
methods on a policy's own samples (`evaluate`): reward, KL to the start, length, and how much each
changed, prompt by prompt. The random states that training draws from stay what they were, so that a
run with the evaluation learns the same as one without.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fastalign.data import source, synthetic
from fastalign.data.tokens import TokenizedCompletion
from fastalign.models import Policy
from fastalign.rollout import SamplingConfig, TransformersEngine
from fastalign.train import repeat
from fastalign.train.asking import Asking, AskingCollector
from fastalign.train.checkpoint import random_state, set_random_state
from fastalign.train.engine import seed_draws, whole_engine
from fastalign.train.evaluate import Evaluation, Evaluations, evaluate
from fastalign.train.experience import Collector
from fastalign.train.reward_source import GOLD, Entry, RewardSource, make_reward, parse_reward
from fastalign.train.run import Run, RunError

log = logging.getLogger("fastalign")

START = "the start"
PROXY = "reward/proxy"


@dataclass
class Request:
    """What `make_reward` reads of a configuration."""

    reward: str
    statistic: str | None
    coef: float | None
    policy: str
    micro_tokens: int
    dtype: str


class SampledOptions(Protocol):
    """What of a command's configuration is read here."""

    eval_reward: str | None
    eval_prompts: int
    eval_samples: int
    sampling: SamplingConfig
    data: str
    model: str
    seed: int
    micro_tokens: int
    dtype: str


def check_named(reward: str | None, data: str) -> None:
    """RunError where --eval_reward cannot be what it says: told before any work is done."""
    if reward == GOLD:
        if source.gold_for(data) is None:
            raise RunError(f"--eval_reward gold is the built-in task's; {data} has none")
    elif reward is not None:
        for entry in parse_reward(reward):
            paths = [entry.path] if Path(entry.path).exists() else entry.path.split("+")
            if not all(Path(path).exists() for path in paths):
                raise RunError(f"--eval_reward {reward}: there is no {entry.path}")


def eval_source(config: SampledOptions, tokenizer: Any, device: torch.device) -> RewardSource:
    """What `config.eval_reward` names; an ensemble with the statistic it was saved with."""
    if config.eval_reward == GOLD:
        return gold_source(config.data)
    assert config.eval_reward is not None
    asked = (config.eval_reward, None, None, config.model, config.micro_tokens, config.dtype)
    return make_reward(Request(*asked), tokenizer, device)


def gold_source(data: str) -> RewardSource:
    """The built-in task's own reward."""
    gold = source.gold_for(data)
    assert gold is not None

    def rewards(prompts: list[str], responses: list[str]) -> list[float]:
        return [gold(*pair) for pair in zip(prompts, responses, strict=True)]

    entry = Entry(1.0, str(synthetic.__file__), "gold_reward")
    return RewardSource([entry], None, {entry.name: rewards}, 0, "float32")


class Sampled:
    """The evaluation of a run: nothing at all where `config.eval_reward` is None.

    Args:
        config: how to sample and what to measure by.
        policy: what is trained, as it begins; not sharded yet.
        tokenizer: the policy's.
        held_out: examples whose prompts are answered, each prompt once.
        name: of the reward: "reward/proxy" where it is what the method learns by, "reward/held_out"
            where it is not. Gold always is "reward/gold".
        reward: where it is loaded already.
        asking: how a return-conditioned policy is asked, once it is trained.

    Raises:
        UserError: no prompts, or none that leaves room for an answer; a reward that is not there.
    """

    def __init__(
        self,
        config: SampledOptions,
        policy: Policy,
        tokenizer: Any,
        held_out: Sequence[TokenizedCompletion],
        name: str = "reward/held_out",
        reward: RewardSource | None = None,
        asking: Asking | None = None,
    ) -> None:
        self.config, self.asking = config, asking
        self.found = Evaluations()
        if config.eval_reward is None:
            return
        gold = config.eval_reward == GOLD
        self.reward = reward or eval_source(config, tokenizer, policy.head_weight.device)
        self.name = "reward/gold" if gold else name
        tag = 0 if asking is None else len(asking.prompt([]))
        context = min(policy.max_length - tag, self.reward.max_length)
        room = context - config.sampling.max_new_tokens
        self.prompts = [list(p) for p in dict.fromkeys(tuple(e.prompt) for e in held_out)]
        if not self.prompts:
            raise RunError("--eval_reward needs held-out prompts: give --eval_data or --eval_lines")
        fitting = [p for p in self.prompts if len(p) <= room]
        if not fitting:
            raise RunError(
                f"--eval_reward: sampling.max_new_tokens {config.sampling.max_new_tokens} leaves "
                f"no room for any of {len(self.prompts):,} held-out prompts in the {context} "
                "tokens that policy and reward model can read"
            )
        if len(fitting) < len(self.prompts):
            log.warning(
                "%d of %d held-out prompts leave no room for an answer and are not sampled from",
                *(len(self.prompts) - len(fitting), len(self.prompts)),
            )
        self.prompts = fitting[: config.eval_prompts]
        bos = tokenizer.bos_token or ""
        self.texts = [tokenizer.decode(p).removeprefix(bos) for p in self.prompts]
        self.policy, self.reference = policy, policy.frozen_copy()
        parts = (self.reference, self.reward, tokenizer, config.sampling)
        more = (config.micro_tokens, config.dtype, None if gold else source.gold_for(config.data))
        self.start = Collector(TransformersEngine(self.reference, tokenizer), *parts, *more)
        trained = whole_engine(policy, tokenizer)
        self.end = Collector(trained, *parts, *more)
        if asking is not None:
            self.end = AskingCollector(asking, trained, *parts, *more)

    @property
    def wanted(self) -> bool:
        """Whether there is anything to measure."""
        return self.config.eval_reward is not None

    @property
    def unfinished(self) -> bool:
        """Whether the trained policy is still to be measured."""
        return self.wanted and self.found.after is None

    def before(self, run: Run) -> dict[str, float]:
        """Numbers of the policy as it began, measured once: its weights are always at hand."""
        if not self.wanted:
            return {}
        if self.found.before is None:
            self.found.before = self._measured(run, self.start, self.reference)
        return self.found.before.numbers

    def after(self, run: Run, last: bool = True) -> dict[str, float]:
        """Numbers of the policy as it ends: nothing before the `last` step."""
        if not self.wanted or not last:
            return {}
        self.found.after = self._measured(run, self.end, self.policy)
        return self.found.after.numbers

    def _measured(self, run: Run, collector: Collector, policy: Policy) -> Evaluation:
        with run.meter.phase("evaluate"), _random_state_kept():
            # Before and after draw from the same stream.
            seed_draws(self.config.seed, "evaluation")
            found = evaluate(collector, policy, self.prompts, self.texts, self.config.eval_samples)
        return renamed(found, self.name)

    def write(self, run: Run) -> None:
        """evaluation.json and samples.jsonl in the run's folder."""
        if not self.wanted or not run.is_main:
            return
        after = run.command.upper()
        facts: dict[str, Any] = {"method": run.command}
        if self.asking is not None:
            after += f" at {self.asking.target:+.2f}"
            facts["target_reward"] = self.asking.target
        facts |= {
            "names": {"before": START, "after": after},
            **self.reward.describe(),
            "n_prompts": len(self.prompts),
            "n_samples": self.config.eval_samples,
            **repeat.facts(self.policy.head_weight.device),
            "seconds": {"total": run.meter.seconds()},
        }
        self.found.write(run.folder, facts)

    # --- resuming ---------------------------------------------------------------------------------

    @property
    def what(self) -> str | None:
        """Digest of all that decides what is measured."""
        if not self.wanted:
            return None
        facts = [self.reward.describe(), self.prompts, self.config.eval_samples, self.config.seed]
        target = None if self.asking is None else self.asking.target
        text = json.dumps([*facts, asdict(self.config.sampling), target])
        return hashlib.sha256(text.encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"what": self.what, **self.found.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of another reward or other prompts nothing is taken: both ends are measured anew."""
        if self.wanted and state["what"] == self.what:
            self.found.load_state_dict(state)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def renamed(found: Evaluation, name: str) -> Evaluation:
    """With what was measured as "reward/proxy" under another name."""

    def new(key: str) -> str:
        return name + key.removeprefix(PROXY) if key.startswith(PROXY) else key

    short = name.removeprefix("reward/")
    return Evaluation(
        {new(key): value for key, value in found.numbers.items()},
        {new(key): values for key, values in found.by_prompt.items()},
        [
            sample
            | {"reward": {short if k == "proxy" else k: v for k, v in sample["reward"].items()}}
            for sample in found.samples
        ],
    )
