"""What one record says: its prompt, its responses, its numbers, in whichever form it has them.

Text is a plain string or a conversation, a list of ``{"role": ..., "content": ...}``. What is
accepted, and how a prompt is found where none is written, is told in docs/data.md; ``ACCEPTED``
below is the short form that error messages print.
"""

from __future__ import annotations

import math
from os.path import commonprefix
from typing import Any

from fastalign.data.files import DataError

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


class Unusable(Exception):
    """A well-formed record that cannot be used; the message is the reason it is counted under."""


def has(record: dict[str, Any], *keys: str) -> bool:
    return all(record.get(key) is not None for key in keys)


def wrong_keys(record: dict[str, Any], where: str, kind: str) -> DataError:
    found = ", ".join(sorted(key for key in record if record[key] is not None)) or "none"
    return DataError(f"{where}: found the keys {found}; for {kind} expected {ACCEPTED[kind]}")


def _text(value: Any, name: str, where: str) -> Text:
    """The value as plain text or as a list of role/content messages without further keys."""
    if isinstance(value, str):
        return _whole(value, name, where)
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
        _whole(content, f"{name}[{number}]", where)
        messages.append({"role": role, "content": content})
    return messages


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON's escapes (and a command line) can spell half of a
    surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole(value: str, name: str, where: str) -> str:
    if not is_text(value):
        raise DataError(f"{where}: {name} holds half of a surrogate pair, which no text has")
    return value


def preference_of(record: dict[str, Any], where: str) -> tuple[Text, Text, Text]:
    chosen = _text(record["chosen"], "chosen", where)
    rejected = _text(record["rejected"], "rejected", where)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{where}: one of chosen and rejected is a string, the other messages")
    if chosen == rejected:
        raise Unusable(EQUAL)
    if not has(record, "prompt"):
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
            raise Unusable(EMPTY)
        return response
    # Only one assistant turn can be trained on: a later user turn is not the model's to write.
    if len(response) != 1 or response[0]["role"] != "assistant":
        raise Unusable(NOT_ONE_ANSWER)
    if not response[0]["content"].strip():
        raise Unusable(EMPTY)
    return response


def _split(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Finds the prompt that two whole dialogues share."""
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if shared == 0:
            raise Unusable(NO_PROMPT)
        if chosen[shared - 1]["role"] == "assistant":
            raise Unusable(NOT_ONE_ANSWER)
        prompt: Text = chosen[:shared]
        return prompt, _checked_response(chosen[shared:]), _checked_response(rejected[shared:])
    assert isinstance(chosen, str) and isinstance(rejected, str)
    if ASSISTANT_MARK in chosen and ASSISTANT_MARK in rejected:
        cut = chosen.rindex(ASSISTANT_MARK) + len(ASSISTANT_MARK)
        if rejected.rindex(ASSISTANT_MARK) + len(ASSISTANT_MARK) != cut:
            raise Unusable(EARLIER)
        if chosen[:cut] != rejected[:cut]:
            raise Unusable(EARLIER)
    else:
        cut = len(commonprefix([chosen, rejected]))
        # Not inside a word: the words on both sides of the cut stay whole, their space in front.
        while cut > 0 and (chosen[cut : cut + 1] + rejected[cut : cut + 1]).strip():
            cut -= 1
        if not chosen[:cut].strip():
            raise Unusable(NO_PROMPT)
    return chosen[:cut], _checked_response(chosen[cut:]), _checked_response(rejected[cut:])


def responses_of(record: dict[str, Any], where: str) -> tuple[Text, ...]:
    """The prompt and its response, or its two responses, the better one first."""
    if has(record, "prompt", "completion"):
        prompt = _text(record["prompt"], "prompt", where)
        return _joined(prompt, _text(record["completion"], "completion", where), where)
    if has(record, "chosen", "rejected"):
        return preference_of(record, where)
    if has(record, "messages"):
        messages = _text(record["messages"], "messages", where)
        if isinstance(messages, str):
            raise DataError(f"{where}: messages must be a list of messages, got str")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise Unusable(NOT_ONE_ANSWER)
        return _joined(messages[:-1], messages[-1:], where)
    raise wrong_keys(record, where, "completions")


def prompt_of(record: dict[str, Any], where: str) -> tuple[Text, bool]:
    """The record's prompt, and whether it was taken from data of another kind."""
    if has(record, "chosen", "rejected"):
        return preference_of(record, where)[0], True
    if has(record, "prompt"):
        prompt = _text(record["prompt"], "prompt", where)
        _check_prompt(prompt, where)
        return prompt, has(record, "completion")
    if has(record, "messages"):
        messages = _text(record["messages"], "messages", where)
        if isinstance(messages, str):
            raise DataError(f"{where}: messages must be a list of messages, got str")
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        _check_prompt(messages, where)
        return messages, True
    raise wrong_keys(record, where, "prompts")


def reward_of(record: dict[str, Any], where: str, required: bool) -> float | None:
    # A score that nobody asked for may be anything: another's rating, a grade in letters.
    name = "score" if required and record.get("reward") is None else "reward"
    value = number_of(record, name, where)
    if required and value is None:
        raise DataError(
            f"{where}: reward is missing: give the data a number reward or score (fastalign "
            "score writes them), or label them with --reward"
        )
    return value


def number_of(record: dict[str, Any], name: str, where: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where}: {name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise DataError(f"{where}: {name} must be finite, got {value}")
    return float(value)


def is_finished(record: dict[str, Any]) -> bool:
    """False for a completion that says ``"finished": false``, as sampling commands write it."""
    return not (has(record, "completion") and record.get("finished") is False)


def flag_of(record: dict[str, Any], key: str, where: str) -> bool | None:
    """A record's true or false; None where it has none."""
    value = record.get(key)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"{where}: {key} must be true or false, got {value!r}")
    return value
