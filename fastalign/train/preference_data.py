"""What preference losses train on: pairs of responses, or single ones with a label.

A batch is chosen by example, a pair or a single response; its sequences lie in one pack, chosen and
rejected of a pair side by side, which a model that can reads after one prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastalign.data import source
from fastalign.data.files import DataError
from fastalign.data.formats import Completion
from fastalign.data.packing import Packed, Prompts, held, pack, same_prompts
from fastalign.data.tokens import (
    TokenizedCompletion,
    TokenizedPreference,
    tokenize_completions,
    tokenize_preferences,
)
from fastalign.data.unpaired import is_paired, read_unpaired
from fastalign.losses import KTO, XPO
from fastalign.losses.preference import PreferenceLoss
from fastalign.train.run import RunError

log = logging.getLogger("fastalign")


class Responses:
    """Responses to prompts, as token ids, packed on demand.

    ``ref_logp`` holds the reference's log-probs of all response tokens, fp32 [T] in the order of
    the sequences, once something has computed them.
    """

    def __init__(self, items: Sequence[TokenizedCompletion]) -> None:
        self.items = items
        self.lengths = [len(item.prompt) + len(item.completion) for item in items]
        self.counts = [len(item.completion) for item in items]
        self.starts = [0, *accumulate(self.counts)]
        self.ref_logp: Tensor | None = None
        self.prompts: Prompts | None = None
        """None: no prompt is shared"""

    def __len__(self) -> int:
        return len(self.items)

    def pack(self, rows: Sequence[int]) -> Packed:
        """One pack whose targets are the response tokens."""
        chosen = [self.items[i] for i in rows]
        prompts = [len(e.prompt) for e in chosen]
        share = self.prompts is not None
        return pack([e.prompt + e.completion for e in chosen], prompts, share=share)

    def bounds(self, rows: Sequence[int]) -> Tensor:
        """int64 [rows + 1]: where each response starts among the pack's targets that count."""
        return torch.tensor([0, *accumulate(self.counts[i] for i in rows)])

    def size(self, passes: Sequence[Sequence[int]]) -> tuple[list[int], int, list[int]]:
        """Of packs of these sequences: tokens that each sequence holds, response tokens in all, and
        tokens of the prompt that each one reads in another."""
        own, before = held(passes, self.lengths, self.prompts)
        return own, sum(self.counts[i] for rows in passes for i in rows), before

    def stored(self, rows: Sequence[int]) -> Tensor:
        """fp32, the reference's log-probs of these responses' tokens."""
        assert self.ref_logp is not None
        return torch.cat([self.ref_logp[self.starts[i] : self.starts[i + 1]] for i in rows])


@dataclass
class Examples:
    """E examples of one response each, or of two: chosen, rejected."""

    responses: Responses
    per_example: int
    flags: Tensor | None = None
    """bool [E]: of a pair, whether the chosen response is the reference's (None: not known); of a
    single response, whether it is desirable."""
    strangers: Responses | None = None
    """Of single responses: each one's prompt with the answer to another prompt."""
    split: bool = False
    """Single responses that are pairs split up, chosen and rejected in turn."""
    lengths: list[int] = field(init=False)
    """Tokens of each example, the prompt of every response counted."""
    packed_lengths: list[int] = field(init=False)
    """The same, a prompt counted once where its responses share it."""
    prompts: Prompts | None = field(init=False)
    """Of each example, where they are shared."""

    def __post_init__(self) -> None:
        lengths = [sum(self.responses.lengths[i] for i in self.rows([e])) for e in range(len(self))]
        self.lengths = self.packed_lengths = lengths
        self.prompts = None

    def share_prompts(self) -> None:
        """From now on the responses of a pair, and pairs of one prompt, share it in a pack."""
        self.responses.prompts = same_prompts(item.prompt for item in self.responses.items)
        self.packed_lengths = [
            sum(self.responses.size([self.rows([e])])[0]) for e in range(len(self))
        ]
        self.prompts = self.responses.prompts.of(self.rows(range(len(self)))[:: self.per_example])

    def __len__(self) -> int:
        return len(self.responses) // self.per_example

    def rows(self, examples: Sequence[int]) -> list[int]:
        """The responses of examples."""
        n = self.per_example
        return [n * e + i for e in examples for i in range(n)]


def pairs(found: list[TokenizedPreference]) -> Examples:
    flags = [pair.chosen_is_ref for pair in found]
    known = all(flag is not None for flag in flags)
    return Examples(Responses(_both(found)), 2, torch.tensor(flags) if known else None)


def singles(
    items: list[TokenizedCompletion],
    desirable: list[bool],
    *,
    split: bool,
    strangers: bool,
    max_length: int,
) -> Examples:
    """Examples of one response.

    Args:
        items: prompt and response of each.
        desirable: its label.
        split: see ``Examples``.
        strangers: whether to make them.
        max_length: a stranger's answer is cut where it would be longer with its prompt.
    """
    apart = None
    if strangers:
        others = [items[i].completion for i in strangers_of([item.prompt for item in items])]
        apart = Responses(
            [
                TokenizedCompletion(item.prompt, other[: max_length - len(item.prompt)], None)
                for item, other in zip(items, others, strict=True)
            ]
        )
    return Examples(Responses(items), 1, torch.tensor(desirable), apart, split)


def strangers_of(prompts: list[list[int]]) -> list[int]:
    """For each record the nearest one behind it, round the end, that has another prompt.

    Raises:
        RunError: all prompts are the same.
    """
    n = len(prompts)
    found = [0] * n
    following = next((i for i in range(n) if prompts[i] != prompts[-1]), None)
    if following is None:
        raise RunError(
            "all records have the same prompt, so that no response belongs to another one, by "
            "which kto estimates its baseline: expected more prompts, or --kl_baseline zero"
        )
    for i in reversed(range(n)):
        if i + 1 < n and prompts[i + 1] != prompts[i]:
            following = i + 1
        found[i] = following
    return found


def load_examples(
    loss: PreferenceLoss,
    tokenizer: Any,
    data: tuple[str, str | None, str | None, int | None],
    *,
    max_length: int,
    strangers: bool,
    held_out: bool = False,
) -> tuple[list[Any], Examples]:
    """The records as read, and the examples of a loss.

    Args:
        loss: decides between pairs and single responses.
        data: source, split, lines and limit, see ``source.preferences``.
        max_length: tokens of prompt and response together.
        strangers: whether single responses need them.
        held_out: see ``source.preferences``.

    Raises:
        DataError: see ``formats``; pairs of which XPO cannot tell which is the reference's.
    """
    name, split, lines, limit = data
    form: dict[str, Any] = {"strangers": strangers, "max_length": max_length}
    single = isinstance(loss, KTO)
    if single and source.synthetic_task(name) is None and not is_paired(name, split, lines):
        found, report = read_unpaired(name, split=split, lines=lines, limit=limit)
        # The label travels through tokenization, which may drop records, as a reward of 1 or 0.
        texts = [
            Completion(r.prompt, r.completion, float(r.label), r.source, r.finished) for r in found
        ]
        ids = tokenize_completions(texts, tokenizer, report, max_length=max_length)
        log.info("%s", report)
        return found, singles(ids, [r.reward == 1.0 for r in ids], split=False, **form)
    records, report = source.preferences(name, split, lines, limit, held_out=held_out)
    tokenized = tokenize_preferences(records, tokenizer, report, max_length=max_length)
    log.info("%s", report)
    if single:
        labels = [True, False] * len(tokenized)
        return records, singles(_both(tokenized), labels, split=True, **form)
    examples = pairs(tokenized)
    if isinstance(loss, XPO) and examples.flags is None:
        missing = next(r.source for r in records if r.chosen_is_ref is None)
        raise DataError(
            f"{missing}: chosen_is_ref is missing; xpo moves probability away from the response "
            "that the reference sampled, so expected chosen_is_ref, true or false, in every record"
        )
    return records, examples


def _both(found: list[TokenizedPreference]) -> list[TokenizedCompletion]:
    return [TokenizedCompletion(p.prompt, r, None) for p in found for r in (p.chosen, p.rejected)]
