"""Reads prompts, preferences and completions, and says what it kept, what it dropped and why.

One record is one JSON object (or one parquet row). Text is a plain string or a conversation, a list
of ``{"role": ..., "content": ...}``. What is accepted, and how a prompt is found where none is
written, is told in docs/data.md; ``ACCEPTED`` below is the short form that error messages print.

A record that cannot be used but is well formed (both responses equal, an empty response) is dropped
and counted in the ``LoadReport``. A record that is not what the reader was asked for is a
``DataError`` with the file and the line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

from fastalign.data.files import DataError, read_records

Message = dict[str, str]
Text = str | list[Message]

ASSISTANT_MARK = "\n\nAssistant:"
ACCEPTED = {
    "preferences": "prompt + chosen + rejected, or chosen + rejected that share their beginning",
    "prompts": "prompt, or messages, or preference or completion data",
    "completions": "prompt + completion (+ reward or score), or messages, or preference data",
}

EQUAL = "chosen equals rejected"
EMPTY = "empty response"
NO_PROMPT = "chosen and rejected share no prompt"
EARLIER = "dialogues differ before the last assistant turn"
NOT_ONE_ANSWER = "response is not one assistant message"
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
    """A response to a prompt, with its reward where the data carry one."""

    prompt: Text
    completion: Text
    reward: float | None
    source: str


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
        parts = [f"{self.source}: kept {self.kept:,} of {total:,}"]
        for word in ("dropped", "truncated", "noted"):
            counts: dict[str, int] = getattr(self, word)
            if counts:
                reasons = ", ".join(
                    f"{reason}: {count:,}, first at {self.examples[reason]}"
                    for reason, count in counts.items()
                )
                parts.append(f"{word} {sum(counts.values()):,} ({reasons})")
        return "; ".join(parts)


class _Unusable(Exception):
    """A well-formed record that cannot be used; the message is the reason it is counted under."""


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
    for record, where in read_records(source, split=split, lines=lines, limit=limit):
        if not _has(record, "chosen", "rejected"):
            raise _wrong_keys(record, where, "preferences")
        try:
            prompt, chosen, rejected = _preference(record, where)
        except _Unusable as why:
            report.drop(str(why), where)
        else:
            margin = _number(record, "margin", where)
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
    for record, where in read_records(source, split=split, lines=lines, limit=limit):
        try:
            prompt, derived = _prompt_of(record, where)
        except _Unusable as why:
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
    for record, where in read_records(source, split=split, lines=lines, limit=limit):
        reward = _reward(record, where, require_reward)
        try:
            prompt, *responses = _completion(record, where)
        except _Unusable as why:
            report.drop(str(why), where)
        else:
            kept = responses if rejected else responses[:1]
            found += [Completion(prompt, response, reward, where) for response in kept]
    return _finish(found, report), report


def _finish(kept: list[Any], report: LoadReport) -> list[Any]:
    report.kept = len(kept)
    if not kept and not report.dropped:
        raise DataError(f"{report.source}: the data set is empty")
    if not kept:
        raise DataError(f"{report.source}: no usable record; {report}")
    return kept


def _has(record: dict[str, Any], *keys: str) -> bool:
    return all(record.get(key) is not None for key in keys)


def _wrong_keys(record: dict[str, Any], where: str, kind: str) -> DataError:
    found = ", ".join(sorted(key for key in record if record[key] is not None)) or "none"
    return DataError(f"{where}: found the keys {found}; for {kind} expected {ACCEPTED[kind]}")


def _text(value: Any, name: str, where: str) -> Text:
    """The value as plain text or as a list of role/content messages without further keys."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(
            f"{where}: {name} must be a string or a list of messages, got {type(value).__name__}"
        )
    if not value:
        raise DataError(f"{where}: {name} is an empty list of messages")
    messages = []
    for number, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{where}: {name}[{number}] must be a message with the strings role and content"
            )
        messages.append({"role": role, "content": content})
    return messages


def _preference(record: dict[str, Any], where: str) -> tuple[Text, Text, Text]:
    chosen = _text(record["chosen"], "chosen", where)
    rejected = _text(record["rejected"], "rejected", where)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{where}: one of chosen and rejected is a string, the other messages")
    if chosen == rejected:
        raise _Unusable(EQUAL)
    if not _has(record, "prompt"):
        return _split(chosen, rejected)
    prompt = _text(record["prompt"], "prompt", where)
    if isinstance(chosen, list) and isinstance(rejected, list):
        if isinstance(prompt, str) and min(len(chosen), len(rejected)) > 1:
            # The prompt is a copy of the question that both conversations already start with.
            return _split(chosen, rejected)
    prompt, chosen = _joined(prompt, chosen, where)
    _, rejected = _joined(record["prompt"], rejected, where)
    return prompt, chosen, rejected


def _joined(prompt: Text, response: Text, where: str) -> tuple[Text, Text]:
    """Prompt and response in one form, both plain or both messages, checked."""
    if isinstance(prompt, str) and isinstance(response, str):
        _check_prompt(prompt, where)
        return prompt, _checked_response(response)
    messages = _messages(prompt, "user")
    answer = _messages(response, "assistant")
    if answer[: len(messages)] == messages:
        answer = answer[len(messages) :]
    _check_prompt(messages, where)
    return messages, _checked_response(answer)


def _messages(text: Text, role: str) -> list[Message]:
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    return [{"role": message["role"], "content": message["content"]} for message in text]


def _check_prompt(prompt: Text, where: str) -> None:
    if not prompt:
        raise DataError(f"{where}: prompt is empty")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise DataError(f"{where}: prompt ends with an assistant message; the answer belongs apart")


def _checked_response(response: Text) -> Text:
    if isinstance(response, str):
        if not response.strip():
            raise _Unusable(EMPTY)
        return response
    # Only one assistant turn can be trained on: a later user turn is not the model's to write.
    if len(response) != 1 or response[0]["role"] != "assistant":
        raise _Unusable(NOT_ONE_ANSWER)
    if not response[0]["content"].strip():
        raise _Unusable(EMPTY)
    return response


def _split(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Finds the prompt that two whole dialogues share."""
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if shared == 0:
            raise _Unusable(NO_PROMPT)
        if chosen[shared - 1]["role"] == "assistant":
            raise _Unusable(NOT_ONE_ANSWER)
        prompt: Text = chosen[:shared]
        return prompt, _checked_response(chosen[shared:]), _checked_response(rejected[shared:])
    assert isinstance(chosen, str) and isinstance(rejected, str)
    if ASSISTANT_MARK in chosen and ASSISTANT_MARK in rejected:
        cut = chosen.rindex(ASSISTANT_MARK) + len(ASSISTANT_MARK)
        if rejected.rindex(ASSISTANT_MARK) + len(ASSISTANT_MARK) != cut:
            raise _Unusable(EARLIER)
        if chosen[:cut] != rejected[:cut]:
            raise _Unusable(EARLIER)
    else:
        cut = len(commonprefix([chosen, rejected]))
        # Not inside a word: the words on both sides of the cut stay whole, their space in front.
        while cut > 0 and (chosen[cut : cut + 1] + rejected[cut : cut + 1]).strip():
            cut -= 1
        if not chosen[:cut].strip():
            raise _Unusable(NO_PROMPT)
    return chosen[:cut], _checked_response(chosen[cut:]), _checked_response(rejected[cut:])


def _completion(record: dict[str, Any], where: str) -> tuple[Text, ...]:
    """The prompt and its response, or its two responses, the better one first."""
    if _has(record, "prompt", "completion"):
        prompt = _text(record["prompt"], "prompt", where)
        return _joined(prompt, _text(record["completion"], "completion", where), where)
    if _has(record, "chosen", "rejected"):
        return _preference(record, where)
    if _has(record, "messages"):
        messages = _text(record["messages"], "messages", where)
        if isinstance(messages, str):
            raise DataError(f"{where}: messages must be a list of messages, got str")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise _Unusable(NOT_ONE_ANSWER)
        return _joined(messages[:-1], messages[-1:], where)
    raise _wrong_keys(record, where, "completions")


def _prompt_of(record: dict[str, Any], where: str) -> tuple[Text, bool]:
    """The record's prompt, and whether it was taken from data of another kind."""
    if _has(record, "chosen", "rejected"):
        return _preference(record, where)[0], True
    if _has(record, "prompt"):
        prompt = _text(record["prompt"], "prompt", where)
        _check_prompt(prompt, where)
        return prompt, _has(record, "completion")
    if _has(record, "messages"):
        messages = _text(record["messages"], "messages", where)
        if isinstance(messages, str):
            raise DataError(f"{where}: messages must be a list of messages, got str")
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        _check_prompt(messages, where)
        return messages, True
    raise _wrong_keys(record, where, "prompts")


def _reward(record: dict[str, Any], where: str, required: bool) -> float | None:
    # A score that nobody asked for may be anything: another's rating, a grade in letters.
    name = "score" if required and record.get("reward") is None else "reward"
    value = _number(record, name, where)
    if required and value is None:
        raise DataError(
            f"{where}: reward is missing: give the data a number reward or score (fastalign "
            "score writes them), or label them with --reward"
        )
    return value


def _number(record: dict[str, Any], name: str, where: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where}: {name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise DataError(f"{where}: {name} must be finite, got {value}")
    return float(value)


def flag_of(record: dict[str, Any], key: str, where: str) -> bool | None:
    """A record's true or false; None where it has none."""
    value = record.get(key)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"{where}: {key} must be true or false, got {value!r}")
    return value


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
