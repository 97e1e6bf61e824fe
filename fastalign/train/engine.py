"""What samples during training: the engine that the configuration names, and its random stream."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastalign.models import Policy, lora
from fastalign.rollout import Engine, TransformersEngine
from fastalign.streams import stream
from fastalign.train import distributed


class EngineOptions(Protocol):
    """What of a command's configuration is read here."""

    engine: str
    engine_memory: float
    output: str


def make_engine(config: EngineOptions, policy: Policy, tokenizer: Any) -> Engine:
    """What samples from the policy, which is not sharded yet.

    Raises:
        UserError: vLLM is not here, or there is no GPU for it.
    """
    if config.engine == "vllm":
        from fastalign.rollout.vllm import VLLMEngine

        folder = Path(config.output) / "engine"
        weights = lambda: policy_weights(policy)  # noqa: E731
        return VLLMEngine(policy, tokenizer, weights, folder, config.engine_memory)
    return whole_engine(policy, tokenizer)


def whole_engine(policy: Policy, tokenizer: Any) -> TransformersEngine:
    """Samples by `transformers`; of several processes each has a whole copy of the policy for it,
    because its own weights will be spread over them."""
    if distributed.world().size == 1:
        return TransformersEngine(policy, tokenizer)
    # What is frozen (all but a LoRA adapter) is the reference's as well.
    frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
    copy = deepcopy(policy, frozen).requires_grad_(False).eval()
    return TransformersEngine(copy, tokenizer, trained=policy)


def policy_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The language model's whole weights under their `transformers` names, a LoRA adapter merged
    into them."""
    if lora.has_adapter(policy.model):
        yield from lora.merged_weights(policy.model, distributed.whole).items()
        return
    for name, parameter in policy.model.named_parameters():
        yield name, distributed.whole(parameter.detach())


def seed_draws(seed: int, name: str) -> None:
    """Sets torch's random state, which sampling draws from, to a stream of that name; every process
    has its own."""
    rank = distributed.world().rank
    names = (name,) if rank == 0 else (name, rank)
    torch.manual_seed(stream(seed, *names).initial_seed())
