"""A return-conditioned policy in an evaluation: asked for a reward, judged by its answer alone.

The policy reads the reward at the end of the prompt, and ends its answers with a space that the
tag's form asks for. Rewards, the reference and people get the prompt and the answer without either:
KL(pi || pi_init) compares pi(y | x, c) with pi_init(y | x), token by token of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.data.condition import Tagger
from fastalign.models import Policy
from fastalign.rollout import Engine, Rollout, SamplingConfig
from fastalign.train.experience import Collector


@dataclass(frozen=True)
class Asking:
    """What is asked for."""

    tagger: Tagger
    target: float
    """In standard deviations above the mean of the training data."""

    def prompt(self, ids: list[int]) -> list[int]:
        """The prompt as the policy reads it."""
        return self.tagger.prompt(ids, self.target)


@dataclass(frozen=True)
class Answer(Rollout):
    """A response as everybody else reads it."""

    written: Rollout
    """As the policy did: its prompt has the tag."""

    @property
    def rows(self) -> list[int]:
        """Which of the written tokens are the answer's."""
        n, m = len(self.completion), len(self.written.completion)
        return list(range(n)) if n == m else [*range(n - 1), m - 1]


class AskingEngine:
    """Puts the tag on prompts and takes its traces off responses.

    Args:
        engine: samples from the policy.
        asking: what to ask for.
    """

    def __init__(self, engine: Engine, asking: Asking) -> None:
        self.engine, self.asking = engine, asking

    def sync(self) -> None:
        self.engine.sync()

    def generate(
        self, prompts: list[list[int]], n_samples: int, sampling: SamplingConfig
    ) -> list[Rollout]:
        """`n_samples` `Answer`s to each prompt."""
        asked = [self.asking.prompt(p) for p in prompts]
        return [
            self._plain(prompts[r.prompt_index], r)
            for r in self.engine.generate(asked, n_samples, sampling)
        ]

    def _plain(self, prompt: list[int], written: Rollout) -> Answer:
        completion = self.asking.tagger.answer(written.completion)
        answer = Answer(written.prompt_index, prompt, completion, [], written.finished, written)
        answer.logp.extend(written.logp[i] for i in answer.rows)
        return answer


class AskingCollector(Collector):
    """Asks the policy, and looks up its log-probs on what it read and wrote.

    Args:
        asking: what to ask for.
        engine, more: as `Collector` has them.
    """

    def __init__(self, asking: Asking, engine: Engine, *more: Any) -> None:
        super().__init__(AskingEngine(engine, asking), *more)

    @torch.no_grad()
    def logprobs(
        self, policy: Policy, rollouts: list[Rollout], *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Of the answers' tokens; of the reference after prompts without a tag."""
        if policy is self.reference:
            return super().logprobs(policy, rollouts, entropy=entropy)
        answers = [r for r in rollouts if isinstance(r, Answer)]
        logp, h = super().logprobs(policy, [a.written for a in answers], entropy=entropy)
        kept, start = [], 0
        for answer in answers:
            kept += [start + i for i in answer.rows]
            start += len(answer.written.completion)
        return logp[kept], None if h is None else h[kept]
