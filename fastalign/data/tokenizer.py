"""Trains a small byte-level BPE tokenizer, so that a model can be built from nothing, offline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"
PAD = "<|pad|>"

# Roles are plain text, as in the built-in task and in HH's dialogues. The space belongs to the
# answer: byte-level BPE keeps it with the word that follows. Line breaks stand inside expressions,
# because rendering takes away the first line break after a block.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set role = {'user': 'Human'}.get(message['role'], message['role'] | capitalize) %}"
    "{{ '\\n\\n' + role + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocab_size`` entries that round-trips any text.

    It has an end-of-text token, a padding token distinct from it, and a chat template. The same
    texts give the same tokenizer. ``save_pretrained`` writes what ``AutoTokenizer.from_pretrained``
    reads.

    Raises:
        ValueError: vocab_size cannot hold the 256 bytes and the two special tokens.
    """
    if vocab_size < 258:
        raise ValueError(
            f"train_tokenizer: expected vocab_size >= 258 (256 bytes, 2 special), got {vocab_size}"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
