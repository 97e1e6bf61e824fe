"""Advantage-Induced Policy Alignment (2306.02231, squared form).

    L_APA = mean over sampled tokens of (log pi(a|s) - Adv(s, a) / lambda - log pi_init(a|s))^2

One step of this loop:
  1. sample responses from pi; score them with the reward ensemble (one number, on the last token);
  2. log-probs of the same tokens under the frozen pi_init; values V(s) of every state;
  3. advantages by GAE from the old values, whitened; returns = unwhitened advantages + V;
  4. a few epochs of minibatches on L_APA + vf_coef * (V - return)^2 / 2.

There is no KL penalty in the reward and no ratio: pi_init is in the regression's target. On-policy,
its fixed point is pi_init exp(Adv / lambda) / Z.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import losses, ops
from fastalign.data import source
from fastalign.data.packing import Packed, token_budget_batches
from fastalign.models import Policy, RewardEnsemble, load_tokenizer
from fastalign.models.flops import forward_flops, training_flops
from fastalign.models.reward import EnsembleConfig, check_same_tokenizer
from fastalign.ops.reduce_scores import STATISTICS
from fastalign.rollout import SamplingConfig, TransformersEngine
from fastalign.streams import stream
from fastalign.train import experience
from fastalign.train.evaluate import (
    Evaluation,
    Evaluations,
    command_line,
    evaluate,
    machine,
    versions,
)
from fastalign.train.experience import Collector, Experience
from fastalign.train.moments import RunningMoments
from fastalign.train.optim import OptimConfig, Optimizer
from fastalign.train.prompts import choose_prompts, load_prompts
from fastalign.train.run import (
    Run,
    RunError,
    Stateful,
    at_least,
    autocast,
    begin,
)
from fastalign.train.same_run import Inputs
from fastalign.train.setup import load_policy

log = logging.getLogger("fastalign")


@dataclass
class APAConfig(OptimConfig):
    """Align a policy with a reward ensemble by Advantage-Induced Policy Alignment."""

    output: str = "runs/apa"
    """Folder of the run; the aligned policy is written to OUTPUT/model."""
    policy: str = "runs/sft/model"
    """pi_init: folder or hub id of the model to align."""
    reward: str = "runs/reward/model"
    """Folder of the reward ensemble."""
    judge: str | None = None
    """Folder of a second reward ensemble, used in the evaluation only."""
    statistic: str | None = None
    """Statistic of the reward ensemble, where it is not to be the one it was saved with."""
    coef: float | None = None
    """Coefficient of lcb and uwo, likewise."""
    prompts: str = "synthetic"
    """Prompts: JSONL(.gz), Parquet, a folder, a hub id (preference data will do), or synthetic."""
    lines: str | None = None
    """Use these records only, as a Python slice: 0:2000."""
    limit: int | None = None
    """Use at most this many prompts."""
    split: str | None = None
    """Split of a folder or data set that has more than one."""
    eval_prompts: str | None = None
    """Held-out prompts. By default: the built-in task's test split, or --prompts with --eval_split
    or --eval_lines."""
    eval_split: str | None = None
    """Split of the held-out prompts."""
    eval_lines: str | None = None
    """Held-out records, as a Python slice."""
    eval_limit: int = 64
    """How many held-out prompts to evaluate on."""
    eval_samples: int = 4
    """Responses to each of them."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are drawn."""
    steps: int = 20
    """Rounds of sampling and updating."""
    prompts_per_step: int = 64
    """Prompts of a round."""
    samples_per_prompt: int = 4
    """Responses to each of them."""
    epochs: int = 2
    """Passes over a round's responses."""
    batch_tokens: int = 4096
    """Tokens (prompt and response) of one update."""
    micro_tokens: int = 8192
    """Tokens of one forward pass; an update of more tokens accumulates gradients."""
    lambda_: float = 1.0
    """Temperature of the target pi_init exp(Adv / lambda): smaller moves further from pi_init."""
    gamma: float = 1.0
    """Discount of GAE."""
    lam: float = 0.95
    """Decay of GAE."""
    vf_coef: float = 1.0
    """Weight of the value loss."""
    whiten: bool = True
    """Whiten the advantages over the round's response tokens."""
    scale_reward: bool = True
    """Divide rewards by the running standard deviation of all rewards seen."""
    lr: float = 1e-4
    """Peak learning rate (1e-4 suits small models; the paper's 125M to 6B models take 1e-6)."""
    value_lr: float = 3e-3
    """Peak learning rate of the value head, which starts from nothing."""
    schedule: str = "constant"
    """constant, cosine or linear."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "steps", "prompts_per_step", "samples_per_prompt", "epochs")
        at_least(self, 1, "batch_tokens", "micro_tokens", "eval_limit", "eval_samples")
        at_least(self, 0, "lambda_", "gamma", "lam", "vf_coef", "value_lr", "coef")
        if self.lambda_ == 0:
            raise RunError("expected lambda_ > 0, got 0")
        if self.statistic not in (None, *STATISTICS):
            raise RunError(
                f"unknown statistic {self.statistic!r}: expected one of {', '.join(STATISTICS)}"
            )


def learn_from(
    found: Experience, policy: Policy, scaled: Tensor, config: APAConfig
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the losses need of each response token (packed [N] each), and numbers to log."""
    values = _values(policy, found, config)
    rewards, _ = ops.token_rewards(
        found.logp, found.ref_logp, scaled, kl_coef=0.0, cu_seqlens=found.cu_seqlens
    )
    advantages, returns = ops.gae(
        rewards, values, gamma=config.gamma, lam=config.lam, cu_seqlens=found.cu_seqlens
    )
    metrics = {}
    if values.numel() > 1:  # a single token has no variance
        unexplained = (returns - values).var().item() / max(returns.var().item(), 1e-12)
        metrics = {
            "advantage/std": advantages.std().item(),
            "value/explained_variance": 1 - unexplained,
        }
    if config.whiten:
        advantages = ops.whiten(advantages)
    tokens = {"advantages": advantages, "ref_logp": found.ref_logp, "returns": returns}
    return tokens, metrics


@torch.no_grad()
def _values(policy: Policy, found: Experience, config: APAConfig) -> Tensor:
    """fp32 [N]: the critic on the state before every response token."""
    device = policy.head_weight.device
    policy.eval()
    lengths = [len(r.prompt) + len(r.completion) for r in found.rollouts]
    rows: list[Tensor] = [torch.empty(0)] * len(lengths)
    for batch in token_budget_batches(lengths, config.micro_tokens):
        pack_ = experience.packed([found.rollouts[i] for i in batch]).to(device)
        with autocast(device, config.dtype):
            values = policy.values(policy.response_hidden(pack_)).cpu()
        for i, row in zip(
            batch, values.split([len(found.rollouts[i].completion) for i in batch]), strict=True
        ):
            rows[i] = row
    return torch.cat(rows)


def backward(
    policy: Policy, pack_: Packed, inputs: dict[str, Tensor], n_tokens: int, config: APAConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds the gradients of L_APA + vf_coef * L_V of one pack, as parts of means over `n_tokens`.

    Returns:
        fp32 [3], this pack's part of policy loss, value loss and entropy; and the tensors to look
        at where a loss is not finite. Nothing in here makes the host wait for the device.
    """
    with autocast(policy.head_weight.device, config.dtype):
        hidden = policy.response_hidden(pack_)
        values = policy.values(hidden)
        out = ops.linear_loss(
            hidden,
            policy.head_weight.to(hidden.dtype),
            pack_.response_targets,
            losses.APA(lambda_=config.lambda_),
            {"advantages": inputs["advantages"], "ref_logp": inputs["ref_logp"]},
            bias=policy.head_bias,
            softcap=policy.softcap,
            temperature=config.sampling.temperature,
            ignore_index=None,
            normalizer=n_tokens,
        )
    critic = losses.ValueLoss()(values, inputs["returns"]).sum() / n_tokens
    (out.loss + config.vf_coef * critic).backward()
    parts = torch.stack([out.loss.detach(), critic.detach(), out.entropy.sum() / n_tokens])
    return parts, {**inputs, "hidden states": hidden, "logp": out.logp, "values": values}


def update(
    run: Run,
    step: int,
    policy: Policy,
    optimizer: Optimizer,
    found: Experience,
    tokens: dict[str, Tensor],
    config: APAConfig,
) -> dict[str, float]:
    """A few epochs over one round's experience; the means of the losses."""
    device = policy.head_weight.device
    tokens = {name: t.to(device) for name, t in tokens.items()}
    # Dropout stays off: log pi must be that of the policy which sampled and of pi_init's twin.
    policy.eval()
    lengths = [len(r.prompt) + len(r.completion) for r in found.rollouts]
    sums: dict[str, float] = {}
    n_updates = 0
    for epoch in range(config.epochs):
        order = stream(config.seed, "update", step, epoch)
        for batch in token_budget_batches(lengths, config.batch_tokens, generator=order):
            n_tokens = sum(len(found.rollouts[i].completion) for i in batch)
            total = torch.zeros(3, device=device)
            for micro in token_budget_batches([lengths[i] for i in batch], config.micro_tokens):
                chosen = [batch[i] for i in micro]
                pack_ = experience.packed([found.rollouts[i] for i in chosen]).to(device)
                inputs = {
                    name: torch.cat([t[found.rows(i)] for i in chosen])
                    for name, t in tokens.items()
                }
                parts, seen = backward(policy, pack_, inputs, n_tokens, config)
                total += parts
            loss = total[0] + config.vf_coef * total[1]
            numbers = optimizer.update(run, step, loss, seen)
            numbers |= dict(
                zip(("loss/policy", "loss/value", "entropy"), total.tolist(), strict=True)
            )
            numbers["loss"] = float(loss)
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + value
            n_updates += 1
    return {name: value / n_updates for name, value in sums.items()}


def load_reward(config: APAConfig, tokenizer: Any) -> RewardEnsemble:
    """The ensemble with the statistic asked for, on the policy's tokenizer."""
    ensemble = RewardEnsemble.load(config.reward)
    check_same_tokenizer(tokenizer, load_tokenizer(config.reward), config.policy, config.reward)
    kept = asdict(ensemble.config)
    kept |= {"statistic": config.statistic or kept["statistic"]}
    kept |= {"coef": kept["coef"] if config.coef is None else config.coef}
    ensemble.config = EnsembleConfig(**kept)
    return ensemble.requires_grad_(False).eval()


def train(config: APAConfig) -> Path:
    """Aligns the policy and evaluates it before and after; the folder of the model."""
    device = begin(config)
    tokenizer = load_tokenizer(config.policy)
    ensemble = load_reward(config, tokenizer).to(device)
    judge = RewardEnsemble.load(config.judge).to(device).eval() if config.judge else None
    if judge is not None:
        check_same_tokenizer(
            tokenizer, load_tokenizer(str(config.judge)), config.policy, str(config.judge)
        )
    policy = load_policy(config, config.policy, tokenizer, device=device, value_head=True)
    reference = policy.frozen_copy()
    context = min(policy.max_length, ensemble.max_length)
    context = min(context, judge.max_length) if judge is not None else context
    room = context - config.sampling.max_new_tokens
    if room < 1:
        raise RunError(
            f"sampling.max_new_tokens {config.sampling.max_new_tokens} leaves no room for a prompt "
            f"in the {context} tokens that policy and reward models can read"
        )
    prompts, held_out = load_prompts(config, tokenizer, room)
    gold = source.gold_for(config.prompts)
    collector = Collector(
        TransformersEngine(policy, tokenizer),
        reference,
        ensemble,
        tokenizer,
        config.sampling,
        config.micro_tokens,
        config.dtype,
        gold,
    )

    def judged() -> Evaluation:
        # Before and after draw from the same stream.
        torch.manual_seed(stream(config.seed, "evaluation").initial_seed())
        return evaluate(
            collector,
            policy,
            [p.prompt for p in held_out],
            [p.text for p in held_out],
            config.eval_samples,
            judge,
        )

    moments, evaluations = RunningMoments(), Evaluations()
    optimizer = Optimizer(config, policy, config.steps, {"value_head": config.value_lr})
    with Run(config, "apa", config.steps) as run:
        start = run.restore(
            Stateful(
                {"policy": policy},
                {
                    "optimizer": optimizer,
                    "moments": moments,
                    "evaluations": evaluations,
                    "inputs": Inputs(prompts=prompts, reference=reference, reward=ensemble),
                },
            )
        )
        if start == 0:
            with run.meter.phase("evaluate"):
                evaluations.before = judged()
            run.log(0, "eval", evaluations.before.numbers)
            torch.manual_seed(stream(config.seed, "sampling").initial_seed())
        for step in range(start + 1, config.steps + 1):
            chosen = choose_prompts(len(prompts), config, step)
            found = collector.collect(
                [prompts[i].prompt for i in chosen],
                [prompts[i].text for i in chosen],
                config.samples_per_prompt,
                run.meter,
            )
            moments.update(found.proxy)
            scaled = found.proxy
            if config.scale_reward:
                scaled = moments.normalize(scaled, shift_mean=False)
            lengths = [len(r.prompt) + len(r.completion) for r in found.rollouts]
            with run.meter.phase("value"):
                tokens, metrics = learn_from(found, policy, scaled, config)
                run.meter.count(flops=forward_flops(policy, lengths, 0))
            with run.meter.phase("update"):
                metrics |= update(run, step, policy, optimizer, found, tokens, config)
                optimizer.next_step()
                run.meter.count(
                    trained=found.n_tokens,
                    flops=config.epochs * training_flops(policy, lengths, found.n_tokens),
                )
            metrics |= found.metrics() | run.meter.metrics()
            run.log(step, "train", metrics)
            if step == config.steps:
                with run.meter.phase("evaluate"):
                    evaluations.after = judged()
                run.log(step, "eval", evaluations.after.numbers)
            run.end_step(step)
        with run.saving_model() as folder:
            policy.save(folder, tokenizer)
        facts = {
            "method": "apa",
            "proxy": ensemble.config.statistic,
            "n_prompts": len(held_out),
            "n_samples": config.eval_samples,
            "machine": machine(device),
            "versions": versions(),
            "command": command_line(),
            "seconds": {"total": time.monotonic() - run.started},
        }
        evaluations.write(run.folder, facts)
    return run.folder / "model"
