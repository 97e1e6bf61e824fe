"""Sources of strings whose language model is known exactly, and that model as a transformer.

A string has m letters. Its first letter is drawn from `first`, each other one from the row of
`following` that belongs to the letter before it: a Markov chain, memoryless where all rows are
`first`. Its reward is linear, the sum of `reward` over its letters. There are K^m strings, few
enough to go through all of them, in the order of numbers with m digits: a digit is a letter.

The transformer (GPT-2's form) has no attention and no feed-forward output to begin with, and no
positions: its last hidden state at a token k is g_k = LayerNorm(embedding of k), and the head W is
the solution of W g_k = log of the row of k. So it is the source, to rounding, and every weight is
there to be trained. Tokens that are no letters have the logit OUTSIDE. There is no end of string: m
letters are the whole answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPT = "?"
LETTERS = "abcdefgh"
EOS, PAD = "<|endoftext|>", "<|pad|>"
TAG = "<rm_score>:"  # one token of what return-conditioned models read, see data/condition.py
OUTSIDE = -30.0
WIDTH, LAYERS, HEADS = 32, 1, 2
CONTEXT = 32


@dataclass(frozen=True, eq=False)
class Source:
    """Strings of ``m`` of K letters, drawn one after the other.

    Args:
        name: of the source.
        first: [K] float64, the distribution of the first letter.
        following: [K, K] float64, row k: of the letter after letter k.
        letters: [K] float64, the reward of each letter.
        m: letters in a string.
    """

    name: str
    first: Tensor
    following: Tensor
    letters: Tensor
    m: int

    @property
    def k(self) -> int:
        """K, letters of the alphabet."""
        return len(self.first)

    @cached_property
    def strings(self) -> Tensor:
        """[K^m, m] int64: all strings."""
        return torch.cartesian_prod(*[torch.arange(self.k)] * self.m).reshape(-1, self.m)

    @cached_property
    def p(self) -> Tensor:
        """[K^m] float64: their probabilities."""
        found = self.first[self.strings[:, 0]]
        for before, letter in zip(self.strings.T, self.strings.T[1:], strict=False):
            found = found * self.following[before, letter]
        return found

    @cached_property
    def reward(self) -> Tensor:
        """[K^m] float64, rounded to what letters in another order sum to as well."""
        return self.letters[self.strings].sum(1).mul(1e9).round().div(1e9)

    @property
    def range(self) -> float:
        """The highest minus the lowest reward of a string."""
        return float(self.reward.max() - self.reward.min())

    @property
    def memoryless(self) -> bool:
        return bool((self.following == self.first).all())

    def text(self, strings: Tensor) -> list[str]:
        """Indices of strings as text."""
        return ["".join(LETTERS[k] for k in row) for row in self.strings[strings].tolist()]

    def write(self, folder: Path) -> Path:
        """The model and its tokenizer (`model`), prompts, held-out prompts, and the reward as a
        Python file; the folder of the model."""
        tokenizer = make_tokenizer()
        model = make_model(self, tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        write_records(folder / "prompts.jsonl", [{"prompt": PROMPT}])
        write_records(folder / "held-out.jsonl", [{"prompt": PROMPT}])
        worth = dict(zip(LETTERS, self.letters.tolist(), strict=False))
        (folder / "reward.py").write_text(
            f'"""The sum of the letters\' rewards."""\n\nWORTH = {worth}\n\n\n'
            "def letters(prompts: list[str], responses: list[str]) -> list[float]:\n"
            "    return [sum(WORTH.get(letter, 0.0) for letter in r) for r in responses]\n"
        )
        return folder / "model"


def memoryless(m: int) -> Source:
    """Independent letters with probabilities .5, .3, .2 and rewards 0, .5, 1."""
    first = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    letters = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    return Source("memoryless", first, first.expand(3, 3), letters, m)


def markov(m: int) -> Source:
    """Letters that tend to stay: the same first letter and rewards, each letter followed by itself
    with probability .6."""
    first = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rows = [[0.6, 0.3, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]]
    following = torch.tensor(rows, dtype=torch.float64)
    letters = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    return Source("markov", first, following, letters, m)


SOURCES = {"memoryless": memoryless, "markov": markov}


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_tokenizer() -> Any:
    """One token a letter; and what prompts and the tags of return-conditioned models consist of."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [EOS, PAD, *LETTERS[:3], PROMPT, TAG, " ", ".", "-", *"0123456789"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PROMPT)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{TAG}|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([EOS, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def make_model(source: Source, tokenizer: Any) -> Any:
    """The source as a GPT-2; embeddings drawn from torch's global random state."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = GPT2LMHeadModel(config)
    body = model.transformer
    torch.nn.init.normal_(body.wte.weight)
    body.wpe.weight.zero_()
    for block in body.h:
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            projection.weight.zero_()
            projection.bias.zero_()
    ids = tokenizer.convert_tokens_to_ids(list(LETTERS[: source.k]))
    logits = torch.full((len(tokenizer), len(tokenizer)), OUTSIDE, dtype=torch.float64)
    logits[:, ids] = source.first.log()
    for k, row in zip(ids, source.following, strict=True):
        logits[k, ids] = row.log()
    states = torch.nn.functional.layer_norm(body.wte.weight.double(), (WIDTH,), eps=1e-5)
    # [V, H] with independent rows: states @ head.T = logits has a solution.
    model.lm_head.weight.copy_((torch.linalg.pinv(states) @ logits).T)
    return model.eval()
