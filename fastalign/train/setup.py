"""Loading the model to train, as the configuration wants it: where, and what is kept of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastalign.models import Policy, attention_kernels
from fastalign.models.lora import add_adapter
from fastalign.models.recompute import recompute_activations
from fastalign.train.allocator import keep_freed_memory
from fastalign.train.optim import OptimConfig


def load_policy(
    config: OptimConfig,
    source: str,
    tokenizer: Any,
    *,
    device: torch.device,
    max_length: int = 512,
    value_head: bool = False,
) -> Policy:
    """The policy at `source`, ready to be trained on `device`.

    Args:
        config: what to do with its trunk, see `prepare_trunk`.
        source: `scratch:NAME` (random weights by the current torch seed), a local folder, a hub id.
        tokenizer: of the policy.
        device: where it goes.
        max_length: context in tokens, where the model is made from scratch.
        value_head: whether it has one.

    Raises:
        UserError: nothing there that loads, a vocabulary smaller than the tokenizer's, or a model
            that cannot be trained so.
    """
    policy = Policy.load(source, tokenizer, max_length=max_length, value_head=value_head)
    prepare_trunk(config, policy.model)
    return policy.to(device)


def prepare_trunk(config: OptimConfig, model: nn.Module) -> None:
    """Makes a `transformers` model, a policy's or a reward ensemble's encoder, what `config` asks.

    Raises:
        UserError: the model cannot have the adapter, or no layers to recompute activations of.
    """
    keep_freed_memory()
    attention_kernels.use(config.attention)
    if config.lora.rank:
        add_adapter(model, config.lora)
    if config.activation_checkpointing:
        recompute_activations(model)
