"""Text that holds the string of a special token: it stays text, spelled out in ordinary tokens.

A tokenizer makes one special token of "<|endoftext|>" or "<|im_start|>" wherever it stands, so a
record could end a turn, open another or speak as the system. Only the tokenizer's own BOS and the
chat template may do that. What a template has rendered no longer tells its special tokens from a
record's, so ``marked`` exchanges those of the messages for marks before it renders, and
``rendered`` spells the marks out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fastalign.data.formats import LoadReport, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTED = "text of a special token, spelled out"

# A mark is two private-use characters: this one, and one that says which string. The first has a
# mark of its own, so that a text may hold whatever it likes.
_MARK, _FIRST = "\U000f0000", 0xF0001


class Spelling:
    """Token ids of text by one tokenizer, special tokens' strings in it spelled out.

    Spelled out is how the tokenizer writes the string when told not to read special tokens. Where
    it has the string as an ordinary piece too (Unigram models), it is character by character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        # The longest first: one may be the beginning of another.
        special = sorted({*added, *tokenizer.all_special_tokens}, key=lambda s: (-len(s), s))
        self.strings = [_MARK, *special]
        self.marks = [_MARK + chr(_FIRST + i) for i in range(len(self.strings))]
        self.special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        ids = {tokenizer.convert_tokens_to_ids(string) for string in special}
        self.ids = ids - {tokenizer.unk_token_id}
        self._marks = re.compile(f"({'|'.join(self.marks)})")
        self._strings = re.compile("|".join(map(re.escape, self.strings)))

    def holds(self, text: Text) -> bool:
        """Whether the string of a special token stands in a text or in a message of it."""
        if isinstance(text, str):
            return self.special.search(text) is not None
        return any(self.special.search(value) for message in text for value in message.values())

    def note(self, report: LoadReport, source: str, *texts: Text) -> None:
        if any(self.holds(text) for text in texts):
            report.note(NOTED, source)

    def without_eos(self, text: Text) -> Text:
        """A response without the EOS strings that close it (and the white space after them)."""
        if not isinstance(text, str):
            last = text[-1]
            content = self.without_eos(last["content"])
            assert isinstance(content, str)
            return [*text[:-1], last | {"content": content}]
        eos = str(self.tokenizer.eos_token)
        while text.rstrip().endswith(eos):
            text = text.rstrip().removesuffix(eos)
        return text

    def marked(self, text: str) -> str:
        """With marks in the place of special tokens' strings."""
        return self._strings.sub(lambda m: self.marks[self.strings.index(m[0])], text)

    def unmarked(self, text: str) -> str:
        return self._marks.sub(lambda m: self.strings[self.marks.index(m[0])], text)

    def plain(self, texts: list[str], special: bool) -> list[list[int]]:
        """Ids of texts as people wrote them; ``special`` adds the tokenizer's BOS (and EOS)."""
        clean = iter(self._encode([t for t in texts if not self.holds(t)], special))
        return [self._plain(t, special) if self.holds(t) else next(clean) for t in texts]

    def _plain(self, text: str, special: bool) -> list[int]:
        (ids,) = self._encode([text], False, split=True)
        if self.ids.isdisjoint(ids):
            return self._encode([text], special, split=True)[0]
        return self._pieces(self.marked(text), special)

    def rendered(self, texts: list[str]) -> list[list[int]]:
        """Ids of what a template made of marked messages: its special tokens are special."""
        clean = iter(self._encode([t for t in texts if _MARK not in t], False))
        return [self._pieces(t, False) if _MARK in t else next(clean) for t in texts]

    def _pieces(self, text: str, special: bool) -> list[int]:
        """Ids of a text with marks, piece by piece."""
        first, *rest = self._marks.split(text)
        (ids,) = self._encode([first], special)
        if special and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # set after every text by some tokenizers, and this one goes on
        for mark, piece in zip(rest[::2], rest[1::2], strict=True):
            ids += self._spelled(self.strings[self.marks.index(mark)])
            ids += self._encode([piece], False)[0]
        return ids

    def _spelled(self, string: str) -> list[int]:
        (ids,) = self._encode([string], False, split=True)
        if self.ids.isdisjoint(ids):
            return ids
        return [i for one in self._encode(list(string), False, split=True) for i in one]

    def _encode(self, texts: list[str], special: bool, split: bool = False) -> list[list[int]]:
        if not texts:
            return []
        # The tokenizer's length warning is about its model's limit; ours are checked elsewhere.
        return self.tokenizer(
            texts,
            add_special_tokens=special,
            split_special_tokens=split,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
