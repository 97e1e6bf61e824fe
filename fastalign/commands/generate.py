"""`fastalign generate`: a model's answers to prompts, as JSON lines."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from fastalign.commands.answers import Answers, AnswersConfig, write_lines
from fastalign.train import strict_json
from fastalign.train.run import RunError, at_least


@dataclass
class GenerateConfig(AnswersConfig):
    """Answer prompts with a model: one JSON line an answer, which training commands read."""

    text: str | None = None
    """Answer this one prompt instead of --prompts, as it stands, without a chat template."""
    samples: int = 1
    """Answers to each prompt."""
    output: str | None = None
    """JSONL file; the screen by default."""
    overwrite: bool = False
    """Write over an output file that is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "samples")
        if self.output is not None and Path(self.output).exists() and not self.overwrite:
            raise RunError(f"output {self.output} is there already; choose another, or --overwrite")


def run(config: GenerateConfig) -> None:
    """Writes or prints the answers as they come."""
    answers = Answers(config, texts=None if config.text is None else [config.text])
    path = None if config.output is None else Path(config.output)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for rollouts in answers.draw(config.samples):
        records = [answers.record(rollout) for rollout in rollouts]
        if path is not None:
            write_lines(path, records, "a")
            continue
        for record in records:
            sys.stdout.write(strict_json.dumps(record) + "\n")
        sys.stdout.flush()
