"""Activation checkpointing: a layer keeps its input and is run again when gradients are due.

`transformers` has a switch of its own, which looks at `training`: policy training runs in eval mode
(no dropout, so that log pi is that of the policy which sampled) and would keep everything. Here it
is gradients being recorded that decides, and generation is left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastalign.errors import UserError


def recompute_activations(model: nn.Module) -> None:
    """Every layer of a `transformers` model recomputes its activations in the backward pass.

    The same gradients, bit for bit, with the activations of one layer and the inputs of all in
    memory, for one more forward pass.

    Raises:
        UserError: the model has no layers that `transformers` knows as such.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{type(model).__name__} has no layers that could be checkpointed")
    for layer in layers:
        # Of `forward`, not of the call: hooks (FSDP's, say) stay outside and run once.
        layer.forward = functools.partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
