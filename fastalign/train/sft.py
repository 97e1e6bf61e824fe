"""Supervised fine-tuning: L = -mean over response tokens of log pi(y_t | x, y_<t).

The loop is that of all methods that learn from given responses, in `supervised`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign.data import source
from fastalign.data.tokenizer import train_tokenizer
from fastalign.models import load_tokenizer
from fastalign.train.run import at_least, begin
from fastalign.train.setup import load_policy
from fastalign.train.supervised import Samples, Supervised, SupervisedConfig, read, tokenize


@dataclass
class SFTConfig(SupervisedConfig):
    """Fine-tune a language model on prompts and responses."""

    output: str = "runs/sft"
    """Folder of the run; the model is written to OUTPUT/model."""
    model: str = "scratch:3m"
    """A local folder or hub id, or scratch:1m, 2m, 3m, 10m, 25m, 100m (random weights, and a
    tokenizer trained on the data)."""
    data: str = "synthetic"
    """JSONL(.gz), Parquet, a folder, a hub id, or synthetic. Preference data: prompt and chosen."""
    vocab_size: int = 2048
    """Of the tokenizer trained for a scratch model."""
    lr: float = 1e-3
    """Peak learning rate (1e-3 suits small models from scratch; 1e-5 a pretrained one)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 258, "vocab_size")


def load_data(config: SFTConfig) -> tuple[Any, Samples, Samples]:
    """Tokenizer, training and held-out samples."""
    train, held_out = read(config, source.completions)
    if config.model.startswith("scratch:"):
        texts = [t for r in train[0] for t in (as_text(r.prompt), as_text(r.completion))]
        tokenizer: Any = train_tokenizer(texts, config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.model)
    samples = [Samples(tokenize(part, tokenizer, config.max_length)) for part in (train, held_out)]
    return tokenizer, *samples


def as_text(text: Any) -> str:
    """Plain text of a record's field, for training a tokenizer."""
    return text if isinstance(text, str) else "\n\n".join(m["content"] for m in text)


def train(config: SFTConfig) -> Path:
    """Runs supervised fine-tuning; the folder of the model."""
    device = begin(config)
    tokenizer, samples, held_out = load_data(config)
    policy = load_policy(
        config, config.model, tokenizer, max_length=config.max_length, device=device
    )
    return Supervised(config, policy, tokenizer, samples, held_out).run()
