"""What a policy is worth on held-out prompts: reward, KL to pi_init, entropy, length; with errors.

The standard error of a mean is taken over prompts (the samples of a prompt are averaged first),
because the prompts, not the samples, are what was drawn independently.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import ops
from fastalign.models import Policy, RewardEnsemble
from fastalign.train.experience import Collector, Experience


@dataclass(frozen=True)
class Evaluation:
    numbers: dict[str, float]
    samples: list[dict[str, Any]]
    """The first response to each of the first prompts: prompt, response, its rewards."""


def _mean_and_error(values: Tensor, n_samples: int) -> tuple[float, float]:
    by_prompt = values.double().reshape(-1, n_samples).mean(1)
    error = by_prompt.std().item() / len(by_prompt) ** 0.5 if len(by_prompt) > 1 else float("nan")
    return by_prompt.mean().item(), error


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
    }
    if found.gold is not None:
        columns["reward/gold"] = found.gold
    if judge is not None:
        held_out = judge.reduce(collector.scores(found.rollouts, judge))
        columns["reward/held_out"] = held_out
        numbers["reward/held_out_std"] = held_out.std().item()
    for name, values in columns.items():
        numbers[name], numbers[f"{name}_stderr"] = _mean_and_error(values, n_samples)
    numbers["entropy"] = entropy.mean().item()
    # How far the sampler's log-probs are from the trainer's for the same tokens: rounding, or a
    # fault.
    numbers["sampling_gap"] = (logp - found.logp).abs().mean().item()
    numbers["n"] = len(found.rollouts)
    return Evaluation(numbers, _samples(found, texts, n_samples, collector))


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

    def write(self, folder: Path, facts: dict[str, Any]) -> None:
        """evaluation.json (numbers before and after, and `facts` on the run) and samples.jsonl."""
        assert self.before is not None and self.after is not None
        comparison = {"before": self.before.numbers, "after": self.after.numbers, **facts}
        (folder / "evaluation.json").write_text(json.dumps(comparison, indent=2) + "\n")
        with (folder / "samples.jsonl").open("w") as file:
            for was, became in zip(self.before.samples, self.after.samples, strict=True):
                record = {
                    "prompt": was["prompt"],
                    "before": was["response"],
                    "after": became["response"],
                    "before_reward": was["reward"],
                    "after_reward": became["reward"],
                }
                file.write(json.dumps(record) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    import os

    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of everything that has a say in the numbers."""
    import transformers

    import fastalign

    return {
        "fastalign": fastalign.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def command_line() -> str:
    """The command that started this process, to repeat it."""
    return "fastalign " + " ".join(sys.argv[1:])
