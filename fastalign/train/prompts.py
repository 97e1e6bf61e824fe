"""Which prompts a method that samples trains and is evaluated on, and in which order."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from fastalign.data import source
from fastalign.data.tokens import TokenizedPrompt, tokenize_prompts
from fastalign.streams import stream
from fastalign.train.run import RunError

if TYPE_CHECKING:
    from fastalign.train.online import OnlineConfig

log = logging.getLogger("fastalign")


def load_prompts(
    config: OnlineConfig, tokenizer: Any, room: int
) -> tuple[list[TokenizedPrompt], list[TokenizedPrompt]]:
    """Training and held-out prompts of at most `room` tokens."""
    records, report = source.prompts(config.prompts, config.split, config.lines, config.limit)
    train = tokenize_prompts(records, tokenizer, report, max_prompt_length=room)
    log.info("%s", report)
    held_source = source.held_out(
        config.prompts, config.eval_prompts, config.eval_split, config.eval_lines
    )
    if held_source is None:
        raise RunError(
            "nothing to evaluate on: give held-out prompts with --eval_prompts, or a part of "
            "--prompts with --eval_split or --eval_lines"
        )
    held, held_report = source.prompts(
        held_source, config.eval_split, config.eval_lines, config.eval_limit, held_out=True
    )
    source.warn_of_overlap(records, held)
    test = tokenize_prompts(held, tokenizer, held_report, max_prompt_length=room)
    log.info("%s", held_report)
    return train, test


def choose_prompts(n_prompts: int, config: OnlineConfig, step: int) -> list[int]:
    """The prompts of a step: one shuffled pass over all of them after another."""
    chosen: list[int] = []
    first = (step - 1) * config.prompts_per_step
    while len(chosen) < config.prompts_per_step:
        epoch, place = divmod(first + len(chosen), n_prompts)
        order = torch.randperm(n_prompts, generator=stream(config.seed, "prompts", epoch))
        chosen += order[place : place + config.prompts_per_step - len(chosen)].tolist()
    return chosen
