"""`fastalign laboratory`: every method of the trainer on a source whose optimum is known.

The folder it writes:

    laboratory.json               all that was measured, of each source, method and seed
    laboratory.svg, .png          the frontier, best-of-n, and where the methods came out
    SOURCE/                       the source's model, its data, and a run's folder for each method
                                  and seed
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import theory
from fastalign.laboratory.exact import distribution, measure
from fastalign.laboratory.methods import METHODS, Bench
from fastalign.laboratory.source import SOURCES, Source
from fastalign.streams import stream
from fastalign.train import repeat, strict_json
from fastalign.train.run import RunError, at_least, claim_folder, clear_folder, write_config
from fastalign.train.whole import write_text

log = logging.getLogger("fastalign")

RESULT = "laboratory.json"
POINTS = 101


@dataclass
class LaboratoryConfig:
    """Train every method on a source of which the optimum is known, and measure its regret."""

    output: str = "runs/laboratory"
    """Folder of the results and of all runs."""
    overwrite: bool = False
    """Delete what a former laboratory left in the output folder."""
    source: str = "memoryless,markov"
    """memoryless (letters do not depend on each other), markov, or both."""
    methods: str = ",".join(METHODS)
    """Which methods, with commas."""
    seeds: int = 3
    """Runs of each, with the seeds 0, 1, ..."""
    m: int = 4
    """Letters of a string; there are 3^m strings."""
    effort: float = 1.0
    """Samples and steps of each run, as a multiple of what the methods have by default."""

    def __post_init__(self) -> None:
        at_least(self, 1, "seeds")
        if not 3 <= self.m <= 7:
            raise RunError(f"expected 3 <= m <= 7, got {self.m}")
        if not self.effort > 0:
            raise RunError(f"expected effort > 0, got {self.effort}")
        chosen("source", self.source, list(SOURCES))
        chosen("methods", self.methods, list(METHODS))


def chosen(option: str, text: str, known: list[str]) -> list[str]:
    """The words of a list with commas, each once.

    Raises:
        RunError: none, or one that is not known.
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    wrong = [word for word in words if word not in known]
    if wrong or not words:
        got = wrong[0] if wrong else "nothing"
        raise RunError(f"--{option}: expected some of {', '.join(known)}; got {got}")
    return words


def run(config: LaboratoryConfig) -> Path:
    """Trains and measures everything; the folder of the results."""
    from fastalign.laboratory.picture import draw

    folder = Path(config.output)
    claim_folder(folder, overwrite=config.overwrite, resumable=False)
    if config.overwrite:
        clear_folder(folder)
    write_config(folder, config)
    found: dict[str, Any] = {"config": asdict(config), **repeat.facts(torch.device("cpu"))}
    found["sources"] = []
    for name in chosen("source", config.source, list(SOURCES)):
        found["sources"].append(examine(SOURCES[name](config.m), config, folder / name))
        write_text(folder / RESULT, strict_json.dumps(found, indent=1) + "\n")
    for kind in ("svg", "png"):
        draw(found, folder / f"laboratory.{kind}")
    for one in found["sources"]:
        print(table(one))
    return folder


def examine(source: Source, config: LaboratoryConfig, folder: Path) -> dict[str, Any]:
    """One source: its frontier, and all methods on it."""
    torch.manual_seed(stream(0, "laboratory", "base").initial_seed())
    model = source.write(folder)
    base = distribution(model, source)
    off = float((base.p - source.p).abs().max())
    if off > 1e-6:
        raise RunError(f"the model of {source.name} is off its source by {off:.2g}; expected 1e-6")
    bench = Bench(source, folder, base.p, config.effort)
    found: dict[str, Any] = {
        "name": source.name,
        "m": source.m,
        "strings": len(base.p),
        "first": source.first.tolist(),
        "following": source.following.tolist(),
        "letters": source.letters.tolist(),
        "reward_range": source.range,
        "base": {"off_source": off, "outside": base.outside},
        "frontier": frontier(base.p, source.reward),
        "best_of_n": best_of_n(base.p, source.reward),
        "methods": [],
    }
    for name in chosen("methods", config.methods, list(METHODS)):
        method = METHODS[name]
        target = method.target(source, base.p)
        runs = []
        for seed in range(config.seeds):
            began = time.monotonic()
            output = folder / f"{name.replace(' ', '-')}-{seed}"
            policy = method.run(bench, output, seed)
            numbers = measure(policy.p, base.p, target, source.reward)
            seconds = time.monotonic() - began
            runs.append({"seed": seed, **numbers, "outside": policy.outside, "seconds": seconds})
            log.info(
                "%s, %s, seed %d: KL %.3f, reward %.3f, regret %.3f %%",
                *(source.name, name, seed, numbers["kl"], numbers["reward"]),
                100 * (numbers["regret_share"] or 0.0),
            )
        found["methods"].append({"name": name, "settings": method.settings, "runs": runs})
    return found


def frontier(base: Tensor, reward: Tensor) -> dict[str, list[float]]:
    """KL and reward of tilts, from the base to nine tenths of the largest KL of all tilts."""
    largest = -float(base[reward == reward.max()].sum().log())
    kls = (0.9 * largest * torch.linspace(0, 1, POINTS, dtype=torch.float64).square()).tolist()
    tilts = [theory.tilt(base, reward, theory.alpha_for_kl(base, reward, kl)) for kl in kls]
    return {"kl": kls, "reward": [float(tilted @ reward) for tilted in tilts]}


def best_of_n(base: Tensor, reward: Tensor) -> dict[str, list[float]]:
    """KL and reward of best-of-n, exact, for real n from 1 to 1024."""
    ns = torch.logspace(0, 10, POINTS, base=2, dtype=torch.float64).tolist()
    policies = [theory.best_of_n(base, reward, n) for n in ns]
    return {
        "n": ns,
        "kl": [theory.kl_divergence(policy, base) for policy in policies],
        "reward": [float(policy @ reward) for policy in policies],
    }


def table(found: dict[str, Any]) -> str:
    """What came out on one source, as a table in Markdown: means over seeds, worst regret."""
    lines = [
        f"{found['name']}: m = {found['m']}, {found['strings']} strings, rewards 0 to "
        f"{found['reward_range']:g}; regret in % of that range",
        "",
        "| method | settings | KL | reward | regret, mean | regret, worst | regret where it should "
        "end | KL to there | probability elsewhere |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in found["methods"]:
        runs = method["runs"]

        def mean(key: str, runs: list[dict[str, Any]] = runs) -> float:
            return sum(run[key] for run in runs) / len(runs)

        infinite = any(run["kl_to_target"] is None for run in runs)
        cells = [
            method["name"],
            method["settings"],
            f"{mean('kl'):.3f} ({runs[0]['target_kl']:.3f})",
            f"{mean('reward'):.3f} ({runs[0]['target_reward']:.3f})",
            f"{100 * mean('regret_share'):.3f}",
            f"{100 * max(run['regret_share'] for run in runs):.3f}",
            f"{100 * runs[0]['target_regret_share']:.3f}",
            "infinite" if infinite else f"{mean('kl_to_target'):.4f}",
            f"{100 * mean('tv_to_target'):.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
