"""Reads prompts, preferences and completions, and says what it kept, what it dropped and why.

One record is one JSON object (or one parquet row). What it may look like is told in docs/data.md
and read in `forms`.

A record that cannot be used but is well formed (both responses equal, an empty response) is dropped
and counted in the ``LoadReport``. A record that is not what the reader was asked for is a
``DataError`` with the file and the line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastalign.data.files import DataError, read_records
from fastalign.data.forms import (
    Message,
    Text,
    Unusable,
    flag_of,
    has,
    is_finished,
    number_of,
    preference_of,
    prompt_of,
    responses_of,
    reward_of,
    wrong_keys,
)

DUPLICATE = "prompt seen before"


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, the better one first; ``source`` is "file.jsonl:12".

    ``margin`` says by how much it is better and ``chosen_is_ref`` whether it, and not the other,
    was sampled from the reference policy, where the data say so.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    source: str
    margin: float | None = None
    chosen_is_ref: bool | None = None


@dataclass(frozen=True)
class Prompt:
    prompt: Text
    source: str


@dataclass(frozen=True)
class Completion:
    """A response to a prompt, with its reward where the data carry one. One that is not
    ``finished`` was cut off while it was sampled: its text goes on, so no EOS follows it."""

    prompt: Text
    completion: Text
    reward: float | None
    source: str
    finished: bool = True


@dataclass
class LoadReport:
    """What became of the records of one source; ``str()`` gives one readable line.

    ``dropped``, ``truncated`` and ``noted`` (kept, but worth a look) map a reason to a count,
    ``examples`` a reason to the first record it applied to ("file.jsonl:17").
    """

    source: str
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    limit: int | None = None
    """How many records were asked for, where there were as many: there may be more."""

    def drop(self, reason: str, source: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples.setdefault(reason, source)

    def truncate(self, reason: str, source: str) -> None:
        self.truncated[reason] = self.truncated.get(reason, 0) + 1
        self.examples.setdefault(reason, source)

    def note(self, reason: str, source: str) -> None:
        self.noted[reason] = self.noted.get(reason, 0) + 1
        self.examples.setdefault(reason, source)

    def __str__(self) -> str:
        total = self.kept + sum(self.dropped.values())
        stopped = "" if self.limit is None else f" (limit {self.limit:,})"
        parts = [f"{self.source}: kept {self.kept:,} of {total:,}{stopped}"]
        for word in ("dropped", "truncated", "noted"):
            counts: dict[str, int] = getattr(self, word)
            if counts:
                reasons = ", ".join(
                    f"{reason}: {count:,}, first at {self.examples[reason]}"
                    for reason, count in counts.items()
                )
                parts.append(f"{word} {sum(counts.values()):,} ({reasons})")
        return "; ".join(parts)


def read_preferences(
    source: str, *, split: str | None = None, lines: str | None = None, limit: int | None = None
) -> tuple[list[Preference], LoadReport]:
    """Reads pairs of responses.

    Args:
        source: a .jsonl, .json (both also .gz) or .parquet file, a folder of them, a folder saved
            by ``datasets``, or a hub id "owner/name".
        split: which split of a folder or hub data set.
        lines: a slice of record numbers, "0:2000", counted before anything is dropped.
        limit: read at most so many records (after ``lines``).

    Returns:
        The pairs in file order, and the report.

    Raises:
        DataError: a missing or unreadable source, a record of another form, nothing usable.
    """
    report = LoadReport(source)
    pairs = []
    for record, where in _records(report, split, lines, limit):
        if not has(record, "chosen", "rejected"):
            raise wrong_keys(record, where, "preferences")
        try:
            prompt, chosen, rejected = preference_of(record, where)
        except Unusable as why:
            report.drop(str(why), where)
        else:
            margin = number_of(record, "margin", where)
            is_ref = flag_of(record, "chosen_is_ref", where)
            pairs.append(Preference(prompt, chosen, rejected, where, margin, is_ref))
    return _finish(pairs, report), report


def read_prompts(
    source: str, *, split: str | None = None, lines: str | None = None, limit: int | None = None
) -> tuple[list[Prompt], LoadReport]:
    """Reads prompts. Preference and completion data give theirs, each distinct prompt once.

    Arguments, returns and errors are those of ``read_preferences``.
    """
    report = LoadReport(source)
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for record, where in _records(report, split, lines, limit):
        try:
            prompt, derived = prompt_of(record, where)
        except Unusable as why:
            report.drop(str(why), where)
            continue
        key = repr(prompt)
        if derived and key in seen:
            report.drop(DUPLICATE, where)
            continue
        seen.add(key)
        prompts.append(Prompt(prompt, where))
    return _finish(prompts, report), report


def read_completions(
    source: str,
    *,
    split: str | None = None,
    lines: str | None = None,
    limit: int | None = None,
    require_reward: bool = False,
    rejected: bool = False,
) -> tuple[list[Completion], LoadReport]:
    """Reads responses, with rewards where there are any; of preference data, the chosen ones, and
    with ``rejected`` also the others, each right after its chosen one.

    Arguments, returns and errors are those of ``read_preferences``; and with ``require_reward``, a
    record without ``reward``, or ``score`` in its place, is a ``DataError``. One that is not finite
    always is one.
    """
    report = LoadReport(source)
    found = []
    for record, where in _records(report, split, lines, limit):
        reward = reward_of(record, where, require_reward)
        try:
            prompt, *responses = responses_of(record, where)
        except Unusable as why:
            report.drop(str(why), where)
        else:
            kept = responses if rejected else responses[:1]
            finished = is_finished(record)
            found += [Completion(prompt, response, reward, where, finished) for response in kept]
    return _finish(found, report), report


def _records(
    report: LoadReport, split: str | None, lines: str | None, limit: int | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """The source's records; the report says where it was the limit that ended them."""
    read = 0
    for found in read_records(report.source, split=split, lines=lines, limit=limit):
        read += 1
        yield found
    report.limit = limit if read == limit else None


def _finish(kept: list[Any], report: LoadReport) -> list[Any]:
    report.kept = len(kept)
    if not kept and not report.dropped:
        raise DataError(f"{report.source}: the data set is empty")
    if not kept:
        raise DataError(f"{report.source}: no usable record; {report}")
    return kept


__all__ = [
    "Completion",
    "DataError",
    "LoadReport",
    "Message",
    "Preference",
    "Prompt",
    "Text",
    "read_completions",
    "read_preferences",
    "read_prompts",
]
