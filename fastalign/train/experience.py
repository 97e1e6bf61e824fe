"""Experience: rollouts with all that policy training needs to know of each token, packed.

One row per response token, response after response; `cu_seqlens` marks the responses. The state of
a token is the position before it, so row t of `values` is V(prompt + tokens before t).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastalign import ops
from fastalign.data.packing import (
    Packed,
    Prompts,
    batches_of,
    held,
    pack,
    same_prompts,
    token_budget_batches,
)
from fastalign.models import Policy
from fastalign.models.flops import forward_flops
from fastalign.rollout import Engine, Rollout, SamplingConfig
from fastalign.train import distributed
from fastalign.train.head_diversity import correlation
from fastalign.train.meter import Meter
from fastalign.train.reward_source import Gold, RewardSource, measure_gold
from fastalign.train.run import RunError, autocast


@dataclass(frozen=True)
class Experience:
    """S responses with N tokens in all. Tensors lie on the CPU."""

    rollouts: list[Rollout]
    cu_seqlens: Tensor  # int32 [S + 1]
    logp: Tensor  # fp32 [N], of the sampled tokens, from sampling
    ref_logp: Tensor  # fp32 [N], under pi_init
    scores: Tensor | None  # fp32 [S, K], reward heads, where the reward has some
    proxy: Tensor  # fp32 [S], the reward
    gold: Tensor | None  # fp64 [S]
    tokens: int  # of prompts and responses together
    parts: dict[str, Tensor] = field(default_factory=dict)  # [S] each, whose sum the reward is

    @property
    def n_tokens(self) -> int:
        """N, of the responses."""
        return int(self.cu_seqlens[-1])

    def rows(self, i: int) -> slice:
        """The rows of response i."""
        return slice(int(self.cu_seqlens[i]), int(self.cu_seqlens[i + 1]))

    def per_response(self, per_token: Tensor) -> Tensor:
        """Sums [N] over each response: [S]."""
        padded = torch.cat([per_token.new_zeros(1), per_token.cumsum(0)])
        return padded[self.cu_seqlens[1:].long()] - padded[self.cu_seqlens[:-1].long()]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of prompt and response of each."""
        return [len(r.prompt) + len(r.completion) for r in self.rollouts]

    @cached_property
    def prompts(self) -> Prompts:
        """Which responses answer the same one."""
        return same_prompts(r.prompt for r in self.rollouts)

    @property
    def finished(self) -> Tensor:
        """bool [S]: whether the response came to its end-of-sequence token."""
        return torch.tensor([r.finished for r in self.rollouts], dtype=torch.bool)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists of them only, for a checkpoint."""
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        return state | {"rollouts": [asdict(r) for r in self.rollouts]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Experience:
        """What `state_dict` was taken of."""
        return cls(**(state | {"rollouts": [Rollout(**r) for r in state["rollouts"]]}))

    def metrics(self) -> dict[str, float]:
        """Rewards, and KL(pi || pi_init) per response by the k1 and the k3 estimator, in nats."""
        k1 = self.per_response(ops.kl_estimate(self.logp, self.ref_logp, kind="k1").double())
        k3 = self.per_response(ops.kl_estimate(self.logp, self.ref_logp, kind="k3").double())
        lengths = self.cu_seqlens.diff().double()
        found = {
            "reward/proxy": self.proxy.mean().item(),
            "kl/k1": k1.mean().item(),
            "kl/k3": k3.mean().item(),
            "length": lengths.mean().item(),
            "finished": sum(r.finished for r in self.rollouts) / len(self.rollouts),
        }
        found |= spread("reward/proxy", self.proxy)
        if self.scores is not None:
            if self.scores.shape[1] > 1:
                found["reward/disagreement"] = self.scores.std(1).mean().item()
                found |= correlation(self.scores)
            for k, mean in enumerate(self.scores.mean(0).tolist()):
                found[f"reward/head_{k}"] = mean
        if len(self.parts) > 1:
            for name, part in self.parts.items():
                found[f"reward/{name}"] = part.mean().item()
        if self.gold is not None:
            found["reward/gold"] = self.gold.mean().item()
            found |= spread("reward/gold", self.gold)
        return found


def spread(name: str, values: Tensor) -> dict[str, float]:
    """`{name}_std`, the standard deviation over responses; nothing where there is but one."""
    return {f"{name}_std": values.std().item()} if values.numel() > 1 else {}


def packed(rollouts: list[Rollout], share: bool = False) -> Packed:
    """One pack in the rollouts' order; its targets are the response tokens. `share`: rollouts of
    one prompt in a row hold it once."""
    sequences = [r.prompt + r.completion for r in rollouts]
    return pack(sequences, [len(r.prompt) for r in rollouts], share=share)


def merged(parts: list[Experience]) -> Experience:
    """The experience of all processes as one, by the order of the prompts; process r of n had
    prompts r, r + n, ..."""
    n, first = len(parts), parts[0]
    rollouts = [
        replace(rollout, prompt_index=rollout.prompt_index * n + rank)
        for rank, part in enumerate(parts)
        for rollout in part.rollouts
    ]
    order = sorted(range(len(rollouts)), key=lambda i: rollouts[i].prompt_index)
    lengths = torch.cat([part.cu_seqlens.diff() for part in parts])

    def of_tokens(name: str) -> Tensor:
        rows = torch.cat([getattr(part, name) for part in parts]).split(lengths.tolist())
        return torch.cat([rows[i] for i in order])

    def of_responses(values: list[Any]) -> Any:
        return None if values[0] is None else torch.cat(values)[order]

    lengths_in_order = lengths[order]
    return Experience(
        [rollouts[i] for i in order],
        torch.cat([lengths.new_zeros(1), lengths_in_order.cumsum(0)]).int(),
        of_tokens("logp"),
        of_tokens("ref_logp"),
        of_responses([part.scores for part in parts]),
        of_responses([part.proxy for part in parts]),
        of_responses([part.gold for part in parts]),
        sum(part.tokens for part in parts),
        {name: of_responses([part.parts[name] for part in parts]) for name in first.parts},
    )


class Collector:
    """Samples, scores and looks up what the frozen reference thinks.

    Args:
        engine: samples from the policy.
        reference: pi_init, frozen.
        reward: gives every response a number.
        tokenizer: makes text of responses, for the gold reward and for people.
        sampling: how to draw.
        micro_tokens: tokens of one forward pass.
        dtype: of the forward passes, as in the configuration.
        gold: what is measured beside the reward, where there is one.
    """

    def __init__(
        self,
        engine: Engine,
        reference: Policy,
        reward: RewardSource,
        tokenizer: Any,
        sampling: SamplingConfig,
        micro_tokens: int,
        dtype: str,
        gold: Gold | None,
    ) -> None:
        self.engine, self.reference, self.reward = engine, reference, reward
        self.tokenizer, self.sampling, self.gold = tokenizer, sampling, gold
        self.micro_tokens, self.dtype = micro_tokens, dtype

    def text(self, completion: list[int]) -> str:
        return self.tokenizer.decode(completion, skip_special_tokens=True)

    def collect(
        self,
        prompts: list[list[int]],
        texts: list[str],
        n_samples: int,
        meter: Meter | None = None,
    ) -> Experience:
        """`n_samples` responses to each prompt; `texts` are the prompts for rewards that read.

        Of several processes each answers its share of the prompts; all of them get all responses.

        Raises:
            RunError: fewer prompts than processes.
            Stopped: see `RewardSource.score`; in all processes, whichever one's share it was in.
        """
        self.engine.sync()
        here = distributed.world()
        if len(prompts) < here.size:
            raise RunError(
                f"{here.size} processes sample, but there are {len(prompts)} prompts to answer at "
                "once: give more prompts, or take fewer processes"
            )
        share = slice(here.rank, None, here.size)
        own = partial(self._collect, prompts[share], texts[share], n_samples, meter)
        found = merged(distributed.of_all(own)) if here.size > 1 else own()
        if meter is not None:
            self._count(meter, found)
        return found

    def _count(self, meter: Meter, found: Experience) -> None:
        """What all processes' responses cost, by phase."""
        n, policy = found.n_tokens, self.reference  # of the policy's shape
        with meter.phase("generate"):
            own, before = held([range(len(found.rollouts))], found.lengths, found.prompts)
            meter.count(sum(own), flops=forward_flops(policy, own, n, before))
        with meter.phase("score"):
            own, before = self._held(found, self.reward.shares_prompts)
            meter.count(flops=self.reward.flops(own, before))
        if isinstance(self.gold, RewardSource):
            with meter.phase("gold"):
                own, before = self._held(found, self.gold.shares_prompts)
                meter.count(flops=self.gold.flops(own, before))
        with meter.phase("reference"):
            own, before = self._held(found, policy.shares_prompts)
            meter.count(flops=forward_flops(policy, own, n, before))

    def _held(self, found: Experience, share: bool) -> tuple[list[int], list[int]]:
        """See `packing.held`: of the passes of all processes over their own responses."""
        prompts, size = found.prompts if share else None, distributed.world().size
        own: list[list[int]] = [[] for _ in range(size)]
        for i, rollout in enumerate(found.rollouts):
            own[rollout.prompt_index % size].append(i)
        shares = [batches_of(rows, found.lengths, self.micro_tokens, prompts) for rows in own]
        return held(chain.from_iterable(shares), found.lengths, prompts)

    @torch.no_grad()
    def _collect(
        self,
        prompts: list[list[int]],
        texts: list[str],
        n_samples: int,
        meter: Meter | None = None,
    ) -> Experience:
        """As `collect`, by this process alone. With a `meter`, the phases generate, score and
        reference are charged to it."""

        def phase(name: str) -> AbstractContextManager[None]:
            return nullcontext() if meter is None else meter.phase(name)

        # In the precision of the log-probs they will be compared with.
        with phase("generate"), autocast(self.reference.head_weight.device, self.dtype):
            rollouts = self.engine.generate(prompts, n_samples, self.sampling)
        with phase("score"):
            asked = [texts[r.prompt_index] for r in rollouts]
            answered = [self.text(r.completion) for r in rollouts]
            judged = self.reward.score(rollouts, asked, answered)
        gold = None
        if self.gold is not None:
            with phase("gold"):
                gold = measure_gold(self.gold, rollouts, asked, answered)
        with phase("reference"):
            ref_logp, _ = self.logprobs(self.reference, rollouts)
        ends = torch.tensor([len(r.completion) for r in rollouts]).cumsum(0)
        return Experience(
            rollouts,
            torch.cat([ends.new_zeros(1), ends]).int(),
            torch.tensor([x for r in rollouts for x in r.logp]),
            ref_logp,
            judged.scores,
            judged.total,
            gold,
            sum(len(r.prompt) + len(r.completion) for r in rollouts),
            judged.parts,
        )

    @torch.no_grad()
    def logprobs(
        self, policy: Policy, rollouts: list[Rollout], *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs (and entropies) of all response tokens under `policy`, at the sampling's
        temperature: fp32 [N]."""
        device = policy.head_weight.device
        was_training = policy.training
        policy.eval()
        lengths = [len(r.prompt) + len(r.completion) for r in rollouts]
        share = policy.shares_prompts
        prompts = same_prompts(r.prompt for r in rollouts) if share else None
        found = torch.empty(2, sum(len(r.completion) for r in rollouts))
        starts = torch.tensor([0] + [len(r.completion) for r in rollouts]).cumsum(0).tolist()
        for batch in token_budget_batches(lengths, self.micro_tokens, prompts=prompts):
            pack_ = packed([rollouts[i] for i in batch], share).to(device)
            with autocast(device, self.dtype):
                logp, h = policy.logprobs(
                    pack_, temperature=self.sampling.temperature, return_entropy=entropy
                )
            rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in batch])
            found[0, rows] = logp.cpu()
            if h is not None:
                found[1, rows] = h.cpu()
        policy.train(was_training)
        return found[0], found[1] if entropy else None
