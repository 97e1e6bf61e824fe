"""Reward modelling: K Bradley-Terry heads on one encoder, trained in one run.

L = mean over heads k of mean over pairs of -log sigma(r_k(x, y_w) - r_k(x, y_l))      (2406.01013)

With a trained encoder the heads share it; with a frozen one each head's problem is convex, so heads
trained to convergence on the same pairs become one and the same: bootstrap resampling keeps them
apart.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import ops
from fastalign.data import source
from fastalign.data.packing import Packed, epochs_of_batches, pack, token_budget_batches
from fastalign.data.tokens import TokenizedPreference, tokenize_preferences
from fastalign.models import RewardEnsemble, load_tokenizer
from fastalign.models.flops import training_flops
from fastalign.models.reward import EnsembleConfig
from fastalign.streams import stream
from fastalign.train.optim import OptimConfig, Optimizer
from fastalign.train.run import (
    Run,
    RunError,
    Stateful,
    at_least,
    autocast,
    begin,
    check_context,
)
from fastalign.train.same_run import Inputs
from fastalign.train.setup import prepare_trunk

log = logging.getLogger("fastalign")


@dataclass
class RewardConfig(OptimConfig):
    """Train an ensemble of reward heads on preference pairs."""

    output: str = "runs/reward"
    """Folder of the run; the ensemble is written to OUTPUT/model."""
    model: str = "runs/sft/model"
    """What the encoder starts from: an SFT model's or any folder, a hub id, or scratch:NAME."""
    tokenizer: str | None = None
    """Folder or id of the tokenizer, where it is not the model's (scratch:NAME needs one)."""
    data: str = "synthetic"
    """Preference pairs: JSONL(.gz), Parquet, a folder, a hub id, or synthetic."""
    lines: str | None = None
    """Use these records only, as a Python slice: 0:2000."""
    limit: int | None = None
    """Use at most this many pairs."""
    split: str | None = None
    """Split of a folder or data set that has more than one."""
    eval_data: str | None = None
    """Held-out pairs. By default: the built-in task's test split, or --data with --eval_split or
    --eval_lines."""
    eval_split: str | None = None
    """Split of the held-out data."""
    eval_lines: str | None = None
    """Held-out records of --eval_data (or of --data), as a Python slice."""
    eval_limit: int | None = 1000
    """Use at most this many held-out pairs."""
    max_length: int = 512
    """Tokens of prompt and response together; longer responses are cut and counted."""
    heads: int = 5
    """K, the number of reward heads."""
    statistic: str = "mean"
    """What the ensemble says: mean, median, min (WCO), lcb = mean - coef * std over the heads, or
    uwo = mean - coef * variance."""
    coef: float = 1.0
    """c of lcb and uwo (std and variance over heads with ddof 1)."""
    head_init: float = 1.0
    """Head weights start as normal, standard deviation this over the square root of the width."""
    bootstrap: str = "resample"
    """resample: each head sees its own draw of the pairs with replacement; none: all see all."""
    freeze_encoder: bool = False
    """Train the heads only."""
    epochs: int = 1
    """Passes over the pairs."""
    batch_tokens: int = 8192
    """Tokens of one optimizer step, both responses counted."""
    micro_tokens: int = 8192
    """Tokens of one forward pass."""
    lr: float = 3e-4
    """Peak learning rate of encoder and heads."""
    eval_every: int = 50
    """Steps between evaluations on held-out pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "heads", "epochs", "batch_tokens", "micro_tokens", "eval_every")
        at_least(self, 2, "max_length")
        at_least(self, 0, "coef", "head_init")
        if self.bootstrap not in ("none", "resample"):
            raise RunError(f"unknown bootstrap {self.bootstrap!r}: expected none or resample")


def packed(pairs: list[TokenizedPreference]) -> Packed:
    """One pack: all chosen responses, then all rejected ones."""
    chosen = [p.prompt + p.chosen for p in pairs]
    rejected = [p.prompt + p.rejected for p in pairs]
    return pack(chosen + rejected)


def pair_length(pair: TokenizedPreference) -> int:
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def bootstrap_weights(n_pairs: int, heads: int, seed: int) -> Tensor:
    """int64 [n_pairs, heads]: how often each head's draw with replacement holds each pair."""
    weights = torch.zeros(n_pairs, heads, dtype=torch.int64)
    for k in range(heads):
        drawn = torch.randint(n_pairs, (n_pairs,), generator=stream(seed, "bootstrap", k))
        weights[:, k] = torch.bincount(drawn, minlength=n_pairs)
    return weights


def pair_loss(chosen: Tensor, rejected: Tensor, weights: Tensor, totals: Tensor) -> Tensor:
    """The part of a batch's loss that some of its pairs carry; the parts add up to the whole.

        1/K sum_k  sum_b weights[b, k] l[b, k] / totals[k]

    Args:
        chosen, rejected: fp32 [b, K], scores of these pairs.
        weights: int64 [b, K], how often each pair counts for each head.
        totals: int64 [K], the sum of the weights over the whole batch.
    """
    return ops.bradley_terry_loss(chosen, rejected, head_mask=weights, totals=totals)


@torch.no_grad()
def score_pairs(
    ensemble: RewardEnsemble, pairs: list[TokenizedPreference], config: RewardConfig
) -> tuple[Tensor, Tensor]:
    """fp32 [n, K] scores of the chosen and of the rejected responses."""
    device = ensemble.weight.device
    was_training = ensemble.training
    ensemble.eval()
    scores = torch.empty(2, len(pairs), ensemble.config.n_heads)
    lengths = [pair_length(p) for p in pairs]
    for batch in token_budget_batches(lengths, config.micro_tokens):
        with autocast(device, config.dtype):
            both = ensemble(packed([pairs[i] for i in batch]).to(device))
        scores[:, batch] = both.reshape(2, len(batch), -1).cpu()
    ensemble.train(was_training)
    return scores[0], scores[1]


def evaluate(
    ensemble: RewardEnsemble, pairs: list[TokenizedPreference], config: RewardConfig
) -> dict[str, float]:
    """Held-out loss, and the accuracy of every head and of the ensemble with a 95 % interval."""
    chosen, rejected = score_pairs(ensemble, pairs, config)
    right = (chosen > rejected).float()
    together = (ensemble.reduce(chosen) > ensemble.reduce(rejected)).float().mean().item()
    disagreement = torch.cat([chosen, rejected])
    metrics = {
        "loss": ops.bradley_terry_loss(chosen, rejected).item(),
        "accuracy": together,
        "accuracy/ci95": 1.96 * math.sqrt(max(together * (1 - together), 1e-12) / len(pairs)),
        "disagreement": disagreement.std(1).mean().item() if ensemble.config.n_heads > 1 else 0.0,
    }
    for k, accuracy in enumerate(right.mean(0).tolist()):
        metrics[f"accuracy/head_{k}"] = accuracy
    return metrics


def load_data(
    config: RewardConfig, tokenizer: Any
) -> tuple[list[TokenizedPreference], list[TokenizedPreference]]:
    """Training and held-out pairs."""
    records, report = source.preferences(config.data, config.split, config.lines, config.limit)
    train = tokenize_preferences(records, tokenizer, report, max_length=config.max_length)
    log.info("%s", report)
    held_source = source.held_out(
        config.data, config.eval_data, config.eval_split, config.eval_lines
    )
    if held_source is None:
        return train, []
    held, held_report = source.preferences(
        held_source, config.eval_split, config.eval_lines, config.eval_limit, held_out=True
    )
    source.warn_of_overlap(records, held)
    test = tokenize_preferences(held, tokenizer, held_report, max_length=config.max_length)
    log.info("%s", held_report)
    return train, test


def train(config: RewardConfig) -> Path:
    """Trains the ensemble; the folder of the model."""
    device = begin(config)
    if config.tokenizer is None and config.model.startswith("scratch:"):
        raise RunError(
            f"model {config.model!r} has no tokenizer of its own: give one with --tokenizer"
        )
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    pairs, held_out = load_data(config, tokenizer)
    heads = EnsembleConfig(
        config.heads, config.statistic, config.coef, config.seed, config.head_init
    )
    ensemble = RewardEnsemble.create(
        config.model, tokenizer, heads, max_length=config.max_length
    ).to(device)
    check_context(config.max_length, ensemble.max_length, config.model)
    ensemble.encoder.requires_grad_(not config.freeze_encoder)
    prepare_trunk(config, ensemble.encoder)
    ensemble.train()

    lengths = [pair_length(p) for p in pairs]
    schedule = epochs_of_batches(lengths, config.epochs, config.batch_tokens, config.seed)
    weights = torch.ones(len(pairs), config.heads, dtype=torch.int64)
    if config.bootstrap == "resample" and config.heads > 1:
        weights = bootstrap_weights(len(pairs), config.heads, config.seed)

    optimizer = Optimizer(config, ensemble, len(schedule))
    with Run(config, "reward", len(schedule)) as run:
        others = {"optimizer": optimizer, "inputs": Inputs(data=pairs)}
        start = run.restore(Stateful({"ensemble": ensemble}, others))
        for step in range(start + 1, len(schedule) + 1):
            batch = schedule[step - 1]
            totals = weights[batch].sum(0)
            total, right = torch.zeros(2, device=device).unbind()
            with run.meter.phase("update"):
                for micro in token_budget_batches([lengths[i] for i in batch], config.micro_tokens):
                    rows = [batch[i] for i in micro]
                    with autocast(device, config.dtype):
                        scores = ensemble(packed([pairs[i] for i in rows]).to(device))
                    chosen, rejected = scores.chunk(2)
                    kept = (t.to(device) for t in (weights[rows], totals))
                    loss = pair_loss(chosen, rejected, *kept)
                    loss.backward()
                    total += loss.detach()
                    wins = ensemble.reduce(chosen.detach()) > ensemble.reduce(rejected.detach())
                    right += wins.sum()
                metrics = {"loss": float(total), "accuracy": float(right) / len(batch)}
                metrics |= optimizer.update(run, step, total, {"scores": scores})
                optimizer.next_step()
                responses = [len(r) for i in batch for r in (pairs[i].chosen, pairs[i].rejected)]
                prompts = [len(pairs[i].prompt) for i in batch for _ in range(2)]
                run.meter.count(
                    sum(lengths[i] for i in batch),
                    trained=sum(responses),
                    flops=training_flops(
                        ensemble,
                        [p + r for p, r in zip(prompts, responses, strict=True)],
                        len(responses),
                    ),
                )
            metrics |= run.meter.metrics()
            run.log(step, "train", metrics)
            with run.meter.phase("evaluate"):
                if step == len(schedule):
                    ensemble.standardise(torch.cat(score_pairs(ensemble, pairs[:500], config)))
                if held_out and (step % config.eval_every == 0 or step == len(schedule)):
                    run.log(step, "eval", evaluate(ensemble, held_out, config))
            run.end_step(step)
        with run.saving_model() as folder:
            ensemble.save(folder, tokenizer)
    return run.folder / "model"
