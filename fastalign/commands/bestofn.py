"""`fastalign bestofn`: sample N answers to each prompt, score them, keep the best one.

The folder it writes:

    samples.jsonl    every answer with its reward
    selected.jsonl   the best answer to each prompt, which `train sft` or `train mle` imitate
    curve.json       expected reward of best-of-n for every n up to N, unbiased, with its KL
    inputs.json      digests of the models and the prompts, by which --resume knows them again
    accounting.json  seconds by phase and tokens; of a resumed run, those since it was resumed
    best_of_n.svg, best_of_n.png   the same as a picture (--curve)

The expected reward of the best of n is an average over all subsets of n of the N answers (the
formula stands in fastalign.theory.curve), so that one set of samples answers for every n. KL is
that of best-of-n to the model sampled from: at most log n - (n - 1) / n nats (arXiv 2401.01879).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.commands.answers import Answers, AnswersConfig, account
from fastalign.commands.output import add_lines, read_lines, write_lines
from fastalign.models import load_tokenizer
from fastalign.theory import (
    best_of_n_curve,
    best_of_n_kl_bound,
    best_of_n_kl_estimate,
    best_of_n_kl_of_ties,
)
from fastalign.train import repeat, strict_json
from fastalign.train.reward_source import (
    Gold,
    RewardSource,
    make_gold,
    make_reward,
    measure_gold,
)
from fastalign.train.run import (
    RunError,
    at_least,
    choose_device,
    claim_folder,
    clear_folder,
    options_of,
    write_config,
)
from fastalign.train.same_run import Inputs, flat
from fastalign.train.whole import write_text

log = logging.getLogger("fastalign")
# Options that change no answer and no reward.
ANY = ("output", "curve", "device", "micro_tokens")
SAMPLES, SELECTED, CURVE = "samples.jsonl", "selected.jsonl", "curve.json"
INPUTS = "inputs.json"


@dataclass
class BestOfNConfig(AnswersConfig):
    """Keep the best of N answers by a reward, and say what every n up to N would give."""

    policy: str = "runs/sft/model"
    """Folder or hub id of the model that answers."""
    output: str = "runs/bestofn"
    """Folder of the results."""
    overwrite: bool = False
    """Delete what a former run left in the output folder."""
    resume: str | None = None
    """Go on where a stopped run of the output folder left off."""
    reward: str = "runs/reward/model"
    """Folder of a reward ensemble, FILE.py:FUNCTION, or a weighted sum: 'A,0.5*B'."""
    statistic: str | None = None
    """Statistic of the reward ensemble, where it is not to be the one it was saved with."""
    coef: float | None = None
    """Coefficient of lcb and uwo, likewise."""
    gold: str | None = None
    """What is measured of every answer beside the reward: anything that --reward may be, or gold,
    the built-in task's, which is the default with its prompts."""
    n: int = 16
    """N, answers to each prompt."""
    curve: bool = False
    """Draw the curve, as best_of_n.svg and best_of_n.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "n")
        at_least(self, 0, "coef")
        if self.overwrite and self.resume is not None:
            raise RunError("--overwrite and --resume contradict each other")
        if self.resume not in (None, "auto"):
            raise RunError(f"--resume: bestofn goes on in --output; got a folder, {self.resume}")


def run(config: BestOfNConfig) -> Path:
    """Samples, scores, selects; the folder of the results."""
    folder = Path(config.output)
    claim_folder(folder, overwrite=config.overwrite, reuse=config.resume is not None)
    if config.resume is not None:
        check_same(config, folder)
    answers, rewards, gold = sources(config)
    inputs = digests(answers, rewards, gold)
    if config.resume is not None:
        check_inputs(inputs, folder)
    if config.overwrite:
        clear_folder(folder)
    write_config(folder, config)
    write_text(folder / INPUTS, strict_json.dumps(inputs, indent=1) + "\n")
    answers.meter.start()
    records = sample(config, answers, rewards, gold, folder)
    proxy = table(records, config.n, "reward")
    best = proxy.argmax(1).tolist()
    selected = [{**records[i * config.n + k], "n": config.n} for i, k in enumerate(best)]
    write_lines(folder / SELECTED, [{k: v for k, v in r.items() if k != "i"} for r in selected])
    found = curve(records, config.n)
    found |= account(folder, "bestofn", answers.meter)
    found |= {
        "prompts": len(best),
        "samples": config.n,
        "seed": config.seed,
        "source": rewards.describe(),
        **repeat.facts(answers.device),
    }
    write_text(folder / CURVE, strict_json.dumps(found, indent=1) + "\n")
    if config.curve:
        from fastalign.report.best_of_n import draw

        draw(found, folder)
    log.info("%s", summary(found, config.n))
    return folder


def sources(config: BestOfNConfig) -> tuple[Answers, RewardSource, Gold | None]:
    """The model with its prompts, and what its answers are measured by."""
    tokenizer, device = load_tokenizer(config.policy), choose_device(config.device)
    rewards, gold = make_reward(config, tokenizer, device), make_gold(config, tokenizer, device)
    readers = [source for source in (rewards, gold) if isinstance(source, RewardSource)]
    return Answers(config, room=min(source.max_length for source in readers)), rewards, gold


def check_same(config: BestOfNConfig, folder: Path) -> None:
    """Refuses to go on with answers that other options would not have given.

    Raises:
        RunError: names the first option that differs from those of the stopped run.
    """
    import yaml

    path = folder / "config.yaml"
    if not path.exists():  # it was stopped before anything was sampled
        return
    before, now = flat(yaml.safe_load(path.read_text()) or {}), flat(options_of(config))
    for name, value in now.items():
        if name not in ANY and before.get(name) != value:
            raise RunError(
                f"--resume: the answers in {folder} are of a run with {name} {before.get(name)}, "
                f"this one has {value}: resume with the former value, or begin a new run"
            )


def digests(answers: Answers, rewards: RewardSource, gold: Gold | None) -> dict[str, str]:
    """Of all that decides what is answered and how it is scored, by contents and not by path."""
    parts: dict[str, Any] = {"policy": answers.policy, "prompts": answers.prompts}
    functions: dict[str, str] = {}
    for name, source in (("reward", rewards), ("gold", gold)):
        if isinstance(source, RewardSource):
            if source.ensemble is not None:
                parts[name] = source.ensemble
            functions |= {
                f"{name} {entry.name}": source.digests[entry.name]
                for entry in source.entries
                if entry.function is not None
            }
    return Inputs(**parts).state_dict() | functions


def check_inputs(inputs: dict[str, str], folder: Path) -> None:
    """Refuses to go on with answers that other models gave or scored, or to other prompts.

    Raises:
        RunError: names the first that differs from that of the stopped run.
    """
    path = folder / INPUTS
    if not path.exists():  # it was stopped before anything was sampled
        return
    before = json.loads(path.read_text())
    for name, digest in inputs.items():
        if before.get(name) != digest:
            raise RunError(
                f"--resume: the answers in {folder} are of a run with another {name} "
                f"({before.get(name)} there, {digest} here): resume with the former one, or begin "
                "a new run"
            )


def sample(
    config: BestOfNConfig,
    answers: Answers,
    rewards: RewardSource,
    gold: Gold | None,
    folder: Path,
) -> list[dict[str, Any]]:
    """All answers with their rewards, prompt after prompt; written as they come."""
    path = folder / SAMPLES
    chunk = max(1, config.sampling.batch_size // config.n) * config.n
    records = read_lines(path)
    if len(records) == len(answers.prompts) * config.n:
        return records
    whole = len(records) // chunk
    records = records[: whole * chunk]
    write_lines(path, records)
    for rollouts in answers.draw(config.n, first=whole):
        prompts = [answers.prompt(r).text for r in rollouts]
        texts = [answers.text(r) for r in rollouts]
        plain = [answers.plain(r) for r in rollouts]
        with answers.meter.phase("score"):
            scored = rewards.score(plain, prompts, texts)
        if gold is not None:
            with answers.meter.phase("gold"):
                golds = measure_gold(gold, plain, prompts, texts).tolist()
        new = []
        for i, rollout in enumerate(rollouts):
            more: dict[str, Any] = {"reward": scored.total[i].item()}
            if scored.scores is not None:
                more["heads"] = scored.scores[i].tolist()
            if gold is not None:
                more["gold"] = golds[i]
            new.append(answers.record(rollout, **more, i=rollout.prompt_index))
        add_lines(path, new)
        records += new
        log.info("%d of %d prompts answered", len(records) // config.n, len(answers.prompts))
    return records


def table(records: list[dict[str, Any]], n: int, key: str) -> Tensor:
    """float64 [P, N] of one number of the answers."""
    return torch.tensor([r[key] for r in records], dtype=torch.float64).reshape(-1, n)


def curve(records: list[dict[str, Any]], n: int) -> dict[str, Any]:
    """Expected rewards of best-of-1..N with standard errors over prompts, and KL in nats."""
    proxy, logp = table(records, n, "reward"), table(records, n, "logp")
    found: dict[str, Any] = {"n": list(range(1, n + 1))}
    columns = {"reward": proxy}
    if "gold" in records[0]:
        columns["gold"] = table(records, n, "gold")
    for name, values in columns.items():
        by_prompt = best_of_n_curve(values, proxy)
        found[name] = by_prompt.mean(0).tolist()
        if len(by_prompt) > 1:
            found[f"{name}_stderr"] = (by_prompt.std(0) / len(by_prompt) ** 0.5).tolist()
    found["kl_bound"] = [best_of_n_kl_bound(k) for k in found["n"]]
    some = sorted({2**k for k in range(n.bit_length())} & set(found["n"]) | {n})
    estimates = kl_estimates(some, logp, proxy)
    found["kl_estimate"] = {str(k): kl for k, kl in zip(some, estimates, strict=True)}
    return found


def kl_estimates(some: list[int], logp: Tensor | None, proxy: Tensor) -> list[float]:
    """The better estimate of the KL of best-of-n, in nats, mean over prompts; it takes a pass over
    all samples for each of `some` n.

    There are two, both too high rather than too low: one does not see that an answer is likely, the
    other that scores tie. The lower one counts.

    Args:
        logp, proxy: [P, N] log-probs of the answers under the model sampled from, and their scores.
    """
    found = []
    for n in some:
        kl = best_of_n_kl_of_ties(n, proxy).mean().item()
        if logp is not None:
            by_prompt = best_of_n_curve(best_of_n_kl_estimate(n, logp.exp()), proxy)
            kl = min(kl, by_prompt[:, n - 1].mean().item())
        found.append(kl)
    return found


def summary(found: dict[str, Any], n: int) -> str:
    """What it comes to, in a line."""
    parts = [
        f"{name} {found[name][0]:+.3f} -> {found[name][-1]:+.3f}"
        for name in ("reward", "gold")
        if name in found
    ]
    kl = found["kl_estimate"][str(n)]
    return f"best of {n}: {', '.join(parts)}, at {kl:.2f} nats of KL to the model sampled from"
