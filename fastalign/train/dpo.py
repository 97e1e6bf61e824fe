"""Preference training without a reward model: DPO and its relatives, on pairs or single responses.

    L = 1/E sum over examples of loss(log pi(y_w | x), log pi(y_l | x), log ref(...))

fastalign/losses/preference.py has the formulas. Chosen and rejected of a pair lie side by side in
one pack, and the loss head keeps them in one slab: no padding, and no logits tensor. The reference
is the policy as it was at the beginning; its log-probs are those of fixed responses, so they are
computed once (or anew in every step, which takes no storage).
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
from fastalign.data.packing import epochs_of_batches, token_budget_batches
from fastalign.losses import KTO
from fastalign.losses.preference import PreferenceLoss
from fastalign.models import Policy, load_tokenizer
from fastalign.models.flops import forward_flops, training_flops
from fastalign.train import distributed
from fastalign.train.distributed import Micro
from fastalign.train.optim import Optimizer
from fastalign.train.preference_data import Examples, load_examples
from fastalign.train.preference_metrics import Means, Part, statistics
from fastalign.train.preference_variants import OPTIONS, preference_loss, reference_mode
from fastalign.train.reference import logprobs, precompute, ref_logprobs
from fastalign.train.run import (
    Run,
    RunError,
    Stateful,
    autocast,
    begin,
    check_context,
)
from fastalign.train.same_run import Inputs
from fastalign.train.sampled import Sampled
from fastalign.train.setup import load_policy
from fastalign.train.supervised import SupervisedConfig

log = logging.getLogger("fastalign")


@dataclass
class DPOConfig(SupervisedConfig):
    """Train a policy on preferences: DPO and its variants, SimPO, KTO."""

    output: str = "runs/dpo"
    """Folder of the run; the model is written to OUTPUT/model."""
    model: str = "runs/sft/model"
    """What the policy starts from, and its reference: an SFT model's or any folder, or a hub id."""
    data: str = "synthetic"
    """Preference pairs, for kto also single responses with labels: JSONL(.gz), Parquet, a folder, a
    hub id, or synthetic."""
    epochs: int = 1
    """Passes over the data."""
    batch_tokens: int = 8192
    """Tokens of one optimizer step, prompts and both responses counted."""
    lr: float = 1e-4
    """Peak learning rate (1e-4 suits small models; 5e-7 to 5e-6 large ones)."""
    loss: str = "sigmoid"
    """sigmoid (DPO), robust, hinge, ipo, hdpo, rdpo, rpo, xpo, simpo or kto."""
    beta: float | None = None
    """Strength of the reward: by default 0.1, simpo 2."""
    label_smoothing: float | None = None
    """Of sigmoid (then cDPO), robust, hdpo, rdpo, simpo: the chance that a label is wrong."""
    average: bool | None = None
    """Of sigmoid, robust, hinge, ipo, hdpo, rdpo: rewards from means over tokens, not sums."""
    alpha: float | None = None
    """Of hdpo: the entropy's weight (below 1 sharpens); of xpo: the optimism, by default 1e-5."""
    length_coef: float | None = None
    """Of rdpo: added to the reward per token of a response."""
    eta: float | None = None
    """Of rpo: weight of the chosen response's likelihood, by default 0.005 (mean: try 0.2)."""
    nll: str | None = None
    """Of rpo: sum (times beta, the default) or mean."""
    gamma: float | None = None
    """Of simpo: the target margin in units of the reward, by default 1."""
    desirable_weight: float | None = None
    """Of kto, by default 1."""
    undesirable_weight: float | None = None
    """Of kto, by default 1."""
    kl_baseline: str | None = None
    """Of kto: strangers (the default: the mean of log pi - log ref over responses to other prompts,
    one more forward pass each) or zero."""
    reference: str | None = None
    """precompute (the default: once, before training), live (in every step, with a copy of the
    model), or none (simpo)."""
    reference_cache: str | None = None
    """Folder of the precomputed log-probs, by default OUTPUT/reference; runs may share one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.loss_object()
        except ValueError as error:
            raise RunError(f"--loss {self.loss}: {error}") from error
        if self.reference_mode() != "precompute" and self.reference_cache is not None:
            raise RunError("--reference_cache does not go without --reference precompute")
        if self.kl_baseline not in (None, "strangers", "zero"):
            raise RunError(f"unknown kl_baseline {self.kl_baseline!r}: expected strangers or zero")

    def loss_object(self) -> PreferenceLoss:
        return preference_loss(self.loss, {name: getattr(self, name) for name in OPTIONS})

    def reference_mode(self) -> str:
        return reference_mode(self.loss, self.reference)

    @property
    def strangers(self) -> bool:
        return self.loss == "kto" and self.kl_baseline != "zero"


@dataclass(frozen=True)
class Trainee:
    """The policy, what it is compared with, and the loss."""

    policy: Policy
    reference: Policy | None
    """None: its log-probs are stored, or there is none."""
    loss: PreferenceLoss
    config: DPOConfig

    @property
    def device(self) -> torch.device:
        return self.policy.head_weight.device

    def part(self, examples: Examples, micro: Micro, z0: Tensor | None) -> Part:
        """What a forward pass reads; a live reference has read it then."""
        chosen = micro.rows
        rows = examples.rows(chosen)
        packed = examples.responses.pack(rows).to(self.device)
        inputs = dict[str, Any]()
        if "ref_logp" in self.loss.required:
            inputs["ref_logp"] = ref_logprobs(
                self.reference, examples.responses, rows, packed, self.config.dtype
            )
        if self.loss.flags_name is not None:
            assert examples.flags is not None
            inputs[self.loss.flags_name] = examples.flags[chosen].to(self.device)
        if z0 is not None:
            inputs["z0"] = z0
        return Part(chosen, packed, examples.responses.bounds(rows), inputs, micro.counts)

    def forward(self, part: Part, normalizer: float) -> tuple[ops.LossOutput, Tensor]:
        """The sum of the examples' losses over the normalizer, and the hidden states."""
        with autocast(self.device, self.config.dtype):
            hidden = self.policy.response_hidden(part.packed)
            out = ops.linear_loss(
                hidden,
                self.policy.head_weight.to(hidden.dtype),
                part.packed.response_targets,
                self.loss,
                part.inputs,
                bias=self.policy.head_bias,
                softcap=self.policy.softcap,
                ignore_index=None,
                groups=part.bounds,
                normalizer=normalizer if part.counts else math.inf,
            )
        return out, hidden

    def baseline(self, examples: Examples, batch: list[int]) -> Tensor | None:
        """KTO's z0 from the strangers of a whole batch, 0-d; None for other losses."""
        if not isinstance(self.loss, KTO):
            return None
        strangers = examples.strangers
        if strangers is None:
            return torch.zeros((), device=self.device)
        ours, theirs = [], []
        lengths = [strangers.lengths[i] for i in batch]
        for micro in token_budget_batches(lengths, self.config.micro_tokens):
            rows = [batch[i] for i in micro]
            packed = strangers.pack(rows).to(self.device)
            ours.append(logprobs(self.policy, packed, self.config.dtype))
            theirs.append(ref_logprobs(self.reference, strangers, rows, packed, self.config.dtype))
        return KTO.baseline(torch.cat(ours), torch.cat(theirs), len(batch))

    @property
    def looks_up(self) -> bool:
        """Whether a step makes passes beside the policy's own."""
        return self.reference is not None or self.config.strangers

    def reference_flops(self, examples: Examples, passes: list[list[int]]) -> float:
        """Of the passes beside these of the policy: the reference's, and the policy's over
        strangers."""
        found = 0.0
        for responses in (examples.responses, examples.strangers):
            if responses is not None:
                size = responses.size(passes)
                if self.reference is not None:
                    found += forward_flops(self.reference, *size)
                if responses is examples.strangers:
                    found += forward_flops(self.policy, *size)
        return found


@torch.no_grad()
def evaluate(trainee: Trainee, examples: Examples) -> dict[str, float]:
    """Held-out loss, rewards and their margin, and of pairs the accuracy with a 95 % interval.

    Accuracy: the share of pairs whose chosen response has the larger implicit reward.
    """
    trainee.policy.eval()
    everything = list(range(len(examples)))
    total, own = 0.0, list[tuple[list[int], dict[str, Tensor]]]()
    z0 = trainee.baseline(examples, everything)
    for micro in distributed.looks(
        examples.packed_lengths, trainee.config.micro_tokens, examples.prompts
    ):
        part = trainee.part(examples, micro, z0)
        out, _ = trainee.forward(part, len(examples))
        total += float(out.loss)
        bounds = part.bounds.to(trainee.device)
        statistics_ = trainee.loss.statistics(out.logp, cu_seqlens=bounds, **part.inputs)
        if micro.counts:
            own.append((micro.rows, {name: x.cpu() for name, x in statistics_.items()}))
    trainee.policy.train()
    total = sum(one for (one,) in distributed.gather([total]))
    parts = [part for share in distributed.gather(own) for part in share]
    order = torch.tensor([i for rows, _ in parts for i in rows]).argsort()
    found = {
        name: torch.cat([part[name] for _, part in parts]).double()[order] for name in parts[0][1]
    }
    metrics = {"loss": total}
    metrics |= {name: float(x.nanmean()) for name, x in found.items() if not x.isnan().all()}
    right = found.get("rewards/accuracies")
    if examples.split:
        right = (found["rewards/chosen"][0::2] > found["rewards/rejected"][1::2]).double()
    if right is not None:
        p = float(right.mean())
        metrics["rewards/accuracies"] = p
        metrics["rewards/accuracies_ci95"] = 1.96 * math.sqrt(max(p * (1 - p), 1e-12) / len(right))
    if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def load_data(
    config: DPOConfig, tokenizer: Any, loss: PreferenceLoss
) -> tuple[Examples, Examples | None]:
    """Training and held-out examples."""
    form: dict[str, Any] = {"max_length": config.max_length, "strangers": config.strangers}
    records, train = load_examples(
        loss, tokenizer, (config.data, config.split, config.lines, config.limit), **form
    )
    held_source = source.held_out(
        config.data, config.eval_data, config.eval_split, config.eval_lines
    )
    if held_source is None:
        return train, None
    held = (held_source, config.eval_split, config.eval_lines, config.eval_limit)
    held_records, test = load_examples(loss, tokenizer, held, held_out=True, **form)
    source.warn_of_overlap(records, held_records)
    return train, test


def warn_of_imbalance(loss: PreferenceLoss, examples: Examples) -> None:
    """KTO's paper wants the desirable responses' whole weight in 1 to 4/3 of the others'."""
    if not isinstance(loss, KTO):
        return
    assert examples.flags is not None
    good = int(examples.flags.sum())
    bad = len(examples) - good
    weighted = loss.desirable_weight * good, loss.undesirable_weight * bad
    if not weighted[1] <= weighted[0] <= 4 / 3 * weighted[1]:
        log.warning(
            "kto: %d desirable and %d undesirable responses weigh %g and %g together; the first is "
            "best in 1 to 4/3 of the second: see --desirable_weight and --undesirable_weight",
            *(good, bad, *weighted),
        )


def train(config: DPOConfig) -> Path:
    """Trains the policy; the folder of the model."""
    device = begin(config)
    loss = config.loss_object()
    tokenizer = load_tokenizer(config.model)
    examples, held_out = load_data(config, tokenizer, loss)
    warn_of_imbalance(loss, examples)
    policy = load_policy(
        config, config.model, tokenizer, max_length=config.max_length, device=device
    )
    check_context(config.max_length, policy.max_length, config.model)
    reference = policy.frozen_copy() if config.reference_mode() == "live" else None
    sampled = Sampled(
        config, policy, tokenizer, held_out.responses.items if held_out is not None else []
    )
    policy.train()
    trainee = Trainee(policy, reference, loss, config)
    inputs = Inputs(data=examples.responses.items, start=policy)
    for pairs in (examples, held_out):
        if pairs is not None and pairs.per_example == 2 and policy.shares_prompts:
            pairs.share_prompts()

    schedule = epochs_of_batches(examples.lengths, config.epochs, config.batch_tokens, config.seed)
    with Run(config, "dpo", len(schedule)) as run:
        if config.reference_mode() == "precompute":
            found = [e for e in (examples, held_out) if e is not None]
            sets = [s for e in found for s in (e.responses, e.strangers) if s is not None]
            cache = Path(config.reference_cache or run.folder / "reference")
            precompute(policy, sets, cache, config.dtype, config.micro_tokens, run.meter)
            run.meter.skip()  # no step's
        distributed.shard(policy, "hidden")
        optimizer = Optimizer(config, policy, len(schedule))
        others = {"optimizer": optimizer, "inputs": inputs, "sampled": sampled}
        start = run.restore(Stateful({"policy": policy}, others))

        def log_evaluation(step: int, found: dict[str, float]) -> None:
            if held_out is not None:
                with run.meter.phase("evaluate"):
                    run.log(step, "eval", evaluate(trainee, held_out) | found)

        found_before = sampled.before(run)
        if start == 0:
            log_evaluation(0, found_before)
        for step in range(start + 1, len(schedule) + 1):
            batch = schedule[step - 1]
            form = batch, examples.packed_lengths, config.micro_tokens, examples.prompts
            passes = [examples.rows(rows) for rows in distributed.passes(*form)]
            means, total = Means(), torch.zeros((), device=device)
            beside = "reference" if trainee.looks_up else "update"
            with run.meter.phase(beside):
                z0 = trainee.baseline(examples, batch)
                run.meter.count(flops=trainee.reference_flops(examples, passes))
            for micro in distributed.micros(policy, *form):
                with run.meter.phase(beside):
                    part = trainee.part(examples, micro, z0)
                with run.meter.phase("update"):
                    out, hidden = trainee.forward(part, len(batch))
                    out.loss.backward()
                    total += out.loss.detach()
                    statistics(means, out, examples, part)
            with run.meter.phase("update"):
                distributed.total(total)
                metrics = {"loss": float(total)} | means.metrics()
                if z0 is not None:
                    metrics["kl_baseline"] = float(z0)
                metrics |= optimizer.update(run, step, total, {"hidden states": hidden})
                optimizer.next_step()
                own, n_trained, before = examples.responses.size(passes)
                flops = training_flops(policy, own, n_trained, before)
                run.meter.count(sum(own), trained=n_trained, flops=flops)
                metrics["tokens/repeated"] = sum(before)
            run.log(step, "train", metrics | run.meter.metrics())
            if step % config.eval_every == 0 or step == len(schedule):
                log_evaluation(step, sampled.after(run, step == len(schedule)))
            run.end_step(step)
        if sampled.unfinished:  # the checkpoint is of the last step only now
            log_evaluation(len(schedule), sampled.after(run))
        with run.saving_model() as folder:
            whole = distributed.unsharded(policy)
            if isinstance(whole, Policy):
                whole.save(folder, tokenizer)
        sampled.write(run)
    return run.folder / "model"
