"""`fastalign score`: rewards of given responses, as JSON lines that mle, rwr, dt and the offline
methods read.

    {"prompt": ..., "completion": ..., "reward": 1.2, "heads": [1.1, 1.3], "disagreement": 0.14}

What is scored is what these methods would label themselves: prompt and response as token ids, cut
to length. Heads and disagreement (their standard deviation, n - 1) are a reward ensemble's.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from typing import Any

from fastalign.commands.output import claim_file, write_line, write_lines
from fastalign.data import source
from fastalign.data.formats import Completion
from fastalign.data.tokens import tokenize_completions
from fastalign.models import load_tokenizer
from fastalign.ops.reduce_scores import STATISTICS
from fastalign.train.labels import GOLD, Labels, make_scorer
from fastalign.train.meter import Meter
from fastalign.train.online import one_of
from fastalign.train.reward_source import parse_reward
from fastalign.train.run import RunError, at_least, autocast, choose_device, forward_dtype

log = logging.getLogger("fastalign")


@dataclass
class ScoreConfig:
    """Score given responses: one JSON line a response, which training commands read."""

    data: str = "synthetic"
    """Completion or preference data (of which both responses are scored): JSONL(.gz), Parquet, a
    folder, a hub id, or synthetic."""
    reward: str = "runs/reward/model"
    """What scores them: a reward ensemble's folder, or my_file.py:function, or gold (the built-in
    task's own reward)."""
    statistic: str | None = None
    """Statistic of the reward ensemble, where it is not to be the one it was saved with."""
    coef: float | None = None
    """Coefficient of lcb and uwo, likewise."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it is not the reward ensemble's."""
    lines: str | None = None
    """Use these records only, as a Python slice: 0:2000."""
    limit: int | None = None
    """Use at most this many records."""
    split: str | None = None
    """Split of a folder or data set that has more than one."""
    max_length: int | None = None
    """Tokens of prompt and response together; by default all that the reward ensemble can read.
    Longer responses are cut and counted."""
    micro_tokens: int = 8192
    """Tokens of one forward pass."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """Of the forward pass: float32, bfloat16, auto (it on CUDA)."""
    output: str | None = None
    """JSONL file; the screen by default."""
    overwrite: bool = False
    """Write over an output file that is there."""

    def __post_init__(self) -> None:
        at_least(self, 1, "micro_tokens")
        at_least(self, 2, "max_length")
        at_least(self, 0, "coef")
        one_of(self, "statistic", (None, *STATISTICS))


def run(config: ScoreConfig) -> None:
    """Scores everything, then writes or prints it."""
    path = claim_file(config.output, overwrite=config.overwrite)
    device = choose_device(config.device)
    autocast(device, config.dtype)
    name = tokenizer_of(config)
    tokenizer = load_tokenizer(name)
    scorer = make_scorer(config, name, tokenizer, device)
    records, report = source.responses(config.data, config.split, config.lines, config.limit)
    # The number of a record goes through tokenization, which drops some, in its reward's place.
    numbered = [replace(record, reward=float(i)) for i, record in enumerate(records)]
    examples = tokenize_completions(
        numbered, tokenizer, report, max_length=config.max_length or scorer.max_length
    )
    log.info("%s", report)
    labels = scorer.label(examples, Meter(device, forward_dtype(device, config.dtype)))
    kept = [records[int(e.reward)] for e in examples if e.reward is not None]
    lines = lines_of(kept, labels)
    if path is None:
        for line in lines:
            write_line(sys.stdout, line)
        return
    write_lines(path, lines)
    mean, std = labels.rewards.mean().item(), labels.rewards.std(correction=0).item()
    log.info("%s: %s responses, mean %.3f, std %.3f", path, f"{len(kept):,}", mean, std)


def tokenizer_of(config: ScoreConfig) -> str:
    """Of the responses: as asked for, or the reward ensemble's."""
    if config.tokenizer is not None:
        return config.tokenizer
    if config.reward != GOLD:
        for entry in parse_reward(config.reward):
            if entry.function is None:
                return entry.folders[0]  # the others are checked against it
    raise RunError(f"--reward {config.reward} has no tokenizer of its own: give --tokenizer")


def lines_of(records: list[Completion], labels: Labels) -> list[dict[str, Any]]:
    """What is written of each response."""
    rows = labels.rewards.tolist()
    found: list[dict[str, Any]] = [
        {"prompt": r.prompt, "completion": r.completion, "reward": reward}
        for r, reward in zip(records, rows, strict=True)
    ]
    if labels.heads is not None:
        for line, heads in zip(found, labels.heads, strict=True):
            line["heads"] = heads.tolist()
            if len(heads) > 1:
                line["disagreement"] = heads.std().item()
    for line, record in zip(found, records, strict=True):
        if not record.finished:  # as `generate` and `bestofn` wrote it: no EOS follows
            line["finished"] = False
    return found
