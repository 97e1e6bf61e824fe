"""Ragged sequences side by side without padding, and batches of them under a token budget.

Sequences in a row that answer one prompt can hold it once: the first one whole, of the others what
comes after the prompt, which they read where it lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastalign.streams import stream


@dataclass(frozen=True)
class Shared:
    """Which sequences of a pack read a prompt that another one holds."""

    spans: tuple[tuple[int, int], ...]
    """Of each of the S sequences: where that prompt begins in the pack, and its tokens; (0, 0) of a
    sequence that holds all it reads"""
    keys: Tensor
    """int64 [K], the places that each sequence reads, its prompt's first, sequence by sequence"""
    cu_seqlens: Tensor
    """int32 [S + 1], where each sequence's places start among these, and K"""

    def to(self, device: torch.device | str) -> Shared:
        """See `Packed.to`."""
        keys, cu_seqlens = (_moved(t, device) for t in (self.keys, self.cu_seqlens))
        return replace(self, keys=keys, cu_seqlens=cu_seqlens)


@dataclass(frozen=True)
class Packed:
    """S sequences that hold N tokens in all, one after the other.

    A token predicts the next one of its sequence; the last token of a shared prompt predicts the
    first one after it of every sequence that reads it. Rows of predictions that count go sequence
    by sequence, whether or not prompts are shared.

    What decides the shape of later tensors (``lengths``, ``kept``, ``max_seqlen``) is found once,
    on the CPU: read from a CUDA tensor it would make the host wait at every use.
    """

    input_ids: Tensor
    """int64 [N]"""
    position_ids: Tensor
    """int64 [N], 0, 1, 2, ... within each sequence, its prompt counted wherever that lies"""
    cu_seqlens: Tensor
    """int32 [S + 1], where what each sequence holds starts, and N"""
    max_seqlen: int
    """length of the longest sequence with its prompt, tokens"""
    kept: Tensor
    """int64 [M], the places whose next token counts, sequence by sequence"""
    response_targets: Tensor
    """int64 [M], that token"""
    lengths: tuple[int, ...]
    """S numbers of tokens held"""
    shared: Shared | None = None
    """None: every sequence holds all it reads"""

    def to(self, device: torch.device | str) -> Packed:
        """The tensors on another device; towards CUDA without waiting for it."""
        tensors = ("input_ids", "position_ids", "cu_seqlens", "kept", "response_targets")
        shared = None if self.shared is None else self.shared.to(device)
        moved: dict[str, Any] = {name: _moved(getattr(self, name), device) for name in tensors}
        return replace(self, **moved, shared=shared)

    @property
    def n_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def last_index(self) -> Tensor:
        """int64 [S]: the place of each sequence's last token in the pack."""
        return self.cu_seqlens[1:].long() - 1


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def pack(
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int] | None = None,
    *,
    share: bool = False,
) -> Packed:
    """Lays sequences side by side.

    Args:
        sequences: S lists of token ids, none empty.
        prompt_lengths: S numbers of leading tokens that are not predicted (each at most the length
            of its sequence; 0 is the same as 1, because nothing predicts a first token). None: all
            tokens but the first are predicted.
        share: sequences in a row whose prompts are the same tokens hold them once. For causal
            models: of others a prompt's states depend on what comes after it.

    Raises:
        ValueError: an empty sequence, or prompt lengths that do not fit the sequences.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    if sequences and not bool((lengths > 0).all()):
        empty = [i for i, sequence in enumerate(sequences) if not len(sequence)]
        raise ValueError(
            f"pack: expected sequences of at least one token, got empty ones at {empty}"
        )
    if prompt_lengths is None:
        prompts = torch.zeros_like(lengths)
    else:
        prompts = torch.tensor(list(prompt_lengths), dtype=torch.int64)
        if prompts.shape != lengths.shape:
            raise ValueError(
                f"pack: expected one prompt length per sequence ({len(sequences)}), "
                f"got {len(prompt_lengths)}"
            )
        bad = ((prompts < 0) | (prompts > lengths)).nonzero().flatten()
        if bad.numel():
            i = int(bad[0])
            raise ValueError(
                f"pack: expected 0 <= prompt length <= {int(lengths[i])} for sequence {i}, "
                f"got {int(prompts[i])}"
            )
    spans = _spans(sequences, prompts.tolist()) if share else ((0, 0),) * len(sequences)
    begins, before = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2).unbind(1)
    held = lengths - before
    cu_seqlens = torch.zeros(len(sequences) + 1, dtype=torch.int32)
    cu_seqlens[1:] = held.cumsum(0)
    # Token t of a sequence that holds all from `before` on lies at offset + t.
    offsets = cu_seqlens[:-1].long() - before
    input_ids = torch.tensor(
        [t for s, (_, n) in zip(sequences, spans, strict=True) for t in s[n:]], dtype=torch.int64
    )
    position_ids = torch.arange(input_ids.numel()) - offsets.repeat_interleave(held)
    row, token = _ranges(prompts.clamp(min=1), lengths)
    kept = token - 1 + torch.where(token == before[row], begins[row], offsets[row])
    response_targets = input_ids[token + offsets[row]]
    shared = None
    if any(n for _, n in spans):
        row, token = _ranges(torch.zeros_like(lengths), lengths)
        keys = token + torch.where(token < before[row], begins[row], offsets[row])
        shared = Shared(spans, keys, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int())
    return Packed(
        input_ids,
        position_ids,
        cu_seqlens,
        max(lengths.tolist(), default=0),
        kept,
        response_targets,
        tuple(held.tolist()),
        shared,
    )


def _spans(sequences: Sequence[Sequence[int]], prompts: list[int]) -> tuple[tuple[int, int], ...]:
    """See `Shared`. A sequence that is a prompt and nothing else holds it."""
    found: list[tuple[int, int]] = []
    place = begin = 0
    holder: Sequence[int] = ()
    for sequence, n in zip(sequences, prompts, strict=True):
        prompt = list(sequence[:n])
        if 0 < n < len(sequence) and prompt == holder:
            found.append((begin, n))
            place += len(sequence) - n
        else:
            found.append((0, 0))
            holder, begin = prompt, place
            place += len(sequence)
    return tuple(found)


def _ranges(first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """first[0], ..., end[0] - 1, first[1], ...: of each its row and itself, int64."""
    sizes = (end - first).clamp(min=0)
    rows = torch.arange(len(sizes)).repeat_interleave(sizes)
    starts = sizes.cumsum(0) - sizes
    return rows, torch.arange(rows.numel()) + (first - starts)[rows]


@dataclass(frozen=True)
class Prompts:
    """The prompts of many sequences."""

    ids: Sequence[int]
    """The same number where it is the same prompt."""
    lengths: Sequence[int]
    """Tokens."""

    def of(self, rows: Sequence[int]) -> Prompts:
        """Those of some of the sequences."""
        return Prompts([self.ids[i] for i in rows], [self.lengths[i] for i in rows])


def same_prompts(prompts: Iterable[Sequence[int]]) -> Prompts:
    """By their tokens."""
    numbers: dict[tuple[int, ...], int] = {}
    asked = [tuple(prompt) for prompt in prompts]
    return Prompts([numbers.setdefault(p, len(numbers)) for p in asked], [len(p) for p in asked])


def held(
    passes: Iterable[Sequence[int]], lengths: Sequence[int], prompts: Prompts | None
) -> tuple[list[int], list[int]]:
    """What is in packs of these sequences, in this order.

    Args:
        passes: the sequences of each pack.
        lengths: tokens of each sequence there is.
        prompts: of each sequence there is; None where none is shared.

    Returns:
        Of every sequence in turn the tokens it holds, and those of the prompt it reads elsewhere.
    """
    own, before = list[int](), list[int]()
    for rows in passes:
        last = None
        for i in rows:
            same = prompts is not None and prompts.ids[i] == last
            before.append(prompts.lengths[i] if prompts is not None and same else 0)
            own.append(lengths[i] - before[-1])
            last = None if prompts is None else prompts.ids[i]
    return own, before


def token_budget_batches(
    lengths: Sequence[int],
    budget: int,
    *,
    generator: torch.Generator | None = None,
    prompts: Prompts | None = None,
) -> list[list[int]]:
    """Splits indices into batches of at most ``budget`` tokens.

    Args:
        lengths: tokens of each sequence.
        budget: most tokens per batch. A longer sequence is a batch of its own.
        generator: shuffles the sequences first; None keeps their order. Lengths are not sorted:
            packs have no padding to save, and a batch of like lengths is a batch of like data.
        prompts: of each sequence, where those of one prompt are to share it: they come one after
            the other, where the first of them stands, in one batch if it has room for them all. A
            prompt counts once in a batch.

    Returns:
        Batches of indices, each index once; the same for the same generator state.

    Raises:
        ValueError: a budget below 1, or a length below 1.
    """
    if budget < 1:
        raise ValueError(f"token_budget_batches: expected budget >= 1, got {budget}")
    if any(length < 1 for length in lengths):
        raise ValueError(f"token_budget_batches: expected lengths >= 1, got {min(lengths)}")
    order = list(range(len(lengths)))
    if generator is not None:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    groups: dict[int, list[int]] = {}
    for i in order:
        groups.setdefault(i if prompts is None else prompts.ids[i], []).append(i)
    batches: list[list[int]] = []
    tokens = 0
    for group in groups.values():
        if not batches or tokens + sum(held([group], lengths, prompts)[0]) > budget:
            batches.append([])
            tokens = 0
        for n, i in enumerate(group):
            size = lengths[i] - (prompts.lengths[i] if prompts is not None and n else 0)
            if n and tokens + size > budget:
                batches.append([])
                tokens, size = 0, lengths[i]
            batches[-1].append(i)
            tokens += size
    return batches


def batches_of(
    rows: Sequence[int], lengths: Sequence[int], budget: int, prompts: Prompts | None = None
) -> list[list[int]]:
    """``token_budget_batches`` of some of the sequences, in this order; ``lengths`` and ``prompts``
    are those of all."""
    own = None if prompts is None else prompts.of(rows)
    found = token_budget_batches([lengths[i] for i in rows], budget, prompts=own)
    return [[rows[i] for i in batch] for batch in found]


def epochs_of_batches(
    lengths: Sequence[int], epochs: int, budget: int, seed: int
) -> list[list[int]]:
    """The batches of all epochs in a row, each epoch in the order of its own random stream.

    Args and errors are those of ``token_budget_batches``.
    """
    return [
        batch
        for epoch in range(epochs)
        for batch in token_budget_batches(lengths, budget, generator=stream(seed, "order", epoch))
    ]
