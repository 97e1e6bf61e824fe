"""`fastalign generate`: a model's answers to prompts, as JSON lines."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass

from fastalign.commands.answers import Answers, AnswersConfig
from fastalign.commands.output import claim_file, whole_file, write_line
from fastalign.data.forms import is_text
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
        if self.text is not None and not is_text(self.text):
            raise RunError("--text: not UTF-8 text")


def run(config: GenerateConfig) -> None:
    """Prints the answers as they come, or writes them all."""
    path = claim_file(config.output, overwrite=config.overwrite)
    answers = Answers(config, texts=None if config.text is None else [config.text])
    with nullcontext(sys.stdout) if path is None else whole_file(path) as file:
        for rollouts in answers.draw(config.samples):
            for rollout in rollouts:
                write_line(file, answers.record(rollout))
            file.flush()
