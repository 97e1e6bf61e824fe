"""Responses that are each known to be good or not: {prompt, completion, label}, TRL's form for KTO.

A label is true for a desirable response. What a prompt, a completion and a conversation may look
like is told in formats.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastalign.data import formats
from fastalign.data.files import DataError, read_records
from fastalign.data.formats import Completion, LoadReport, Text
from fastalign.data.forms import flag_of

EXPECTED = "prompt + completion + label (true: desirable), or preference data to split up"


@dataclass(frozen=True)
class Unpaired:
    """A response to a prompt; ``source`` is "file.jsonl:12"."""

    prompt: Text
    completion: Text
    label: bool
    source: str
    finished: bool = True


def is_paired(source: str, split: str | None = None, lines: str | None = None) -> bool:
    """Whether the first record holds two responses to compare.

    Raises:
        DataError: a missing or unreadable source.
    """
    for record, _ in read_records(source, split=split, lines=lines, limit=1):
        return record.get("chosen") is not None and record.get("rejected") is not None
    return False


def read_unpaired(
    source: str, *, split: str | None = None, lines: str | None = None, limit: int | None = None
) -> tuple[list[Unpaired], LoadReport]:
    """Reads labelled responses; arguments, returns and errors are those of
    ``formats.read_preferences``, and a record without a label that is true or false is a
    ``DataError``."""
    labels: dict[str, bool] = {}
    for record, where in read_records(source, split=split, lines=lines, limit=limit):
        label = flag_of(record, "label", where)
        if label is None:
            keys = ", ".join(sorted(key for key in record if record[key] is not None)) or "none"
            raise DataError(f"{where}: found the keys {keys}; expected {EXPECTED}")
        labels[where] = label
    found, report = formats.read_completions(source, split=split, lines=lines, limit=limit)
    return [_labelled(record, labels[record.source]) for record in found], report


def _labelled(record: Completion, label: bool) -> Unpaired:
    return Unpaired(record.prompt, record.completion, label, record.source, record.finished)
