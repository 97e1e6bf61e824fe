"""Attention over packed sequences, plugged into any `transformers` backbone.

A pack is one row of N tokens: sequence after sequence, `cu_seqlens` marking where each begins, no
padding. The cost is the sum of the squares of the lengths, never the square of the sum: no N x N
mask is made. What computes it is `attention_kernels`' to say; which one runs is logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.errors import UserError
from fastalign.models import attention_kernels

NAME = "fastalign_packed"
log = logging.getLogger("fastalign")
_announced: set[str] = set()
_trying = False  # check_packed is at work, which says nothing of what will run


def _announce(what: str) -> None:
    if what not in _announced and not _trying:
        _announced.add(what)
        log.info("packed attention: %s", what)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    segment_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with `transformers` under the name `fastalign_packed`.

    Args:
        query, key, value: [1, heads, N, d] (fewer key/value heads than query heads are allowed).
        cu_seq_lens_q: int32 [S + 1]; segment_lengths: the same as S lengths on the host.

    Returns:
        ([1, N, heads, d], None).

    Raises:
        ValueError: no segments were given.
        UserError: the model needs a sliding window shorter than a segment, a soft-cap or a position
            bias, which packed attention does not have; or the kernel asked for does not run here.
    """
    if cu_seq_lens_q is None or segment_lengths is None or max_length_q is None:
        raise ValueError("packed attention: expected cu_seq_lens_q, max_length_q, segment_lengths")
    window = kwargs.get("sliding_window")
    if window is not None and window < max_length_q:
        raise UserError(
            f"packed attention: the model's sliding window is {window} tokens, a sequence has "
            f"{max_length_q}; expected sequences no longer than the window"
        )
    for name in ("softcap", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise UserError(f"packed attention: the model needs {name}, which is not supported")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary embeddings leave queries and keys in fp32
        low = torch.get_autocast_dtype(kind)
        query, key, value = query.to(low), key.to(low), value.to(low)
    name = attention_kernels.chosen(query, dropout)
    _announce(f"{name} ({kind}, {query.dtype})")
    options = {"dropout": dropout} if name == "sdpa" else {}
    out = attention_kernels.KERNELS[name](
        query, key, value, cu_seq_lens_q, segment_lengths, scale, causal, **options
    )
    return out, None


@torch.no_grad()
def check_packed(
    model: Any, packed: Callable[[Any], Tensor], alone: Callable[[Tensor], Tensor]
) -> None:
    """Refuses a model that is not the same function on a pack as on its sequences one by one.

    Position offsets of its own, state that runs on from one sequence to the next, or another head
    than the one taken for it would all train something else without a word.

    Args:
        model: whose attention is switched to `transformers`' own for `alone`.
        packed: [N, ...] rows of a pack; alone: [1, T, ...] rows of int64 ids [1, T].

    Raises:
        UserError: the rows differ by more than rounding.
    """
    from fastalign.data.packing import pack

    device = model.get_input_embeddings().weight.device
    vocab = model.config.vocab_size
    sequences = [[i * 37 % vocab for i in range(3)], [(i * 53 + 1) % vocab for i in range(5)]]
    was_training = model.training
    model.eval()
    with _trial():
        together = packed(pack(sequences).to(device))
    with attention(model, "sdpa"):
        apart = torch.cat([alone(torch.tensor([s], device=device))[0] for s in sequences])
    model.train(was_training)
    error = ((together - apart).abs().max() / apart.abs().max().clamp_min(1e-6)).item()
    if not error < 1e-2:
        raise UserError(
            f"{type(model).__name__}: a pack does not give what its sequences give one by one "
            f"(relative difference {error:.2g}); such models are not supported"
        )


@contextmanager
def _trial() -> Iterator[None]:
    """Inside, packs go through SDPA, which takes any dtype and device: it is the model that is
    asked here, not a kernel."""
    global _trying
    _trying = True
    try:
        with attention_kernels.using("sdpa"):
            yield
    finally:
        _trying = False


@contextmanager
def attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Inside, the `transformers` model runs its attention by `implementation`."""
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def register() -> None:
    """Makes `fastalign_packed` known to `transformers`. No mask function: no mask is ever built."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_hidden(backbone: nn.Module, packed: Any) -> Tensor:
    """Last hidden states [N, H] of a `fastalign.data.packing.Packed`: one forward, no padding, and
    no wait for the device."""
    cu = packed.cu_seqlens
    out = backbone(
        input_ids=packed.input_ids.unsqueeze(0),
        position_ids=packed.position_ids.unsqueeze(0),
        use_cache=False,
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu,
        max_length_q=packed.max_seqlen,
        max_length_k=packed.max_seqlen,
        segment_lengths=packed.lengths,
    )
    return out.last_hidden_state.squeeze(0)
