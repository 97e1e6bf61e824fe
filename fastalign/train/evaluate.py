"""What a policy is worth on held-out prompts: reward, KL to pi_init, entropy, length; with errors.

The standard error of a mean is taken over prompts (the samples of a prompt are averaged first),
because the prompts, not the samples, are what was drawn independently. Before and after answer the
same prompts, so the standard error of a change is that of the differences prompt by prompt,
std(after_i - before_i) / sqrt(n): how hard each prompt is cancels. One prompt has no error.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import ops
from fastalign.models import Policy, RewardEnsemble
from fastalign.train import strict_json
from fastalign.train.experience import Collector, Experience, spread
from fastalign.train.reward_source import score_packed
from fastalign.train.whole import write_text


@dataclass(frozen=True)
class Evaluation:
    numbers: dict[str, float]
    """Means over all responses, "..._std" over them, "..._stderr" over prompts."""
    by_prompt: dict[str, list[float]]
    """Mean over the responses to each prompt, of the measures that have a standard error."""
    samples: list[dict[str, Any]]
    """The first response to each of the first prompts: prompt, response, its rewards."""


def standard_error(by_prompt: Tensor) -> float | None:
    """Of the mean of one number per prompt; None where there is but one prompt."""
    n = by_prompt.numel()
    return by_prompt.std().item() / n**0.5 if n > 1 else None


def evaluate(
    collector: Collector,
    policy: Policy,
    prompts: list[list[int]],
    texts: list[str],
    n_samples: int,
    judge: RewardEnsemble | None = None,
) -> Evaluation:
    """Samples from `policy`, which must be the collector's, and measures.

    Args:
        prompts, texts: held-out prompts as token ids and as text.
        n_samples: responses to each prompt.
        judge: a second reward model that training never saw.
    """
    found = collector.collect(prompts, texts, n_samples)
    logp, entropy = collector.logprobs(policy, found.rollouts, entropy=True)
    assert entropy is not None
    numbers = found.metrics()
    columns: dict[str, Tensor] = {
        "reward/proxy": found.proxy,
        "kl/k1": found.per_response(ops.kl_estimate(logp, found.ref_logp, kind="k1").double()),
        "kl/k3": found.per_response(ops.kl_estimate(logp, found.ref_logp, kind="k3").double()),
        "length": found.cu_seqlens.diff(),
        "finished": torch.tensor([r.finished for r in found.rollouts]),
    }
    if found.gold is not None:
        columns["reward/gold"] = found.gold
    if judge is not None:
        scores = score_packed(judge, found.rollouts, collector.micro_tokens, collector.dtype)
        held_out = judge.reduce(scores)
        columns["reward/held_out"] = held_out
        numbers |= spread("reward/held_out", held_out)
    by_prompt = {}
    for name, values in columns.items():
        means = values.double().reshape(-1, n_samples).mean(1)
        numbers[name], error = means.mean().item(), standard_error(means)
        if error is not None:
            numbers[f"{name}_stderr"] = error
        by_prompt[name] = means.tolist()
    numbers["entropy"] = entropy.mean().item()
    # How far the sampler's log-probs are from the trainer's for the same tokens: rounding, or a
    # fault.
    numbers["sampling_gap"] = (logp - found.logp).abs().mean().item()
    numbers["n"] = len(found.rollouts)
    return Evaluation(numbers, by_prompt, _samples(found, texts, n_samples, collector))


N_SAMPLES_SHOWN = 12


def _samples(
    found: Experience, texts: list[str], n_samples: int, collector: Collector
) -> list[dict[str, Any]]:
    shown = []
    for i in range(0, len(found.rollouts), n_samples)[:N_SAMPLES_SHOWN]:
        rollout = found.rollouts[i]
        reward = {"proxy": found.proxy[i].item()}
        if found.gold is not None:
            reward["gold"] = found.gold[i].item()
        shown.append(
            {
                "prompt": texts[rollout.prompt_index],
                "response": collector.text(rollout.completion),
                "reward": reward,
            }
        )
    return shown


class Evaluations:
    """Before and after training; checkpoints hold them, so that a resumed run still has both."""

    def __init__(self) -> None:
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "before": asdict(self.before) if self.before else None,
            "after": asdict(self.after) if self.after else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = Evaluation(**state["before"]) if state["before"] else None
        self.after = Evaluation(**state["after"]) if state["after"] else None

    def change_stderr(self) -> dict[str, float]:
        """Standard errors of after - before, from the differences prompt by prompt."""
        assert self.before is not None and self.after is not None
        errors = {}
        for name, was in self.before.by_prompt.items():
            became = torch.tensor(self.after.by_prompt[name], dtype=torch.float64)
            error = standard_error(became - torch.tensor(was, dtype=torch.float64))
            if error is not None:
                errors[name] = error
        return errors

    def write(self, folder: Path, facts: dict[str, Any]) -> None:
        """evaluation.json (numbers before and after, standard errors of the changes, and `facts` on
        the run) and samples.jsonl."""
        assert self.before is not None and self.after is not None
        comparison = {
            "before": self.before.numbers,
            "after": self.after.numbers,
            "change_stderr": self.change_stderr(),
            **facts,
        }
        lines = [
            {
                "prompt": was["prompt"],
                "before": was["response"],
                "after": became["response"],
                "before_reward": was["reward"],
                "after_reward": became["reward"],
            }
            for was, became in zip(self.before.samples, self.after.samples, strict=True)
        ]
        text = "".join(strict_json.dumps(line) + "\n" for line in lines)
        write_text(folder / "samples.jsonl", text)
        write_text(folder / "evaluation.json", strict_json.dumps(comparison, indent=2) + "\n")
