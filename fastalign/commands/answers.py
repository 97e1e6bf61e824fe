"""What the commands that sample share: a model, prompts for it, and its answers to them.

Answers are drawn a few prompts at a time, each such chunk from a random stream of its own, so that
a command that was stopped draws the rest as it would have.

A model that `train dt` made reads the reward that is asked for at the end of each prompt. Only it
does: rewards, records and people get the prompt and the answer without that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastalign.data import source
from fastalign.data.condition import FILE, Condition, Tagger
from fastalign.data.formats import LoadReport, Prompt
from fastalign.data.tokens import TokenizedPrompt, tokenize_prompts
from fastalign.models import Policy, load_tokenizer
from fastalign.rollout import Rollout, SamplingConfig, TransformersEngine
from fastalign.streams import stream
from fastalign.train import strict_json
from fastalign.train.meter import Meter
from fastalign.train.run import RunError, at_least, autocast, choose_device, forward_dtype
from fastalign.train.whole import write_text

log = logging.getLogger("fastalign")


@dataclass
class AnswersConfig:
    """What every command that samples has."""

    policy: str = "runs/apa/model"
    """Folder or hub id of the model that answers."""
    prompts: str = "synthetic"
    """Prompts: JSONL(.gz), Parquet, a folder, a hub id (preference data will do), or synthetic
    (then those of its test split)."""
    lines: str | None = None
    """Use these records only, as a Python slice: 0:2000."""
    limit: int | None = 64
    """Use at most this many prompts."""
    split: str | None = None
    """Split of a folder or data set that has more than one."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are drawn."""
    target_reward: float | None = None
    """Reward to ask a model of `train dt` for, in standard deviations above the mean of its
    training data."""
    micro_tokens: int = 8192
    """Tokens of one forward pass where answers are scored."""
    seed: int = 0
    """Of sampling."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """Of the forward pass: float32, bfloat16 (autocast), auto (it on CUDA)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "micro_tokens")
        if self.target_reward is not None and not math.isfinite(self.target_reward):
            raise RunError(f"--target_reward: expected a finite number, got {self.target_reward}")
        autocast(choose_device(self.device), self.dtype)


def is_conditional(model: str) -> bool:
    """Whether the model was trained with rewards in its prompts."""
    return (Path(model) / FILE).is_file()


def condition_of(model: str, target: float | None) -> Condition | None:
    """How the model is asked for `target`; None for one that is asked for nothing.

    Raises:
        UserError: a target, and a model that cannot be asked for one.
    """
    if target is None:
        if is_conditional(model):
            log.warning(
                "%s was trained with rewards in its prompts, and is asked for none: "
                "give --target_reward",
                model,
            )
        return None
    if not is_conditional(model):
        raise RunError(
            f"--target_reward: {model} was not trained with rewards in its prompts "
            f"(no {FILE}): only models of `train dt` can be asked for one"
        )
    found = Condition.load(model)
    log.info(
        "%s is asked for %+.2f standard deviations; its training data had %+.2f to %+.2f",
        *(model, target, found.lowest, found.highest),
    )
    if not found.lowest <= target <= found.highest:
        log.warning(
            "--target_reward %g lies outside of that: what %s does there it was never shown",
            *(target, model),
        )
    return found


class Answers:
    """A model and the prompts it is to answer.

    Args:
        config: which.
        policy: the folder of the model, where it is not `config.policy`.
        room: tokens that other models can read, where they read the answers too.
        texts: plain prompts, instead of those that `config` names.
        meter: counts what sampling costs; one of its own by default.

    Raises:
        UserError: no model or no prompts there, or none that leaves room for an answer; a target
            for a model that was not trained with any.
    """

    def __init__(
        self,
        config: AnswersConfig,
        policy: str | None = None,
        room: int | None = None,
        texts: list[str] | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.config, self.name = config, policy or config.policy
        self.device = choose_device(config.device)
        self.meter = meter or Meter(self.device, forward_dtype(self.device, config.dtype))
        condition = condition_of(self.name, config.target_reward)
        self.tokenizer = load_tokenizer(self.name)
        loaded = Policy.load(self.name, self.tokenizer)
        self.policy = loaded.to(self.device).requires_grad_(False).eval()
        self.engine = TransformersEngine(self.policy, self.tokenizer)
        self.tagger = Tagger(condition, self.tokenizer) if condition else None
        # The tag is the model's alone: others need no room for it.
        own = self.policy.max_length - len(self.conditioned([]))
        self.context = context = min(own, room or own)
        if context <= config.sampling.max_new_tokens:
            raise RunError(
                f"sampling.max_new_tokens {config.sampling.max_new_tokens} leaves no room for a "
                f"prompt in the {context} tokens that can be read"
            )
        if texts is None:
            records, report = source.prompts(
                config.prompts, config.split, config.lines, config.limit, held_out=True
            )
        else:
            records = [Prompt(text, "--text") for text in texts]
            report = LoadReport("--text", len(records), {}, {}, {})
        self.prompts = tokenize_prompts(
            records,
            self.tokenizer,
            report,
            max_prompt_length=context - config.sampling.max_new_tokens,
        )
        log.info("%s", report)

    def conditioned(self, prompt: list[int]) -> list[int]:
        """The prompt as the model reads it: with the reward that is asked for, if any."""
        if self.tagger is None or self.config.target_reward is None:
            return prompt
        return self.tagger.prompt(prompt, self.config.target_reward)

    def plain(self, rollout: Rollout) -> Rollout:
        """The answer as everybody else reads it: without what asked for a reward, and without the
        space that these models put before their EOS."""
        if self.tagger is None:
            return rollout
        completion, logp = self.tagger.answer(rollout.completion), rollout.logp
        if len(completion) < len(logp):
            logp = [*logp[: len(completion) - 1], logp[-1]]
        prompt = self.prompt(rollout).prompt
        return replace(rollout, prompt=prompt, completion=completion, logp=logp)

    def text(self, rollout: Rollout) -> str:
        return self.tokenizer.decode(self.plain(rollout).completion, skip_special_tokens=True)

    def prompt(self, rollout: Rollout) -> TokenizedPrompt:
        return self.prompts[rollout.prompt_index]

    def draw(self, n_samples: int, first: int = 0) -> Iterator[list[Rollout]]:
        """Answers by chunks of prompts, `n_samples` to each; `first` chunks are left out. Prompts
        and answers are as the model read and wrote them."""
        size = self.config.sampling.batch_size
        per_chunk = max(1, size // n_samples)
        starts = range(0, len(self.prompts), per_chunk)
        for chunk, start in enumerate(starts):
            if chunk < first:
                continue
            chosen = range(start, min(start + per_chunk, len(self.prompts)))
            torch.manual_seed(stream(self.config.seed, "answers", chunk).initial_seed())
            with self.meter.phase("generate"), autocast(self.device, self.config.dtype):
                found = self.engine.generate(
                    [self.conditioned(self.prompts[i].prompt) for i in chosen],
                    n_samples,
                    self.config.sampling,
                )
                self.meter.count(sum(len(r.prompt) + len(r.completion) for r in found))
            yield [
                Rollout(chosen[r.prompt_index], r.prompt, r.completion, r.logp, r.finished)
                for r in found
            ]

    def record(self, rollout: Rollout, **more: Any) -> dict[str, Any]:
        """The answer in the form that training reads: prompt and completion as the prompt's record
        had them, text or messages."""
        prompt, text = self.prompt(rollout).record.prompt, self.text(rollout)
        completion: Any = text
        if not isinstance(prompt, str):
            completion = [{"role": "assistant", "content": text}]
        return {
            "prompt": prompt,
            "completion": completion,
            **more,
            "finished": rollout.finished,
            "tokens": len(self.plain(rollout).completion),
            "logp": sum(rollout.logp),
        }


def account(folder: Path, command: str, meter: Meter) -> dict[str, Any]:
    """At the end of a command: writes accounting.json; the seconds by phase and the tokens sampled
    (prompts and answers), for its other results."""
    meter.stop()
    found = meter.summary()
    text = strict_json.dumps({"method": command, **found}, indent=2)
    write_text(folder / "accounting.json", text + "\n")
    seconds = {name: cost["seconds"] for name, cost in found["phases"].items()}
    seconds["total"] = found["total"]["seconds"]
    return {"seconds": seconds, "tokens": found["total"]["tokens"]}
