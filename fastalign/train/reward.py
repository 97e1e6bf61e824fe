"""Reward modelling: K Bradley-Terry heads on one encoder, trained in one run.

L = mean over heads k of mean over pairs of -log sigma(r_k(x, y_w) - r_k(x, y_l) - margin)
    + center_coef (r_k(x, y_w) + r_k(x, y_l))^2                                       (2406.01013)

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

from fastalign.data import source
from fastalign.data.packing import epochs_of_batches
from fastalign.data.tokens import TokenizedPreference, tokenize_preferences
from fastalign.models import RewardEnsemble, load_tokenizer
from fastalign.models.flops import training_flops
from fastalign.models.reward import EnsembleConfig
from fastalign.train import distributed
from fastalign.train.head_diversity import warn_of_one_head
from fastalign.train.label_noise import Labels, relabel, strength
from fastalign.train.optim import OptimConfig, Optimizer
from fastalign.train.reward_evaluation import (
    evaluate,
    out_of_distribution,
    packed,
    pair_length,
    same_pairs,
    score_pairs,
    shared_length,
    sizes,
)
from fastalign.train.reward_loss import bootstrap_weights, pair_loss
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
    encoder_grad_scale: str = "1"
    """What the encoder's gradient, the mean over the heads, is multiplied with: a number, or 1/K.
    AdamW undoes a constant factor; what stays is the encoder's share in the clipped norm."""
    margin: str | None = None
    """data: each record's margin; or a number for all. The chosen response is to win by so much."""
    label_smoothing: float = 0.0
    """Chance that a label is wrong; with --soft_label_below, of the labels chosen by that."""
    center_coef: float = 0.0
    """Weight of (r_w + r_l)^2, which keeps scores near 0; 0.01 is usual."""
    strength_from: str | None = None
    """A trained ensemble, whose mean r_w - r_l is each pair's strength, for the next three."""
    flip_below: float = 0.0
    """Quantile of strength below which labels are turned round: 0.2."""
    soft_label_below: float = 0.0
    """Quantile below which the labels that are not turned round are smoothed: 0.4."""
    adaptive_margin: bool = False
    """The strength is the margin."""
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
        at_least(self, 0, "label_smoothing", "center_coef", "flip_below", "soft_label_below")
        if self.label_smoothing >= 0.5 or self.flip_below >= 1 or self.soft_label_below >= 1:
            raise RunError(
                "expected label_smoothing < 0.5 and quantiles < 1, got "
                f"{self.label_smoothing}, {self.flip_below} and {self.soft_label_below}"
            )
        if self.grad_scale() != 1.0 and self.freeze_encoder:
            raise RunError(
                "--encoder_grad_scale does not go with --freeze_encoder: there is no gradient"
            )
        self.constant_margin()
        self._check_labels()

    def _check_labels(self) -> None:
        """Which options on labels need each other, and which cannot be had together."""
        treated = {
            "flip_below": self.flip_below,
            "soft_label_below": self.soft_label_below,
            "adaptive_margin": self.adaptive_margin,
        }
        for name, value in treated.items():
            if value and self.strength_from is None:
                raise RunError(f"--{name} goes by the pairs' strength: it needs --strength_from")
        if self.adaptive_margin and self.margin is not None:
            raise RunError("--adaptive_margin and --margin both set the margin: give one of them")
        if self.flip_below and self.margin == "data":
            raise RunError(
                "--flip_below does not go with --margin data: the margin of a record says by how "
                "much the response wins that is then made the loser"
            )
        if self.soft_label_below and not self.label_smoothing:
            raise RunError("--soft_label_below needs --label_smoothing, by how much")
        if self.soft_label_below and self.soft_label_below <= self.flip_below:
            raise RunError(
                f"--soft_label_below {self.soft_label_below} leaves no pair that --flip_below "
                f"{self.flip_below} has not turned round: expected a larger quantile"
            )

    def grad_scale(self) -> float:
        """
        Raises:
            RunError: neither a number above 0 nor 1/K.
        """
        try:
            scale = 1.0 / self.heads if self.encoder_grad_scale == "1/K" else None
            scale = float(self.encoder_grad_scale) if scale is None else scale
        except ValueError:
            scale = 0.0
        if not 0.0 < scale < math.inf:
            raise RunError(
                f"encoder_grad_scale {self.encoder_grad_scale!r}: expected 1/K or a number above 0"
            )
        return scale

    def constant_margin(self) -> float | None:
        """The margin of all pairs; None where there is none, or each has its own.

        Raises:
            RunError: neither a number nor data.
        """
        if self.margin in (None, "data"):
            return None
        try:
            margin = float(self.margin)
        except ValueError:
            margin = math.nan
        if not math.isfinite(margin):
            raise RunError(f"margin {self.margin!r}: expected data or a number")
        return margin


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


def treat_labels(
    config: RewardConfig, tokenizer: Any, pairs: list[TokenizedPreference], device: torch.device
) -> tuple[Labels, dict[str, float]]:
    """The pairs as they are trained on, with margins; and numbers on what was done to them.

    Raises:
        RunError: a margin is missing, or the ensemble of --strength_from has another tokenizer.
    """
    margin: Tensor | float | None = config.constant_margin()
    if config.margin == "data":
        own = [pair.margin for pair in pairs if pair.margin is not None]
        if len(own) < len(pairs):
            raise RunError(
                f"--margin data: {len(pairs) - len(own)} of {len(pairs)} pairs have no margin"
            )
        margin = torch.tensor(own)
    labels = Labels(pairs, margin)
    if config.strength_from is None:
        return labels, {}
    judge = RewardEnsemble.load(config.strength_from).to(device)
    if load_tokenizer(config.strength_from).get_vocab() != tokenizer.get_vocab():
        raise RunError(f"--strength_from {config.strength_from}: its tokenizer is another one")
    check_context(config.max_length, judge.max_length, config.strength_from)
    mu, std = strength(*score_pairs(judge, pairs, config.micro_tokens, config.dtype))
    labels, counts = relabel(
        labels, mu, config.flip_below, config.soft_label_below, config.adaptive_margin
    )
    counts |= {
        "strength/mean": float(mu.mean()),
        "strength/std_over_heads": float(std.mean()),
        "strength/negative": float((mu < 0).float().mean()),
    }
    log.info(
        "labels: of %d pairs %.1f %% have a strength below 0; %d turned round, %d smoothed",
        *(len(pairs), 100 * counts["strength/negative"], counts["flipped"], counts["softened"]),
    )
    return labels, counts


def train(config: RewardConfig) -> Path:
    """Trains the ensemble; the folder of the model."""
    device = begin(config)
    if config.tokenizer is None and config.model.startswith("scratch:"):
        raise RunError(
            f"model {config.model!r} has no tokenizer of its own: give one with --tokenizer"
        )
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    pairs, held_out = load_data(config, tokenizer)
    labels, counts = treat_labels(config, tokenizer, pairs, device)
    pairs = labels.pairs
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

    inputs = Inputs(data=pairs)
    distributed.shard(ensemble)
    encoder, scale = list(ensemble.encoder.parameters()), config.grad_scale()

    lengths, share = [pair_length(p) for p in pairs], ensemble.shares_prompts
    schedule = epochs_of_batches(lengths, config.epochs, config.batch_tokens, config.seed)
    packed_lengths = [shared_length(p) for p in pairs] if share else lengths
    prompts = same_pairs(pairs) if share else None
    weights = torch.ones(len(pairs), config.heads, dtype=torch.int64)
    if config.bootstrap == "resample" and config.heads > 1:
        weights = bootstrap_weights(len(pairs), config.heads, config.seed)

    optimizer = Optimizer(config, ensemble, len(schedule))
    passes = config.micro_tokens, config.dtype
    with Run(config, "reward", len(schedule)) as run:
        others = {"optimizer": optimizer, "inputs": inputs}
        start = run.restore(Stateful({"ensemble": ensemble}, others))
        if start == 0 and counts:
            run.log(0, "labels", counts)
        for step in range(start + 1, len(schedule) + 1):
            batch = schedule[step - 1]
            form = batch, packed_lengths, config.micro_tokens, prompts
            totals = weights[batch].sum(0)
            total, right = torch.zeros(2, device=device).unbind()
            with run.meter.phase("update"):
                for micro in distributed.micros(ensemble, *form):
                    rows = micro.rows
                    with autocast(device, config.dtype):
                        scores = ensemble(packed([pairs[i] for i in rows], share).to(device))
                    chosen, rejected = scores[0::2], scores[1::2]
                    kept = (t.to(device) for t in (weights[rows], totals))
                    loss = pair_loss(
                        chosen,
                        rejected,
                        *kept,
                        **labels.of(rows, device),
                        label_smoothing=config.label_smoothing,
                        center_coef=config.center_coef,
                    )
                    if not micro.counts:
                        loss = 0.0 * loss
                    loss.backward()
                    total += loss.detach()
                    wins = ensemble.reduce(chosen.detach()) > ensemble.reduce(rejected.detach())
                    right += wins.sum() * micro.counts
                total, right = distributed.total(torch.stack([total, right])).unbind()
                metrics = {"loss": float(total), "accuracy": float(right) / len(batch)}
                if scale != 1.0:
                    torch._foreach_mul_([p.grad for p in encoder if p.grad is not None], scale)
                metrics |= optimizer.update(run, step, total, {"scores": scores})
                optimizer.next_step()
                own, before = sizes(pairs, distributed.passes(*form), share)
                responses = sum(len(pairs[i].chosen) + len(pairs[i].rejected) for i in batch)
                flops = training_flops(ensemble, own, len(own), before)
                run.meter.count(sum(own), trained=responses, flops=flops)
                metrics["tokens/repeated"] = sum(before)
            metrics |= run.meter.metrics()
            run.log(step, "train", metrics)
            with run.meter.phase("evaluate"):
                if step == len(schedule):
                    ensemble.standardise(torch.cat(score_pairs(ensemble, pairs[:500], *passes)))
                if held_out and (step % config.eval_every == 0 or step == len(schedule)):
                    found = evaluate(ensemble, held_out, *passes)
                    if step == len(schedule):
                        found |= out_of_distribution(ensemble, held_out, config.seed, *passes)
                        warn_of_one_head(found)
                    run.log(step, "eval", found)
            run.end_step(step)
        with run.saving_model() as folder:
            whole = distributed.unsharded(ensemble)
            if isinstance(whole, RewardEnsemble):
                whole.save(folder, tokenizer)
    return run.folder / "model"
