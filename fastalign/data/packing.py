"""Ragged sequences side by side without padding, and batches of them under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastalign.streams import stream

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Packed:
    """S sequences of N tokens in all, one after the other.

    Token t of a sequence predicts token t + 1 of the same sequence: where the loss counts,
    ``targets[t] = input_ids[t + 1]``; elsewhere, and on every last token, -100.

    What decides the shape of later tensors (``lengths``, ``kept``, ``max_seqlen``) is found once,
    on the CPU: read from a CUDA tensor it would make the host wait at every use.
    """

    input_ids: Tensor
    """int64 [N]"""
    position_ids: Tensor
    """int64 [N], 0, 1, 2, ... within each sequence"""
    cu_seqlens: Tensor
    """int32 [S + 1], where each sequence starts, and N"""
    max_seqlen: int
    """length of the longest sequence, tokens"""
    targets: Tensor
    """int64 [N], the next token where the loss counts, -100 elsewhere"""
    kept: Tensor
    """int64 [M], the places where it counts, rising"""
    lengths: tuple[int, ...]
    """S lengths, tokens"""

    def to(self, device: torch.device | str) -> Packed:
        """The tensors on another device; towards CUDA without waiting for it."""
        tensors = ("input_ids", "position_ids", "cu_seqlens", "targets", "kept")
        ahead = torch.device(device).type == "cuda"
        return replace(
            self, **{name: getattr(self, name).to(device, non_blocking=ahead) for name in tensors}
        )

    @property
    def n_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def response_targets(self) -> Tensor:
        """int64 [M]: the targets that count."""
        return self.targets.index_select(0, self.kept)

    @property
    def last_index(self) -> Tensor:
        """int64 [S]: the place of each sequence's last token in the pack."""
        return self.cu_seqlens[1:].long() - 1


def pack(sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None = None) -> Packed:
    """Lays sequences side by side.

    Args:
        sequences: S lists of token ids, none empty.
        prompt_lengths: S numbers of leading tokens that are not predicted (each at most the length
            of its sequence; 0 is the same as 1, because nothing predicts a first token). None: all
            tokens but the first are predicted.

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
    cu_seqlens = torch.zeros(len(sequences) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    starts = cu_seqlens[:-1].long().repeat_interleave(lengths)
    input_ids = torch.tensor(
        [token for sequence in sequences for token in sequence], dtype=torch.int64
    )
    position_ids = torch.arange(input_ids.numel()) - starts
    targets = input_ids.roll(-1)
    following = position_ids + 1
    counts = (following < lengths.repeat_interleave(lengths)) & (
        following >= prompts.repeat_interleave(lengths)
    )
    targets[~counts] = IGNORE_INDEX
    return Packed(
        input_ids,
        position_ids,
        cu_seqlens,
        max(lengths.tolist(), default=0),
        targets,
        counts.nonzero()[:, 0],
        tuple(lengths.tolist()),
    )


def token_budget_batches(
    lengths: Sequence[int],
    budget: int,
    *,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Splits indices into batches of at most ``budget`` tokens.

    Args:
        lengths: tokens of each sequence.
        budget: most tokens per batch. A longer sequence is a batch of its own.
        generator: shuffles the sequences first; None keeps their order. Lengths are not sorted:
            packs have no padding to save, and a batch of like lengths is a batch of like data.

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
    batches: list[list[int]] = []
    tokens = 0
    for i in order:
        if not batches or tokens + lengths[i] > budget:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


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
