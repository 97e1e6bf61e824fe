"""Supervised fine-tuning: L = -mean over response tokens of log pi(y_t | x, y_<t).

Everything is packed; the loss head sees the hidden states at response positions only.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalign import losses, ops
from fastalign.data import source
from fastalign.data.packing import Packed, epochs_of_batches, pack, token_budget_batches
from fastalign.data.tokenizer import train_tokenizer
from fastalign.data.tokens import TokenizedCompletion, tokenize_completions
from fastalign.models import Policy, load_tokenizer
from fastalign.models.flops import training_flops
from fastalign.train.optim import OptimConfig, Optimizer
from fastalign.train.run import Run, Stateful, at_least, autocast, begin, check_context
from fastalign.train.setup import load_policy

log = logging.getLogger("fastalign")


@dataclass
class SFTConfig(OptimConfig):
    """Fine-tune a language model on prompts and responses."""

    output: str = "runs/sft"
    """Folder of the run; the model is written to OUTPUT/model."""
    model: str = "scratch:3m"
    """A local folder or hub id, or scratch:1m, 2m, 3m, 10m, 25m, 100m (random weights, and a
    tokenizer trained on the data)."""
    data: str = "synthetic"
    """JSONL(.gz), Parquet, a folder, a hub id, or synthetic. Preference data: prompt and chosen."""
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
    vocab_size: int = 2048
    """Of the tokenizer trained for a scratch model."""
    max_length: int = 512
    """Tokens of prompt and response together; longer responses are cut and counted."""
    epochs: int = 2
    """Passes over the data."""
    batch_tokens: int = 4096
    """Tokens of one optimizer step."""
    micro_tokens: int = 8192
    """Tokens of one forward pass; a step of more tokens accumulates gradients."""
    lr: float = 1e-3
    """Peak learning rate (1e-3 suits small models from scratch; 1e-5 a pretrained one)."""
    eval_every: int = 50
    """Steps between evaluations on held-out data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs", "batch_tokens", "micro_tokens", "eval_every")
        at_least(self, 2, "max_length")
        at_least(self, 258, "vocab_size")


def packed(examples: list[TokenizedCompletion]) -> Packed:
    """One pack whose targets are the response tokens."""
    return pack([e.prompt + e.completion for e in examples], [len(e.prompt) for e in examples])


@torch.no_grad()
def evaluate(
    policy: Policy, examples: list[TokenizedCompletion], config: SFTConfig
) -> dict[str, float]:
    """Held-out loss in nats per response token, and perplexity."""
    device = policy.head_weight.device
    policy.eval()
    total, count = 0.0, 0
    lengths = [len(e.prompt) + len(e.completion) for e in examples]
    for batch in token_budget_batches(lengths, config.micro_tokens):
        pack_ = packed([examples[i] for i in batch]).to(device)
        with autocast(device, config.dtype):
            logp, _ = policy.logprobs(pack_)
        total -= float(logp.sum())
        count += logp.numel()
    policy.train()
    return {"loss": total / count, "perplexity": math.exp(min(total / count, 50.0))}


def load_data(
    config: SFTConfig,
) -> tuple[Any, list[TokenizedCompletion], list[TokenizedCompletion]]:
    """Tokenizer, training and held-out examples."""
    records, report = source.completions(config.data, config.split, config.lines, config.limit)
    if config.model.startswith("scratch:"):
        texts = [t for r in records for t in (as_text(r.prompt), as_text(r.completion))]
        tokenizer = train_tokenizer(texts, config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.model)
    train = tokenize_completions(records, tokenizer, report, max_length=config.max_length)
    log.info("%s", report)
    held_source = source.held_out(
        config.data, config.eval_data, config.eval_split, config.eval_lines
    )
    if held_source is None:
        return tokenizer, train, []
    held, held_report = source.completions(
        held_source, config.eval_split, config.eval_lines, config.eval_limit, held_out=True
    )
    source.warn_of_overlap(records, held)
    test = tokenize_completions(held, tokenizer, held_report, max_length=config.max_length)
    log.info("%s", held_report)
    return tokenizer, train, test


def as_text(text: Any) -> str:
    """Plain text of a record's field, for training a tokenizer."""
    return text if isinstance(text, str) else "\n\n".join(m["content"] for m in text)


def train(config: SFTConfig) -> Path:
    """Runs supervised fine-tuning; the folder of the model."""
    device = begin(config)
    tokenizer, examples, held_out = load_data(config)
    policy = load_policy(
        config, config.model, tokenizer, max_length=config.max_length, device=device
    )
    check_context(config.max_length, policy.max_length, config.model)
    policy.train()

    lengths = [len(e.prompt) + len(e.completion) for e in examples]
    schedule = epochs_of_batches(lengths, config.epochs, config.batch_tokens, config.seed)
    optimizer = Optimizer(config, policy, len(schedule))
    loss_fn = losses.MLE()
    with Run(config, "sft", len(schedule)) as run:
        start = run.restore(Stateful({"policy": policy}, {"optimizer": optimizer}))
        if start == 0 and held_out:
            with run.meter.phase("evaluate"):
                run.log(0, "eval", evaluate(policy, held_out, config))
        for step in range(start + 1, len(schedule) + 1):
            batch = schedule[step - 1]
            tokens = sum(lengths[i] for i in batch)
            n_targets = sum(len(examples[i].completion) for i in batch)
            total = torch.zeros((), device=device)
            with run.meter.phase("update"):
                for micro in token_budget_batches([lengths[i] for i in batch], config.micro_tokens):
                    pack_ = packed([examples[batch[i]] for i in micro]).to(device)
                    with autocast(device, config.dtype):
                        hidden = policy.response_hidden(pack_)
                        out = ops.linear_loss(
                            hidden,
                            policy.head_weight.to(hidden.dtype),
                            pack_.response_targets,
                            loss_fn,
                            {},
                            bias=policy.head_bias,
                            softcap=policy.softcap,
                            ignore_index=None,
                            normalizer=n_targets,
                        )
                    out.loss.backward()
                    total += out.loss.detach()
                metrics = {"loss": float(total), "perplexity": math.exp(min(float(total), 50.0))}
                metrics |= optimizer.update(run, step, total, {"hidden states": hidden})
                optimizer.next_step()
                run.meter.count(
                    tokens,
                    trained=n_targets,
                    flops=training_flops(policy, [lengths[i] for i in batch], n_targets),
                )
            metrics |= run.meter.metrics()
            run.log(step, "train", metrics)
            if held_out and (step % config.eval_every == 0 or step == len(schedule)):
                with run.meter.phase("evaluate"):
                    run.log(step, "eval", evaluate(policy, held_out, config))
            run.end_step(step)
        model_folder = run.folder / "model"
        policy.save(model_folder, tokenizer)
    return model_folder
