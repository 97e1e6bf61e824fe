"""Text to token ids: chat template once, one EOS at the end, nothing cut in silence.

Plain text: prompt ids are the tokenizer's usual ids of the prompt (with its BOS, where it has one),
completion ids those of the completion alone. Conversations: the chat template renders the prompt
with the generation prompt, and prompt and answer together; the completion is what the second adds
to the first. Prompt and completion are tokenized apart, as they are when a model generates.

Every completion ends in exactly one EOS, unless it was cut, here to fit or while it was sampled:
then it has none, because the text did not end there, and the report counts it.

Special tokens come from the tokenizer and the chat template only. Their strings within a record
("<|endoftext|>" typed by a user) are ordinary text, in plain records and in messages alike:
``spelling`` writes them out, and the report notes such records. The EOS strings that close a
response are no text: they go, and its one EOS takes their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastalign.data.files import DataError
from fastalign.data.formats import Completion, LoadReport, Message, Preference, Prompt, Text
from fastalign.data.spelling import Spelling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rendered = tuple[list[int], list[int]]

UNFINISHED = "unfinished, no EOS set"
EQUAL_AFTER_CUT = "chosen equals rejected after truncation"


@dataclass(frozen=True)
class TokenizedPreference:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float | None = None
    chosen_is_ref: bool | None = None


@dataclass(frozen=True)
class TokenizedCompletion:
    prompt: list[int]
    completion: list[int]
    reward: float | None


@dataclass(frozen=True)
class TokenizedPrompt:
    """``text`` is the prompt as the model reads it, chat template applied, without BOS; ``record``
    what it was made from."""

    prompt: list[int]
    text: str
    record: Prompt


def tokenize_preferences(
    records: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    report: LoadReport,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
) -> list[TokenizedPreference]:
    """Tokenizes pairs; the report's counts are brought up to date.

    Args:
        records: what ``read_preferences`` returned, or ``SyntheticTask.preferences``.
        tokenizer: must have an EOS token, and a chat template where records are conversations.
        report: gets what is dropped and truncated here; ``kept`` becomes the number returned.
        max_length: of prompt and one response together, in tokens. A longer response is cut.
        max_prompt_length: longer prompts are dropped; max_length - 1 if None.

    Raises:
        DataError: no EOS token, no chat template, a template whose prompt is not the beginning of
            the whole conversation, or nothing left.
        ValueError: lengths that leave no room.
    """
    limit = _prompt_limit(max_length, max_prompt_length)
    spelling = Spelling(tokenizer)
    chosen = _render([(r.prompt, r.chosen, r.source) for r in records], spelling)
    rejected = _render([(r.prompt, r.rejected, r.source) for r in records], spelling)
    kept = []
    for record, (prompt, good), (_, bad) in zip(records, chosen, rejected, strict=True):
        if not _prompt_fits(prompt, limit, record.source, report):
            continue
        room = max_length - len(prompt)
        pair = TokenizedPreference(
            prompt, good[:room], bad[:room], record.margin, record.chosen_is_ref
        )
        if pair.chosen == pair.rejected:
            report.drop(EQUAL_AFTER_CUT, record.source)
            continue
        responses = (spelling.without_eos(text) for text in (record.chosen, record.rejected))
        spelling.note(report, record.source, record.prompt, *responses)
        _count_cut(good, room, "chosen", max_length, record.source, report)
        _count_cut(bad, room, "rejected", max_length, record.source, report)
        kept.append(pair)
    return _finish(kept, report)


def tokenize_completions(
    records: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
    report: LoadReport,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
) -> list[TokenizedCompletion]:
    """Tokenizes responses; arguments and errors are those of ``tokenize_preferences``."""
    limit = _prompt_limit(max_length, max_prompt_length)
    spelling = Spelling(tokenizer)
    rendered = _render(
        [(r.prompt, r.completion, r.source) for r in records],
        spelling,
        finished=[r.finished for r in records],
    )
    kept = []
    for record, (prompt, completion) in zip(records, rendered, strict=True):
        if _prompt_fits(prompt, limit, record.source, report):
            room = max_length - len(prompt)
            response = spelling.without_eos(record.completion)
            spelling.note(report, record.source, record.prompt, response)
            if not record.finished:
                report.note(UNFINISHED, record.source)
            _count_cut(completion, room, "completion", max_length, record.source, report)
            kept.append(TokenizedCompletion(prompt, completion[:room], record.reward))
    return _finish(kept, report)


def tokenize_prompts(
    records: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    report: LoadReport,
    *,
    max_prompt_length: int,
) -> list[TokenizedPrompt]:
    """Tokenizes prompts; errors are those of ``tokenize_preferences``."""
    spelling = Spelling(tokenizer)
    texts = [_prompt_text(record.prompt, spelling, record.source) for record in records]
    plain = [isinstance(record.prompt, str) for record in records]
    kept = []
    for record, text, ids in zip(records, texts, _prompt_ids(texts, plain, spelling), strict=True):
        if _prompt_fits(ids, max_prompt_length, record.source, report):
            spelling.note(report, record.source, record.prompt)
            written = text
            if not isinstance(record.prompt, str):
                written = spelling.unmarked(text).removeprefix(tokenizer.bos_token or "")
            kept.append(TokenizedPrompt(ids, written, record))
    return _finish(kept, report)


def _prompt_limit(max_length: int, max_prompt_length: int | None) -> int:
    limit = max_length - 1 if max_prompt_length is None else max_prompt_length
    if not 1 <= limit < max_length:
        raise ValueError(
            "tokenize: expected 1 <= max_prompt_length < max_length, "
            f"got max_prompt_length={max_prompt_length}, max_length={max_length}"
        )
    return limit


def _render(
    records: list[tuple[Text, Text, str]],
    spelling: Spelling,
    finished: Sequence[bool] | None = None,
) -> list[Rendered]:
    """(prompt, response, source) -> (prompt ids, response ids with one EOS at the end, and with
    nothing after the text where they are not `finished`)."""
    finished = [True] * len(records) if finished is None else finished
    tokenizer = spelling.tokenizer
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError("the tokenizer has no EOS token, so a model could not learn to stop")
    prompts, responses = [], []
    for (prompt, response, source), ended in zip(records, finished, strict=True):
        text = _prompt_text(prompt, spelling, source)
        prompts.append(text)
        response = spelling.without_eos(response)
        if isinstance(prompt, str) and isinstance(response, str):
            responses.append(response)
            continue
        assert isinstance(prompt, list) and isinstance(response, list)
        whole = _apply(prompt + response, spelling, source, generate=False)
        if not whole.startswith(text):
            raise DataError(
                f"{source}: the tokenizer's chat template renders the prompt differently when the "
                "answer follows, so the answer's tokens cannot be told apart from the prompt's"
            )
        added = whole[len(text) :]
        if not ended:
            added = _open(added, spelling.marked(response[-1]["content"]))
        responses.append(added)
    plain = [isinstance(prompt, str) for prompt, _, _ in records]
    prompt_ids = _prompt_ids(prompts, plain, spelling)
    response_ids = _encode(responses, plain, spelling, special=False)
    closed = [_ended(response, eos, tokenizer) for response in response_ids]
    return [
        (prompt, response if ended else response[:-1])
        for prompt, response, ended in zip(prompt_ids, closed, finished, strict=True)
    ]


def _open(rendered: str, content: str) -> str:
    """An answer as the template renders it, without what the template closes the turn with."""
    for text in (content, content.strip()):  # some templates strip it
        if text in rendered:
            return rendered[: rendered.rindex(text) + len(text)]
    return rendered


def _prompt_text(prompt: Text, spelling: Spelling, source: str) -> str:
    """A plain prompt as it is, a conversation rendered, with marks for what is to be spelled."""
    return prompt if isinstance(prompt, str) else _apply(prompt, spelling, source, generate=True)


def _apply(messages: list[Message], spelling: Spelling, source: str, *, generate: bool) -> str:
    tokenizer = spelling.tokenizer
    if tokenizer.chat_template is None:
        raise DataError(
            f"{source}: the data are conversations, but the tokenizer has no chat template; "
            "use a chat model's tokenizer, or plain-text data"
        )
    marked = [{key: spelling.marked(value) for key, value in m.items()} for m in messages]
    text = tokenizer.apply_chat_template(marked, add_generation_prompt=generate, tokenize=False)
    assert isinstance(text, str)
    return text


def _prompt_ids(texts: list[str], plain: list[bool], spelling: Spelling) -> list[list[int]]:
    """A plain prompt takes the tokenizer's BOS; a rendered one already has the template's."""
    ids = _encode(texts, plain, spelling, special=True)
    for prompt, is_plain in zip(ids, plain, strict=True):
        # Some tokenizers close every text with EOS; a prompt is not at its end.
        while is_plain and prompt and prompt[-1] == spelling.tokenizer.eos_token_id:
            prompt.pop()
    return ids


def _encode(
    texts: list[str], plain: list[bool], spelling: Spelling, *, special: bool
) -> list[list[int]]:
    """Ids of each; ``special`` gives plain texts the tokenizer's BOS (and EOS)."""
    as_written = spelling.plain([t for t, p in zip(texts, plain, strict=True) if p], special)
    rendered = spelling.rendered([t for t, p in zip(texts, plain, strict=True) if not p])
    both = {True: iter(as_written), False: iter(rendered)}
    return [next(both[p]) for p in plain]


def _ended(ids: list[int], eos: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """One EOS at the end: templates close a turn with EOS and a line break, or with nothing."""
    if eos in ids:
        last = len(ids) - ids[::-1].index(eos)
        rest = tokenizer.decode(ids[last:])
        assert isinstance(rest, str)
        if not rest.strip():
            ids = ids[:last]
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    return ids + [eos]


def _prompt_fits(ids: list[int], limit: int, source: str, report: LoadReport) -> bool:
    if not ids:
        raise DataError(f"{source}: the prompt has no tokens")
    if len(ids) > limit:
        report.drop(f"prompt longer than {limit:,} tokens", source)
        return False
    return True


def _count_cut(
    ids: list[int], room: int, name: str, max_length: int, source: str, report: LoadReport
) -> None:
    if len(ids) > room:
        report.truncate(f"{name} cut at {max_length:,} tokens with its prompt, EOS removed", source)


def _finish(kept: list, report: LoadReport) -> list:
    report.kept = len(kept)
    if not kept:
        raise DataError(f"{report.source}: nothing left after tokenization; {report}")
    return kept
