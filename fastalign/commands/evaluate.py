"""`fastalign evaluate`: a model beside a baseline, on the same prompts.

Rewards, win rates, KL(policy || baseline), length, entropy and diversity, each with a standard
error. The prompts, not the answers, are what was drawn independently: answers to a prompt are
averaged first, errors are taken over prompts, and that of a change over the differences prompt by
prompt.

Win rate: the share of pairs (an answer of the policy, one of the baseline to the same prompt) in
which the policy's has the higher reward, ties counted half; its 95 % interval is over prompts.
Rewards that differ by rounding only, as those of the same answer in packs of other neighbours, tie.

KL by three estimators: k1 and k3 from the sampled tokens, and `exact`, which sums over the whole
vocabulary at every state that was visited and so has the least variance.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastalign import ops, theory
from fastalign.commands.answers import Answers, AnswersConfig, account, is_conditional
from fastalign.commands.output import write_lines
from fastalign.data import source
from fastalign.data.packing import pack, same_prompts, token_budget_batches
from fastalign.models import Policy, load_tokenizer
from fastalign.models.reward import check_same_tokenizer
from fastalign.ops.reduce_scores import STATISTICS
from fastalign.report.command import conclude
from fastalign.rollout import Rollout
from fastalign.theory.interval import wilson
from fastalign.train import repeat
from fastalign.train.evaluate import Evaluation, Evaluations, standard_error
from fastalign.train.experience import spread
from fastalign.train.guards import FLAT
from fastalign.train.meter import Meter
from fastalign.train.online import one_of
from fastalign.train.reward_source import RewardSource, Scored, make_reward
from fastalign.train.run import (
    at_least,
    autocast,
    choose_device,
    claim_folder,
    clear_folder,
    forward_dtype,
    write_config,
)

log = logging.getLogger("fastalign")
N_SAMPLES_SHOWN = 12
REWARDS = ("reward/proxy", "reward/gold", "reward/held_out")


@dataclass
class EvaluateConfig(AnswersConfig):
    """Compare a model with a baseline: rewards, win rate, KL, length, diversity, with errors."""

    baseline: str = "runs/sft/model"
    """Folder or hub id of the model it is compared with, and KL is measured to."""
    output: str = "runs/evaluation"
    """Folder of the results: evaluation.json, samples.jsonl, report.html."""
    overwrite: bool = False
    """Delete what a former run left in the output folder."""
    reward: str = "runs/reward/model"
    """Folder of a reward ensemble, FILE.py:FUNCTION, or a weighted sum: 'A,0.5*B'."""
    statistic: str | None = None
    """Statistic of the reward ensemble, where it is not to be the one it was saved with."""
    coef: float | None = None
    """Coefficient of lcb and uwo, likewise."""
    judge: str | None = None
    """A second reward, that training never saw: a folder or FILE.py:FUNCTION, as for --reward."""
    samples: int = 4
    """Answers of each model to each prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "samples")
        at_least(self, 0, "coef")
        one_of(self, "statistic", (None, *STATISTICS))


@dataclass(frozen=True)
class Measured:
    """One model's answers and what was measured of them."""

    answers: Answers
    rollouts: list[Rollout]
    texts: list[str]
    scored: Scored
    columns: dict[str, Tensor]  # float64 [S], by metric


def run(config: EvaluateConfig) -> Path:
    """Samples from both models, measures, writes; the folder of the results."""
    folder = Path(config.output)
    claim_folder(folder, overwrite=config.overwrite, resumable=False)
    device = choose_device(config.device)
    tokenizer = load_tokenizer(config.policy)
    other = load_tokenizer(config.baseline)
    check_same_tokenizer(tokenizer, other, config.policy, config.baseline, "baseline")
    rewards = make_reward(config, tokenizer, device)
    judge = None
    if config.judge is not None:
        judged = replace(config, reward=config.judge, statistic=None, coef=None)
        judge = make_reward(judged, tokenizer, device)
    room = min(rewards.max_length, judge.max_length if judge else rewards.max_length)
    # A target is for those that can be asked for it: one of the two is enough.
    asked, baseline_asked = config, config
    if not is_conditional(config.baseline):
        baseline_asked = replace(config, target_reward=None)
    elif not is_conditional(config.policy):
        asked = replace(config, target_reward=None)
    meter = Meter(device, forward_dtype(device, config.dtype))
    policy = Answers(asked, room=room, meter=meter)
    baseline = Answers(baseline_asked, config.baseline, room=policy.context, meter=meter)
    if len(policy.prompts) != len(baseline.prompts):
        policy = Answers(asked, room=baseline.context, meter=meter)
    if config.overwrite:
        clear_folder(folder)
    write_config(folder, config)

    meter.start()
    before = measure(config, baseline, rewards, judge, None)
    after = measure(config, policy, rewards, judge, baseline)
    evaluations = Evaluations()
    evaluations.before, evaluations.after = (
        summarise(before, config.samples),
        summarise(after, config.samples),
    )
    both = enumerate((evaluations.before, evaluations.after))
    lines = [{"step": step, "phase": "eval", **one.numbers} for step, one in both]
    write_lines(folder / "metrics.jsonl", lines)
    facts = {
        "method": "policy",
        "names": dict(zip(("before", "after"), names(config.baseline, config.policy), strict=True)),
        **rewards.describe(),
        "judge": judge.describe() if judge else None,
        "win_rate": {
            name: win_rate(after.columns[name], before.columns[name], config.samples)
            for name in after.columns
            if name in REWARDS
        },
        "n_prompts": len(policy.prompts),
        "n_samples": config.samples,
        "seed": config.seed,
        **repeat.facts(device),
        **account(folder, "evaluate", meter),
    }
    evaluations.write(folder, facts)
    conclude(folder)
    return folder


def names(*models: str) -> list[str]:
    """What tells two models' folders apart: sft and apa, of runs/sft/model and runs/apa/model."""
    if len(set(models)) == 1:
        return list(models)
    parts = [list(Path(model).parts) for model in models]
    for end in (-1, 0):
        while min(map(len, parts)) > 1 and len({part[end] for part in parts}) == 1:
            for part in parts:
                part.pop(end)
    return [str(Path(*part)) for part in parts]


def measure(
    config: EvaluateConfig,
    answers: Answers,
    rewards: RewardSource,
    judge: RewardSource | None,
    reference: Answers | None,
) -> Measured:
    """Draws `config.samples` answers to each prompt and measures them.

    Args:
        reference: what KL is measured to; None for the model that is the reference itself.
    """
    drawn = [r for chunk in answers.draw(config.samples) for r in chunk]
    rollouts = [answers.plain(r) for r in drawn]
    prompts = [answers.prompt(r).text for r in rollouts]
    texts = [answers.text(r) for r in drawn]
    with answers.meter.phase("score"):
        scored = rewards.score(rollouts, prompts, texts)
        held_out = None if judge is None else judge.score(rollouts, prompts, texts).total
    with answers.meter.phase("reference"):
        if reference is None:
            entropy, kl = per_token(config, answers.policy, drawn)
        else:
            ref_prompts = [reference.conditioned(r.prompt) for r in rollouts]
            entropy, kl = per_token(config, answers.policy, drawn, reference.policy, ref_prompts)
    drawn_lengths = torch.tensor([len(r.completion) for r in drawn])
    columns: dict[str, Tensor] = {
        "reward/proxy": scored.total,
        **{f"kl/{name}": values for name, values in kl.items()},
        "length": torch.tensor([len(r.completion) for r in rollouts]),
        "finished": torch.tensor([r.finished for r in rollouts]),
        "entropy": shares_of_mean(segment_sums(entropy, drawn_lengths), drawn_lengths),
    }
    gold = source.gold_for(config.prompts)
    if gold is not None:
        values = [gold(p, t) for p, t in zip(prompts, texts, strict=True)]
        columns["reward/gold"] = torch.tensor(values, dtype=torch.float64)
    if held_out is not None:
        columns["reward/held_out"] = held_out
    if scored.scores is not None and scored.scores.shape[1] > 1:
        columns["reward/disagreement"] = scored.scores.std(1)
    columns = {name: values.double() for name, values in columns.items()}
    return Measured(answers, rollouts, texts, scored, columns)


@torch.no_grad()
def per_token(
    config: EvaluateConfig,
    policy: Policy,
    rollouts: list[Rollout],
    reference: Policy | None = None,
    ref_prompts: list[list[int]] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Entropy of every token's distribution, [N], and KL of every answer to the reference, [S].

    Args:
        ref_prompts: of each answer, as the reference reads them; the policy's by default.
    """
    device = policy.head_weight.device
    sequences = [r.prompt + r.completion for r in rollouts]
    ref_prompts = ref_prompts or [r.prompt for r in rollouts]
    sizes = [len(r.completion) for r in rollouts]
    parts: list[Tensor] = [torch.empty(0)] * len(rollouts)
    share = policy.shares_prompts and (reference is None or reference.shares_prompts)
    prompts = same_prompts(r.prompt for r in rollouts) if share else None
    lengths, temperature = [len(s) for s in sequences], config.sampling.temperature
    for batch in token_budget_batches(lengths, config.micro_tokens, prompts=prompts):
        asked = [len(rollouts[i].prompt) for i in batch]
        packed = pack([sequences[i] for i in batch], asked, share=share).to(device)
        with autocast(device, config.dtype):
            hidden = policy.response_hidden(packed)
            logp, entropy = policy.logprobs(
                packed, temperature=temperature, return_entropy=True, hidden=hidden
            )
            assert entropy is not None
            rows = [logp, entropy]
            if reference is not None:
                ref_packed = pack(
                    [ref_prompts[i] + rollouts[i].completion for i in batch],
                    [len(ref_prompts[i]) for i in batch],
                    share=share,
                ).to(device)
                ref_hidden = reference.response_hidden(ref_packed)
                rows.append(
                    reference.logprobs(ref_packed, temperature=temperature, hidden=ref_hidden)[0]
                )
                rows.append(
                    ops.linear_kl(
                        hidden,
                        policy.head_weight.to(hidden.dtype),
                        ref_hidden,
                        reference.head_weight.to(hidden.dtype),
                        bias=policy.head_bias,
                        ref_bias=reference.head_bias,
                        softcap=policy.softcap,
                        temperature=temperature,
                    )
                )
        found = torch.stack([row.float() for row in rows]).cpu()
        for i, part in zip(batch, found.split([sizes[i] for i in batch], dim=1), strict=True):
            parts[i] = part
    rows_ = torch.cat(parts, dim=1)
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    if reference is None:
        nothing = torch.zeros(len(rollouts), dtype=torch.float64)
        return rows_[1], {"k1": nothing, "k3": nothing, "exact": nothing}
    finite = rows_.isfinite().all(0)
    logp, _, ref_logp, token_kl = rows_.where(finite, 0.0)
    kl = theory.policy_kl(logp, ref_logp, token_kl, cu_seqlens=bounds)
    assert kl.rao_blackwell is not None
    lost = segment_sums(~finite, torch.tensor(sizes)) > 0
    if lost.any():
        log.warning(
            "%d of %d answers have tokens that are impossible to one of the models, or on which "
            "one fails: no KL is reported",
            *(int(lost.sum()), len(rollouts)),
        )
    found_kl = {"k1": kl.k1, "k3": kl.k3, "exact": kl.rao_blackwell}
    return rows_[1], {k: one.values.masked_fill(lost, math.nan) for k, one in found_kl.items()}


def shares_of_mean(sums: Tensor, lengths: Tensor) -> Tensor:
    """[S] float64, whose mean is that of all tokens, as training logs it, m = sum(sums) /
    sum(lengths), and whose spread is that of the ratio: m + (sum - m length) / mean length."""
    mean = sums.sum() / lengths.sum()
    return mean + (sums - mean * lengths) / lengths.double().mean()


def segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums [N] over answers of these lengths, [S], in float64."""
    answer = torch.arange(len(lengths)).repeat_interleave(lengths)
    return torch.zeros(len(lengths)).double().index_add(0, answer, values.double())


def summarise(found: Measured, n_samples: int) -> Evaluation:
    """Means with standard errors over prompts, diversity, and some answers to read."""
    numbers: dict[str, float] = {}
    by_prompt: dict[str, list[float]] = {}
    columns = dict(found.columns)
    for name, values in columns.items():
        means = values.reshape(-1, n_samples).mean(1)
        numbers[name], error = means.mean().item(), standard_error(means)
        if error is not None:
            numbers[f"{name}_stderr"] = error
        if name in REWARDS:
            numbers |= spread(name, values)
        by_prompt[name] = means.tolist()
    numbers |= diversity([r.completion for r in found.rollouts], n_samples)
    numbers["n"] = len(found.rollouts)
    shown = []
    for i in range(0, len(found.rollouts), n_samples)[:N_SAMPLES_SHOWN]:
        rollout = found.rollouts[i]
        reward = {
            name.removeprefix("reward/"): values[i].item()
            for name, values in columns.items()
            if name in ("reward/proxy", "reward/gold")
        }
        prompt = found.answers.prompt(rollout).text
        shown.append({"prompt": prompt, "response": found.texts[i], "reward": reward})
    return Evaluation(numbers, by_prompt, shown)


def diversity(completions: list[list[int]], n_samples: int) -> dict[str, float]:
    """How much the answers differ from one another, each between 0 and 1.

    `distinct/k`: different k-grams of tokens over all k-grams of all answers. `distinct/answers`:
    different answers to a prompt over all answers to it (absent for one answer a prompt).
    """
    numbers = {}
    for k in (1, 2):
        grams = [
            tuple(tokens[j : j + k]) for tokens in completions for j in range(len(tokens) - k + 1)
        ]
        if grams:
            numbers[f"distinct/{k}"] = len(set(grams)) / len(grams)
    if n_samples > 1:
        groups: Iterable[list[list[int]]] = (
            completions[i : i + n_samples] for i in range(0, len(completions), n_samples)
        )
        shares = [len({tuple(tokens) for tokens in group}) / n_samples for group in groups]
        numbers["distinct/answers"] = sum(shares) / len(shares)
    return numbers


def win_rate(ours: Tensor, theirs: Tensor, n_samples: int) -> dict[str, float | None]:
    """Of one reward: the rate, the ends of its 95 % interval (Wilson's, over prompts), and its
    standard error.

    Args:
        ours, theirs: [P * n_samples], the answers to a prompt side by side.
    """
    gap = ours.reshape(-1, n_samples, 1) - theirs.reshape(-1, 1, n_samples)
    by_prompt = ((gap > FLAT).double() + 0.5 * (gap.abs() <= FLAT).double()).mean((1, 2))
    rate, error = by_prompt.mean().item(), standard_error(by_prompt)
    if error is None:
        return {"rate": rate, "low": None, "high": None, "stderr": None}
    # As many trials as would have this error; one a prompt where all prompts came out the same.
    trials = rate * (1 - rate) / error**2 if error > 1e-9 else len(by_prompt)
    low, high = wilson(rate, trials)
    return {"rate": rate, "low": low, "high": high, "stderr": error}
