"""What all methods share that learn from given responses: the data, the loop, the evaluation.

    L = sum over response tokens of l(log pi(y_t | x, y_<t), inputs of the token) / their number

A method says what l is, what it needs of each token (a weight, an advantage), and what goes into
the data; `Supervised` as it stands is supervised fine-tuning. Everything is packed; the loss head
sees the hidden states at response positions only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import losses, ops
from fastalign.data import source
from fastalign.data.formats import Completion, LoadReport
from fastalign.data.packing import Packed, epochs_of_batches, pack
from fastalign.data.tokens import TokenizedCompletion, tokenize_completions
from fastalign.models import Policy
from fastalign.models.flops import training_flops
from fastalign.rollout import SamplingConfig
from fastalign.train import distributed
from fastalign.train.optim import OptimConfig, Optimizer
from fastalign.train.run import Run, Stateful, at_least, autocast, check_context
from fastalign.train.same_run import Inputs
from fastalign.train.sampled import Sampled, check_named

log = logging.getLogger("fastalign")


@dataclass
class SupervisedConfig(OptimConfig):
    """What every command has that learns from given responses."""

    model: str = "runs/sft/model"
    """A local folder or hub id."""
    data: str = "synthetic"
    """JSONL(.gz), Parquet, a folder, a hub id, or synthetic."""
    lines: str | None = None
    """Use these records only, as a Python slice: 0:2000."""
    limit: int | None = None
    """Use at most this many records."""
    split: str | None = None
    """Split of a folder or data set that has more than one."""
    eval_data: str | None = None
    """Held-out data. By default: the built-in task's test split, or --data with --eval_split or
    --eval_lines."""
    eval_split: str | None = None
    """Split of the held-out data."""
    eval_lines: str | None = None
    """Held-out records of --eval_data (or of --data), as a Python slice."""
    eval_limit: int | None = 400
    """Use at most this many held-out records."""
    max_length: int = 512
    """Tokens of prompt and response together; longer responses are cut and counted."""
    epochs: int = 2
    """Passes over the data."""
    batch_tokens: int = 4096
    """Tokens of one optimizer step."""
    micro_tokens: int = 8192
    """Tokens of one forward pass; a step of more tokens accumulates gradients."""
    eval_every: int = 50
    """Steps between evaluations on held-out data."""
    eval_reward: str | None = None
    """What responses of the model before and after training are measured by: a reward ensemble's
    folder, my_file.py:function, a sum of such, or gold (the built-in task's). By default nothing is
    sampled."""
    eval_prompts: int = 64
    """How many held-out prompts to answer for that."""
    eval_samples: int = 4
    """Responses to each of them."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How they are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs", "batch_tokens", "micro_tokens", "eval_every")
        at_least(self, 1, "eval_prompts", "eval_samples")
        check_named(self.eval_reward, self.data)
        at_least(self, 2, "max_length")


@dataclass
class Samples:
    """Responses to learn from, and what the loss takes of each of their tokens.

    Args:
        examples: S prompts with responses, as token ids.
        inputs: tensors [N], one row per response token, response after response, on the CPU.
    """

    examples: list[TokenizedCompletion]
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lengths = [len(e.prompt) + len(e.completion) for e in self.examples]
        self.response_lengths = [len(e.completion) for e in self.examples]
        self.starts = [0, *accumulate(self.response_lengths)]

    def rows(self, i: int) -> slice:
        """The rows of response i."""
        return slice(self.starts[i], self.starts[i + 1])

    def of(self, chosen: Sequence[int], device: torch.device) -> tuple[Packed, dict[str, Tensor]]:
        """One pack of these examples, whose targets are the response tokens, and their inputs."""
        inputs = {
            name: torch.cat([rows[self.rows(i)] for i in chosen]).to(device)
            for name, rows in self.inputs.items()
        }
        return packed([self.examples[i] for i in chosen]).to(device), inputs

    def per_token(self, values: Tensor) -> Tensor:
        """[S] -> [N]: the value of a response at each of its tokens."""
        return values.repeat_interleave(torch.tensor(self.response_lengths, dtype=torch.long))


def packed(examples: Sequence[TokenizedCompletion]) -> Packed:
    """One pack whose targets are the response tokens."""
    return pack([e.prompt + e.completion for e in examples], [len(e.prompt) for e in examples])


Read = tuple[list[Completion], LoadReport]
Reader = Callable[..., Read]


def read(config: SupervisedConfig, reader: Reader) -> tuple[Read, Read | None]:
    """Training records, and held-out ones where the configuration names some.

    Args:
        reader: (source, split, lines, limit, held_out=...) -> records and report, as
            `source.completions`.
    """
    found = reader(config.data, config.split, config.lines, config.limit)
    held_source = source.held_out(
        config.data, config.eval_data, config.eval_split, config.eval_lines
    )
    if held_source is None:
        return found, None
    held = reader(
        held_source, config.eval_split, config.eval_lines, config.eval_limit, held_out=True
    )
    source.warn_of_overlap(found[0], held[0])
    return found, held


def tokenize(found: Read | None, tokenizer: Any, max_length: int) -> list[TokenizedCompletion]:
    """Token ids of what `read` found; says what was kept, dropped and cut. None: no examples."""
    if found is None:
        return []
    records, report = found
    examples = tokenize_completions(records, tokenizer, report, max_length=max_length)
    log.info("%s", report)
    return examples


class Supervised:
    """Supervised fine-tuning; a method overrides what it does otherwise.

    Args:
        config: of the run.
        policy: what is trained, on its device.
        tokenizer: saved with the model.
        train: what is learned from.
        held_out: what the loss is measured on beside it; may be empty.
        loss: per-token loss of log-probs and the samples' inputs.
    """

    name = "sft"
    dropout = True
    """Whether the model's dropout is on while it learns."""

    def __init__(
        self,
        config: SupervisedConfig,
        policy: Policy,
        tokenizer: Any,
        train: Samples,
        held_out: Samples,
        loss: Any = losses.MLE(),  # noqa: B008, frozen
    ) -> None:
        check_context(config.max_length, policy.max_length, config.model)
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.train, self.held_out, self.loss = train, held_out, loss
        self.device = policy.head_weight.device
        self.schedule = epochs_of_batches(
            train.lengths, config.epochs, config.batch_tokens, config.seed
        )
        self.sampled = self.make_sampled()
        distributed.shard(policy, "hidden")
        self.optimizer = Optimizer(config, policy, len(self.schedule))

    # --- what methods override --------------------------------------------------------------------

    def make_sampled(self) -> Sampled:
        """What measures samples of the policy, which is not sharded yet."""
        return Sampled(self.config, self.policy, self.tokenizer, self.held_out.examples)

    def begin(self, run: Run, new: bool) -> None:
        """Once, before the first step; `new` is not a resumed run."""

    def finish(self, run: Run) -> None:
        """After the last step, before the model is saved."""

    def backward(
        self, pack_: Packed, inputs: dict[str, Tensor], n_tokens: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Adds the gradients of one pack's part of a mean over `n_tokens` tokens.

        Returns:
            0-d fp32 numbers to log, this pack's parts of means over the step, "loss" among them;
            and the tensors to look at where the loss is not finite.
        """
        hidden, out = self.policy_loss(pack_, inputs, n_tokens)
        out.loss.backward()
        return {"loss": out.loss.detach()}, {"hidden states": hidden}

    def policy_loss(
        self, pack_: Packed, inputs: dict[str, Tensor], n_tokens: float
    ) -> tuple[Tensor, ops.LossOutput]:
        """Hidden states [M, H] and the loss on them, a part of a mean over `n_tokens`."""
        with autocast(self.device, self.config.dtype):
            hidden = self.policy.response_hidden(pack_)
            out = ops.linear_loss(
                hidden,
                self.policy.head_weight.to(hidden.dtype),
                pack_.response_targets,
                self.loss,
                inputs,
                bias=self.policy.head_bias,
                softcap=self.policy.softcap,
                ignore_index=None,
                normalizer=n_tokens,
            )
        return hidden, out

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On the held-out samples: the loss, and the perplexity of their response tokens."""
        was_training = self.policy.training
        self.policy.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        count = sum(self.held_out.response_lengths)
        for micro in distributed.looks(self.held_out.lengths, self.config.micro_tokens):
            pack_, inputs = self.held_out.of(micro.rows, self.device)
            with autocast(self.device, self.config.dtype):
                logp, _ = self.policy.logprobs(pack_)
            if micro.counts:
                sums += torch.stack([self.loss(logp, None, **inputs).sum(), -logp.sum()])
        self.policy.train(was_training)
        loss, nats = distributed.total(sums).tolist()
        return {"loss": loss / count, "perplexity": perplexity(nats / count)}

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> Path:
        """Trains; the folder of the model."""
        config, total = self.config, len(self.schedule)
        self.policy.train(self.dropout)
        with Run(config, self.name, total) as run:
            start = run.restore(self.stateful())
            self.begin(run, start == 0)
            found = self.sampled.before(run)
            if start == 0:
                self.log_evaluation(run, 0, found)
            for step in range(start + 1, total + 1):
                with run.meter.phase("update"):
                    metrics = self.update(run, step, self.schedule[step - 1])
                run.log(step, "train", metrics | run.meter.metrics())
                if step % config.eval_every == 0 or step == total:
                    self.log_evaluation(run, step, self.sampled.after(run, step == total))
                run.end_step(step)
            if self.sampled.unfinished:  # the checkpoint is of the last step only now
                self.log_evaluation(run, total, self.sampled.after(run, True))
            self.finish(run)
            with run.saving_model() as folder:
                self.save(folder)
            self.sampled.write(run)
        return run.folder / "model"

    def log_evaluation(self, run: Run, step: int, sampled: dict[str, float]) -> None:
        """What samples were worth, beside the numbers of the held-out responses, if any."""
        found = dict(sampled)
        if self.held_out.examples:
            with run.meter.phase("evaluate"):
                found = self.evaluate() | found
        if found:
            run.log(step, "eval", found)

    def stateful(self) -> Stateful:
        others = {"optimizer": self.optimizer, "inputs": Inputs(data=self.train.examples)}
        return Stateful({"policy": self.policy}, others | {"sampled": self.sampled})

    def update(self, run: Run, step: int, batch: list[int]) -> dict[str, float]:
        """One optimizer step on the samples of a batch; its numbers."""
        n_tokens = sum(self.train.response_lengths[i] for i in batch)
        lengths = [self.train.lengths[i] for i in batch]
        sums: dict[str, Tensor] = {}
        for micro in distributed.micros(
            self.policy, batch, self.train.lengths, self.config.micro_tokens
        ):
            pack_, inputs = self.train.of(micro.rows, self.device)
            parts, seen = self.backward(pack_, inputs, micro.divisor(n_tokens))
            sums = {name: sums.get(name, 0.0) + part for name, part in parts.items()}
        numbers = distributed.total(torch.stack(list(sums.values()))).tolist()
        metrics: dict[str, float] = dict(zip(sums, numbers, strict=True))
        metrics["perplexity"] = perplexity(metrics.get("nll", metrics["loss"]))
        metrics |= self.optimizer.update(run, step, torch.tensor(metrics["loss"]), seen)
        self.optimizer.next_step()
        run.meter.count(
            sum(lengths), trained=n_tokens, flops=training_flops(self.policy, lengths, n_tokens)
        )
        return metrics

    def save(self, folder: Path) -> None:
        policy = distributed.unsharded(self.policy)
        if isinstance(policy, Policy):
            policy.save(folder, self.tokenizer)


def perplexity(nats: float) -> float:
    """exp of nats per token, which an untrained model may have too many of for a float."""
    return math.exp(min(nats, 50.0))
