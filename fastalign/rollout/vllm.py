"""Rollouts by vLLM, in the process of the trainer (extra `vllm`; needs a GPU).

The engine holds a copy of the weights in half precision. `sync` pushes the trainer's into it after
each update, and the first responses afterwards are checked against the trainer's own log-probs: an
engine that missed an update would sample from an old policy without a word.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.errors import UserError
from fastalign.models.policy import Policy
from fastalign.rollout import agreement
from fastalign.rollout.engine import Rollout, SamplingConfig
from fastalign.train.distributed import world

log = logging.getLogger("fastalign")
Weights = Callable[[], Iterable[tuple[str, Tensor]]]


class VLLMEngine:
    """Samples by vLLM from a copy of a `Policy`.

    Args:
        policy: what is trained; on a GPU.
        tokenizer: gives the end-of-sequence id.
        weights: the language model's whole weights under their `transformers` names.
        folder: where the model's configuration may be written for vLLM to read.
        memory_share: of the GPU's memory, for the engine's weights and its cache.

    Raises:
        UserError: vLLM is not installed, or the policy is not on a GPU.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        weights: Weights,
        folder: Path,
        memory_share: float = 0.3,
    ) -> None:
        device = next(policy.parameters()).device
        if device.type != "cuda":
            raise UserError(
                f"engine vllm: expected a policy on a GPU, got one on {device}; "
                "take --engine transformers"
            )
        # One process: weights are handed over by reference, not pickled into another.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self._vllm = _vllm()
        self.policy, self.weights = policy, weights
        self.eos = int(tokenizer.eos_token_id)
        folder.mkdir(parents=True, exist_ok=True)
        policy.model.config.save_pretrained(folder)
        options: dict[str, Any] = {}
        if world().size > 1:  # every process an engine of its own, beside the trainer's group
            options["distributed_executor_backend"] = "external_launcher"
        self.llm = self._vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=policy.max_length,
            gpu_memory_utilization=memory_share,
            logprobs_mode="processed_logprobs",
            seed=world().rank,
            disable_log_stats=True,
            **options,
        )
        self.gap = 0.0
        self.sync()

    def sync(self) -> None:
        """Pushes the policy's weights into the engine and forgets cached prefixes."""
        with torch.no_grad():
            named = list(self.weights())
            self.llm.apply_model(lambda model: bool(model.load_weights(iter(named))))
        self.llm.reset_prefix_cache()
        self._unchecked = True

    def generate(
        self, prompts: list[list[int]], n_samples: int, sampling: SamplingConfig
    ) -> list[Rollout]:
        """`n_samples` responses to each prompt; their seeds come from torch's global random state.

        Raises:
            Disagreement: these are the first responses after a `sync`, and the policy gives their
                tokens other log-probs.
        """
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        parameters = [
            self._vllm.SamplingParams(
                n=n_samples,
                temperature=sampling.temperature,
                top_p=1.0,
                top_k=0,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=[self.eos],
                logprobs=0,
                seed=seed,
                detokenize=False,
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = self.llm.generate(requests, parameters, use_tqdm=False)
        rollouts = [
            _rollout(i, prompt, one)
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            for one in sorted(answer.outputs, key=lambda one: one.index)
        ]
        if self._unchecked and rollouts:
            self.gap = agreement.check(self.policy, rollouts, sampling.temperature, "vLLM")
            self._unchecked = False
        return rollouts


def _rollout(index: int, prompt: list[int], one: Any) -> Rollout:
    tokens = list(one.token_ids)
    logp = [step[token].logprob for token, step in zip(tokens, one.logprobs, strict=True)]
    return Rollout(index, prompt, tokens, logp, one.finish_reason == "stop")


def _vllm() -> Any:
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UserError(
            "engine vllm: vLLM is not installed; pip install 'fastalign[vllm]', or take "
            "--engine transformers"
        ) from error
    return vllm
