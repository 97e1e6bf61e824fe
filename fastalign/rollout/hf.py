"""Rollouts by `transformers` generation with a KV cache.

The log-prob of every sampled token is read from the very scores it was drawn from, one [batch, V]
slice at a time: the scores of a whole generation are never kept. Prompts are batched by length, so
that little is padded. A prompt that several responses begin with is read once: its keys and values
are copied for each of them, and generation begins at its last token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign import ops
from fastalign.models.attention import attention
from fastalign.models.policy import Policy
from fastalign.rollout.engine import Rollout, SamplingConfig
from fastalign.train.distributed import whole


class _Recorder:
    """A logits processor that changes nothing and keeps log-probs of what was drawn a step before.

    `generate` divides by the temperature after the processors given to it, so the recorder does
    too.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.scores: Tensor | None = None
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.collect(input_ids)
        self.scores = scores
        return scores

    def collect(self, input_ids: Tensor) -> None:
        if self.scores is not None:
            drawn = input_ids[:, -1]
            self.logp.append(ops.token_logprobs(self.scores, drawn, temperature=self.temperature))


class TransformersEngine:
    """Samples from a `Policy` by its own `generate`, so the weights are always the newest.

    Args:
        policy: the model.
        tokenizer: gives the end-of-sequence and padding ids.
        trained: the model that is trained, where `policy` is a whole copy of it, because its own
            weights are spread over several processes.
    """

    def __init__(self, policy: Policy, tokenizer: Any, trained: Policy | None = None) -> None:
        self.policy, self.trained = policy, trained
        self.eos = int(tokenizer.eos_token_id)
        self.pad = int(tokenizer.pad_token_id)

    @torch.no_grad()
    def sync(self) -> None:
        """Nothing to do, but for a copy, of what is trained."""
        if self.trained is not None:
            pairs = zip(self.policy.parameters(), self.trained.parameters(), strict=True)
            for own, sharded in pairs:
                if sharded.requires_grad:
                    own.copy_(whole(sharded))

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], n_samples: int, sampling: SamplingConfig
    ) -> list[Rollout]:
        """`n_samples` responses to each prompt, drawn with torch's global random state.

        Raises:
            ValueError: a prompt and `max_new_tokens` do not fit into the model's context.
        """
        limit = self.policy.max_length - sampling.max_new_tokens
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= limit:
                raise ValueError(
                    f"rollout: prompt {i} has {len(prompt)} tokens; expected 1 to {limit} (context "
                    f"{self.policy.max_length} less max_new_tokens = {sampling.max_new_tokens})"
                )
        requests = [i for i in range(len(prompts)) for _ in range(n_samples)]
        order = sorted(range(len(requests)), key=lambda r: len(prompts[requests[r]]))
        found: list[Rollout | None] = [None] * len(requests)
        was_training = self.policy.training
        self.policy.eval()
        with attention(self.policy.model, "sdpa"):
            for start in range(0, len(order), sampling.batch_size):
                rows = order[start : start + sampling.batch_size]
                for r, rollout in zip(
                    rows, self._batch([requests[r] for r in rows], prompts, sampling), strict=True
                ):
                    found[r] = rollout
        self.policy.train(was_training)
        return [rollout for rollout in found if rollout is not None]

    def _left_padded(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [B, width of the longest], on the policy's device."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.pad, dtype=torch.int64)
        mask = torch.zeros((len(prompts), width), dtype=torch.int64)
        for r, prompt in enumerate(prompts):
            ids[r, width - len(prompt) :] = torch.tensor(prompt)
            mask[r, width - len(prompt) :] = 1
        device = self.policy.head_weight.device
        return ids.to(device), mask.to(device)

    def _read(self, prompts: list[list[int]], copies: Tensor) -> Any:
        """Keys and values of all tokens of the prompts but the last ones; `copies` says of which
        prompt each row of the cache is."""
        ids, mask = self._left_padded(prompts)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        cache = self.policy.model.base_model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=places[:, :-1],
            use_cache=True,
        ).past_key_values
        cache.batch_select_indices(copies)
        return cache

    def _batch(
        self, rows: list[int], prompts: list[list[int]], sampling: SamplingConfig
    ) -> list[Rollout]:
        from transformers import GenerationConfig, LogitsProcessorList

        ids, mask = self._left_padded([prompts[i] for i in rows])
        width = ids.shape[1]
        recorder = _Recorder(sampling.temperature)
        config = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self.eos,
            pad_token_id=self.pad,
        )
        model = self.policy.model
        distinct = sorted(set(rows))
        past = {}
        if len(distinct) < len(rows) and width > 1:
            copies = torch.tensor([distinct.index(i) for i in rows], device=ids.device)
            past["past_key_values"] = self._read([prompts[i] for i in distinct], copies)
        # A model's own generation defaults (top_k = 50, a repetition penalty) would be merged into
        # ours and change the distribution the log-probs are of: they stand aside meanwhile.
        own_config, model.generation_config = model.generation_config, config
        try:
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([recorder]),
                **past,
            )
        finally:
            model.generation_config = own_config
        recorder.collect(out)
        logp = torch.stack(recorder.logp, dim=1).tolist()
        tokens = out[:, width:].tolist()
        rollouts = []
        for r, i in enumerate(rows):
            completion = tokens[r]
            finished = self.eos in completion
            if finished:
                completion = completion[: completion.index(self.eos) + 1]
            rollouts.append(
                Rollout(i, prompts[i], completion, logp[r][: len(completion)], finished)
            )
        return rollouts
