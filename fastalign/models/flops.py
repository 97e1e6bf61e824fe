"""Floating-point operations of a model's passes, from its matrices and the lengths of a pack.

A product of [n, a] with [a, b] counts 2 n a b. Of a forward pass:

    matrices of the trunk    2 * elements * tokens; of a mixture, the experts a token meets
    attention                4 * heads * head width * sum of T^2 over the sequences, a layer;
                             half of that where a token sees only those before it; less the P^2 of
                             a prompt of P tokens for every sequence that reads it in another one
    head                     2 * elements * rows at which it is applied

Norms, activations, rotary embeddings and the softmax are left out, and so is what padding or
recomputation would cost: these are the FLOPs of the model, not those of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from torch import Tensor, nn

UNCOUNTED = ("kv_lora_rank", "num_hidden_groups", "linear_num_key_heads", "mamba_d_state")


def forward_flops(
    model: nn.Module, lengths: Sequence[int], head_rows: int, before: Sequence[int] = ()
) -> float:
    """FLOPs of one forward pass over a pack.

    Args:
        model: a `Policy`, a `RewardEnsemble` or a `transformers` model.
        lengths: tokens that each sequence holds.
        head_rows: rows at which the head (of the language model, or the reward heads) is applied.
        before: tokens of the prompt that each one reads in another; none without.

    Returns:
        The count; NaN where the model has parts whose count is not known (latent or linear
        attention, layers that share weights, convolutions).
    """
    sizes = _sizes(model)
    attention = _squares(lengths, before) * sizes.attention
    return sum(lengths) * sizes.trunk + attention + head_rows * sizes.head


def training_flops(
    model: nn.Module, lengths: Sequence[int], head_rows: int, before: Sequence[int] = ()
) -> float:
    """FLOPs of a forward and a backward pass over a pack; arguments as `forward_flops`.

    Each product has two in the backward pass: one for the gradient of its input, one for that of
    its weight. Frozen weights have none of the latter, and a trunk that is frozen as a whole no
    backward pass at all.
    """
    sizes = _sizes(model)
    found = forward_flops(model, lengths, head_rows, before)
    if sizes.trained > 0:
        found += sum(lengths) * (sizes.trunk + sizes.trained) + head_rows * sizes.head
        found += 2 * _squares(lengths, before) * sizes.attention
    if sizes.head_is_trained:
        found += head_rows * sizes.head
    return found


def _squares(lengths: Sequence[int], before: Sequence[int]) -> int:
    """Pairs of a query and a key, twice over where a token sees only those before it."""
    return sum((t + p) ** 2 - p * p for t, p in zip_longest(lengths, before, fillvalue=0))


class _Sizes(NamedTuple):
    trunk: float
    """FLOPs of the trunk's matrices, a token."""
    trained: float
    """Those of its trained ones."""
    attention: float
    """A T^2, all layers together."""
    head: float
    """A row."""
    head_is_trained: bool


def _sizes(model: nn.Module) -> _Sizes:
    trunk, head = _parts(model)
    config: Any = trunk.config
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in counts if (n := getattr(config, name, None))), None)
    elements = trained = 0.0
    for path, module in trunk.named_modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Embedding) or any(p is head for p in own):
            continue
        for parameter in own:
            size: float = parameter.numel() if parameter.ndim > 1 else 0
            if experts and "experts" in path.split("."):
                size *= config.num_experts_per_tok / experts
            elif parameter.ndim > 2:
                size = math.nan
            elements += size
            trained += size * parameter.requires_grad
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4.0 * heads * width * config.num_hidden_layers
    if any(getattr(module, "is_causal", False) for module in trunk.modules()):
        attention /= 2
    if any(getattr(config, name, None) for name in UNCOUNTED):
        attention = math.nan
    return _Sizes(2 * elements, 2 * trained, attention, 2.0 * head.numel(), head.requires_grad)


def _parts(model: Any) -> tuple[Any, Tensor]:
    """The `transformers` model, and the weight of the head."""
    if hasattr(model, "encoder") and hasattr(model, "weight"):
        return model.encoder, model.weight
    if hasattr(model, "trunk"):
        return model.trunk, next(model.head.parameters())
    if hasattr(model, "head_weight"):
        return model.model, model.head_weight
    return model, model.get_output_embeddings().weight
