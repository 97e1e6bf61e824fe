"""Attention over packed sequences, plugged into any `transformers` backbone.

A pack is one row of N tokens: sequence after sequence, `cu_seqlens` marking where each begins, no
padding. The cost is the sum of the squares of the lengths, never the square of the sum: no N x N
mask is made. What computes it is `attention_kernels`' to say; which one runs is logged once.

A causal model reads a prompt that several sequences share once (`pack(..., share=True)`): its
states do not depend on what comes after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.data.packing import Packed, Shared, pack
from fastalign.errors import UserError
from fastalign.models import attention_kernels

NAME = "fastalign_packed"
log = logging.getLogger("fastalign")
_announced: set[str] = set()
TOLERANCE = 1e-2
"""Relative difference of `check_packed`, with room for bfloat16."""
_trying = False  # check_packed is at work, which says nothing of what will run


class NotCausal(ValueError):
    """A prompt is shared in attention that looks ahead."""


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
    shared_prompts: Shared | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with `transformers` under the name `fastalign_packed`.

    Args:
        query, key, value: [1, heads, N, d] (fewer key/value heads than query heads are allowed).
        cu_seq_lens_q: int32 [S + 1]; segment_lengths: the same as S lengths on the host.
        max_length_q: of the longest sequence, its prompt counted wherever that lies.
        shared_prompts: which sequences read a prompt that another one holds.

    Returns:
        ([1, N, heads, d], None).

    Raises:
        ValueError: no segments were given.
        NotCausal: a prompt is shared, and its states would depend on what comes after it.
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
    if shared_prompts is not None and not causal:
        raise NotCausal("packed attention: only causal attention can share prompts")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary embeddings leave queries and keys in fp32
        low = torch.get_autocast_dtype(kind)
        query, key, value = query.to(low), key.to(low), value.to(low)
    name = attention_kernels.chosen(query, dropout)
    _announce(f"{name} ({kind}, {query.dtype})")
    options: dict[str, Any] = {"dropout": dropout} if name == "sdpa" else {}
    if shared_prompts is not None:
        options["shared"] = shared_prompts
    out = attention_kernels.KERNELS[name](
        query, key, value, cu_seq_lens_q, segment_lengths, scale, causal, **options
    )
    return out, None


@torch.no_grad()
def check_packed(
    model: Any, packed: Callable[[Any], Tensor], alone: Callable[[Tensor], Tensor]
) -> bool:
    """Refuses a model that is not the same function on a pack as on its sequences one by one.

    Position offsets of its own, state that runs on from one sequence to the next, or another head
    than the one taken for it would all train something else without a word.

    Args:
        model: whose attention is switched to `transformers`' own for `alone`.
        packed: [N, ...] rows of a pack; alone: [1, T, ...] rows of int64 ids [1, T].

    Returns:
        Whether it is so too where a prompt is shared, as of all models that are causal and know a
        token's place by its position id.

    Raises:
        UserError: the rows differ by more than rounding.
    """
    device = model.get_input_embeddings().weight.device
    vocab = model.config.vocab_size
    sequences = [[i * 37 % vocab for i in range(3)], [(i * 53 + 1) % vocab for i in range(5)]]
    answers = [[*sequences[0], (i * 29 + 2) % vocab] for i in range(2)]
    was_training = model.training
    model.eval()
    with _trial():
        together = packed(pack(sequences).to(device))
        try:
            shared = packed(pack(answers, [3, 3], share=True).to(device))
        except NotCausal:
            shared = None
    with attention(model, "sdpa"):
        apart, answered = (
            [alone(torch.tensor([s], device=device))[0] for s in ids]
            for ids in (sequences, answers)
        )
    model.train(was_training)
    error = _difference(together, torch.cat(apart))
    if not error < TOLERANCE:
        raise UserError(
            f"{type(model).__name__}: a pack does not give what its sequences give one by one "
            f"(relative difference {error:.2g}); such models are not supported"
        )
    if shared is None:
        return False
    return _difference(shared, torch.cat([answered[0], answered[1][3:]])) < TOLERANCE


def _difference(found: Tensor, truth: Tensor) -> float:
    """The largest, relative to the largest of `truth`."""
    return ((found - truth).abs().max() / truth.abs().max().clamp_min(1e-6)).item()


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


def packed_hidden(backbone: nn.Module, packed: Packed) -> Tensor:
    """Last hidden states [N, H] of a pack: one forward, no padding, and no wait for the device."""
    cu = packed.cu_seqlens
    options = {} if packed.shared is None else {"shared_prompts": packed.shared}
    out = backbone(
        input_ids=packed.input_ids.unsqueeze(0),
        position_ids=packed.position_ids.unsqueeze(0),
        use_cache=False,
        cu_seq_lens_q=cu,
        cu_seq_lens_k=cu,
        max_length_q=packed.max_seqlen,
        max_length_k=packed.max_seqlen,
        segment_lengths=packed.lengths,
        **options,
    )
    return out.last_hidden_state.squeeze(0)
