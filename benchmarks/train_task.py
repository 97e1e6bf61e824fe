"""The task that trainers are compared on: a model from a config, a tokenizer, data, all made here.

A word of the text is a token, so that both trainers see the same token counts, and the lengths have
the spread of dialogues that people rank: log-normal, most short and a few long.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


@dataclass(frozen=True)
class Size:
    """A Llama-form model and the batches it is trained on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocab: int
    tied: bool
    max_length: int
    batch: int
    """Dialogues (or pairs, or prompts times samples) of a step."""
    new_tokens: int
    """Longest response where responses are sampled."""

    def model(self) -> Any:
        """Random weights by torch's seed."""
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocab,
                hidden_size=self.hidden,
                intermediate_size=self.feed_forward,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                max_position_embeddings=self.max_length,
                tie_word_embeddings=self.tied,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )


SIZES = {
    "tiny": Size(64, 2, 4, 4, 128, 512, True, 128, 4, 8),
    "5m": Size(192, 4, 6, 6, 512, 16384, True, 1024, 8, 48),
    "25m": Size(512, 6, 8, 8, 1376, 32768, True, 1024, 8, 48),
    # Qwen3-0.6B's width, depth, vocabulary, and batches for one large GPU.
    "0.6b": Size(1024, 28, 16, 8, 3072, 151936, True, 8192, 64, 128),
}


def length(draw: random.Random, median: float, spread: float, least: int, most: int) -> int:
    return max(least, min(most, round(draw.lognormvariate(0.0, spread) * median)))


def _text(draw: random.Random, words: int, vocab: int) -> str:
    """Words by Zipf's law, roughly: rank = vocab ** uniform."""
    return " ".join(f"w{int(vocab ** draw.random()) - 1}" for _ in range(words))


def write(folder: Path, size: Size, steps: int, seed: int = 0) -> None:
    """Model, tokenizer, and JSONL data for `steps` steps, in a folder both trainers read."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = size.vocab - len(SPECIAL)
    vocab = {name: i for i, name in enumerate([*SPECIAL, *(f"w{i}" for i in range(words))])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(seed)
    model = size.model()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    draw = random.Random(seed)
    room = size.max_length // 2 - 2
    records: dict[str, list[dict[str, str]]] = {"completions": [], "preferences": [], "prompts": []}
    for _ in range(size.batch * steps):
        prompt = _text(draw, length(draw, 90, 0.8, 4, room), words)
        chosen, rejected = (_text(draw, length(draw, 50, 0.9, 2, room), words) for _ in range(2))
        records["completions"].append({"prompt": prompt, "completion": " " + chosen})
        records["preferences"].append(
            {"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}
        )
        records["prompts"].append({"prompt": prompt})
    for name, lines in records.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "size.json").write_text(json.dumps({**asdict(size), "steps": steps}))


def mean_tokens(folder: Path, name: str) -> float:
    """Tokens of a dialogue or a pair with the end-of-sequence tokens, on average."""
    total, count = 0, 0
    for line in (folder / f"{name}.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt = len(record["prompt"].split())
        answers = [len(record[k].split()) + 1 for k in record if k != "prompt"]
        total += sum(prompt + answer for answer in answers)
        count += 1
    return total / count


def reward(completions: list[str]) -> list[float]:
    """A reward that any response gets and sampling can raise: the share of even words."""
    found = []
    for text in completions:
        numbers = [int(word[1:]) for word in text.split() if word[1:].isdigit()]
        found.append(sum(n % 2 == 0 for n in numbers) / max(1, len(numbers)))
    return found


def reward_of(prompts: list[str], responses: list[str]) -> list[float]:
    """The same in the form of `--reward train_task.py:reward_of`."""
    return reward(responses)
