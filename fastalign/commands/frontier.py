"""`fastalign frontier`: the best reward that any policy can have at a KL to its base.

From scored answers of the base alone, before any training (fastalign.theory.frontier has the
formulas): every prompt's answers are reweighted by e^(alpha r) among themselves, with one alpha for
all prompts, and KL and reward are means over prompts. That is the optimum of the mean reward under
a bound on the mean KL.

The folder it writes:

    frontier.json                the curve, best-of-n, the budgets, the runs placed on it
    frontier.svg, frontier.png   the same as a picture
    samples.jsonl                the answers with their rewards (--base)
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import theory
from fastalign.commands import bestofn
from fastalign.commands.answers import account
from fastalign.report.compare import names_of
from fastalign.report.read import read_evaluation
from fastalign.rollout import SamplingConfig
from fastalign.theory.frontier import LEAST_ESS
from fastalign.train import repeat, strict_json
from fastalign.train.run import (
    RunError,
    at_least,
    autocast,
    choose_device,
    claim_folder,
    clear_folder,
    write_config,
)
from fastalign.train.whole import write_text

log = logging.getLogger("fastalign")
EVALUATION = "evaluation.json"
DRAWN = 64
# What decides how answers are drawn and scored, and so goes with --base only.
DRAWING = (
    *("prompts", "lines", "limit", "split", "reward", "statistic", "coef", "gold"),
    *("sampling", "micro_tokens", "seed", "dtype"),
)
LARGEST = 1e300  # JSON has whole numbers that no float holds


@dataclass
class FrontierConfig:
    """How good any policy can get at a KL to its base, and where runs stand, from the base's scored
    answers."""

    samples: str | None = None
    """Scored answers of the base: JSON lines with prompt and reward, or the folder that holds them
    as samples.jsonl (that of bestofn, say)."""
    base: str | None = None
    """Instead: folder or hub id of the base, which is sampled and scored here."""
    column: str = "reward"
    """Which number of each answer is the reward: reward, or gold where there is one."""
    kl: str | None = None
    """KL budgets in nats, such as 0.5,1,2: which alpha, beta, lambda and n go with each."""
    runs: str | None = None
    """Runs to place beside the frontier, with commas: folders with an evaluation.json (that of a
    training, or of evaluate), or folders of such folders."""
    n: int | None = None
    """Answers to each prompt: as many are drawn (64), or the first n of those given used (all)."""
    output: str = "runs/frontier"
    """Folder of the results."""
    overwrite: bool = False
    """Delete what a former run left in the output folder."""
    prompts: str = "synthetic"
    """With --base: JSONL(.gz), Parquet, a folder, a hub id, or synthetic (its test split)."""
    lines: str | None = None
    """Use these records only, as a Python slice: 0:2000."""
    limit: int | None = 64
    """Use at most this many prompts."""
    split: str | None = None
    """Split of a folder or data set that has more than one."""
    reward: str = "runs/reward/model"
    """Folder of a reward ensemble, FILE.py:FUNCTION, or a weighted sum: 'A,0.5*B'."""
    statistic: str | None = None
    """Statistic of the reward ensemble, where it is not to be the one it was saved with."""
    coef: float | None = None
    """Coefficient of lcb and uwo, likewise."""
    gold: str | None = None
    """What is measured of every answer beside the reward (--column gold): anything that --reward
    may be, or gold, the built-in task's, which is the default with its prompts."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers are drawn; as those of the runs were."""
    micro_tokens: int = 8192
    """Tokens of one forward pass where answers are scored."""
    seed: int = 0
    """Of sampling."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """Of the forward pass: float32, bfloat16 (autocast), auto (it on CUDA)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "micro_tokens")
        at_least(self, 0, "coef")
        if (self.samples is None) == (self.base is None):
            raise RunError("give --samples (scored answers of the base) or --base (a model)")
        for option in fields(self) if self.samples is not None else ():
            made = option.default_factory
            default = option.default if made is MISSING else made()
            if option.name in DRAWING and getattr(self, option.name) != default:
                raise RunError(
                    f"--{option.name} is for answers that are drawn here, with --base: those of "
                    "--samples are used as they are"
                )
        if self.n is not None and self.n <= LEAST_ESS:
            raise RunError(
                f"--n: expected more than {LEAST_ESS:.0f} answers a prompt, got {self.n}"
            )
        autocast(choose_device(self.device), self.dtype)
        # KL(weights || uniform) <= log(n / ESS), whatever the rewards are.
        n = self.n or (DRAWN if self.base is not None else None)
        for kl in self.budgets:
            if n is not None and kl > math.log(n / LEAST_ESS):
                raise RunError(
                    f"--kl {kl:g}: {n} answers a prompt reach at most "
                    f"{math.log(n / LEAST_ESS):.2f} nats; {kl:g} need --n "
                    f"{math.ceil(LEAST_ESS * math.exp(min(kl, 30.0))):,} or more"
                )

    @property
    def budgets(self) -> list[float]:
        """Of --kl."""
        try:
            found = [float(word) for word in (self.kl or "").split(",") if word.strip()]
        except ValueError:
            found = [math.nan]
        if not all(math.isfinite(kl) and kl > 0 for kl in found):
            raise RunError(f"--kl: expected positive numbers as in 0.5,1,2, got {self.kl}")
        return found


def run(config: FrontierConfig) -> Path:
    """Computes, writes and prints; the folder of the results."""
    from fastalign.report.files import write_atomically
    from fastalign.report.frontier import picture, placed

    folder = Path(config.output)
    claim_folder(folder, overwrite=config.overwrite, resumable=False)
    evaluations = read_runs(config.runs)
    facts: dict[str, Any] = {"base": config.base}
    if config.base is None:
        assert config.samples is not None
        records, more = read_samples(Path(config.samples), folder)
    else:
        records, more = drawn(config, config.base, folder)
    found = measure(records, config.column, config.n, config.budgets)
    if config.base is None:
        begin(config, folder)
    found["runs"] = [placed(found, name, one) for name, one in evaluations.items()]
    found |= facts | more | repeat.facts(choose_device(config.device))
    for name, content in picture(found).files.items():
        write_atomically(folder / name, content)
    write_text(folder / "frontier.json", strict_json.dumps(found, indent=1) + "\n")
    show(found)
    return folder


def begin(config: FrontierConfig, folder: Path) -> None:
    """A former run goes; this one's configuration is there."""
    if config.overwrite:
        clear_folder(folder)
    write_config(folder, config)


def drawn(
    config: FrontierConfig, base: str, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The base's answers with their rewards, and facts on them; samples.jsonl is written."""
    shared = {f.name for f in fields(config)} & {f.name for f in fields(bestofn.BestOfNConfig)}
    options: dict[str, Any] = {name: getattr(config, name) for name in shared}
    options |= {"policy": base, "n": config.n or DRAWN}
    drawing = bestofn.BestOfNConfig(**options)
    answers, rewards, gold = bestofn.sources(drawing)
    begin(config, folder)
    answers.meter.start()
    records = bestofn.sample(drawing, answers, rewards, gold, folder)
    cost = account(folder, "frontier", answers.meter)
    return records, {"seed": config.seed, "source": rewards.describe(), **cost}


def read_samples(path: Path, output: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines of a file of scored answers, or of samples.jsonl in a folder, and where from.

    Raises:
        RunError: no such file, a line that is no JSON object, or a file that the output folder
            would be cleared of.
    """
    file = path / bestofn.SAMPLES if path.is_dir() else path
    if not file.is_file():
        raise RunError(f"--samples: no file {file}")
    if output.resolve() in file.resolve().parents:
        raise RunError(f"--samples: {file} lies in the output folder {output}; choose another")
    records = []
    # Not `splitlines`: text may hold U+2028, a line's end to Python and to nobody else.
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # of JSON, or of a whole number of thousands of digits
            record = None
        if not isinstance(record, dict):
            raise RunError(f"--samples: {file}:{number} is not a JSON object")
        records.append(record)
    facts: dict[str, Any] = {"samples_from": str(file)}
    if (path / bestofn.CURVE).is_file():
        curve = json.loads((path / bestofn.CURVE).read_text())
        facts["source"] = curve.get("source")
    return records, facts


def read_runs(runs: str | None) -> dict[str, dict[str, Any]]:
    """The evaluation.json of every run of --runs, by the run's name.

    Raises:
        RunError: a folder that has none, or a damaged one.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in (runs or "").split(","):
        if not word.strip():
            continue
        path = Path(word.strip())
        files = [path] if path.is_file() else [path / EVALUATION]
        if not files[0].is_file():
            files = sorted(path.glob(f"*/{EVALUATION}"))
        if not files:
            raise RunError(
                f"--runs: no {EVALUATION} in {path} or in its subfolders (a training that samples "
                "writes one when it ends; `fastalign evaluate` measures any model)"
            )
        for file in files:
            notes: list[str] = []
            evaluation = read_evaluation(file, notes)
            if evaluation is None:
                raise RunError(f"--runs: {file}: {' '.join(notes)}")
            folder = file.parent
            name = names_of(evaluation)[1] or folder.resolve().name
            found[name if name not in found else f"{name} ({folder.name})"] = evaluation
    return found


def table(records: list[dict[str, Any]], column: str, n: int | None) -> Tensor:
    """float64 [P, N]: one number of every answer, prompt by prompt; the first n of each.

    Raises:
        RunError: a record without it, prompts with different numbers of answers, fewer than n.
    """
    by_prompt: dict[str, list[float]] = {}
    for number, record in enumerate(records, 1):
        value = record.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LARGEST:
            known = [k for k, v in record.items() if isinstance(v, int | float)]
            raise RunError(
                f"answer {number}: expected a number as {column}, got {value!r} "
                f"(numbers: {', '.join(known) or 'none'})"
            )
        # Two records may ask the same; bestofn numbers its prompts.
        key = json.dumps([record.get("i"), record.get("prompt")], sort_keys=True)
        by_prompt.setdefault(key, []).append(float(value))
    if not by_prompt:
        raise RunError("expected scored answers, got none")
    counts = [len(values) for values in by_prompt.values()]
    if n is not None and min(counts) < n:
        raise RunError(f"--n {n}: a prompt has {min(counts)} answers only")
    if n is None and min(counts) != max(counts):
        raise RunError(
            f"expected as many answers to each prompt, got {min(counts)} to {max(counts)}: give "
            "--n to use the first n of each"
        )
    kept = [values[: n or max(counts)] for values in by_prompt.values()]
    return torch.tensor(kept, dtype=torch.float64)


def measure(
    records: list[dict[str, Any]], column: str, n: int | None, budgets: list[float]
) -> dict[str, Any]:
    """The content of frontier.json, without the runs.

    Raises:
        RunError: rewards that say nothing (see `theory.frontier`), a budget that is too large.
    """
    rewards = table(records, column, n)
    try:
        curve = theory.frontier(rewards)
        chosen = [theory.for_kl_budget(rewards, kl) for kl in budgets]
    except ValueError as error:
        raise RunError(str(error)) from error
    has_logp = all("logp" in record for record in records)
    logp = table(records, "logp", n) if has_logp else None
    if logp is not None and not bool((logp <= 0).all()):
        wrong = float(logp[~(logp <= 0)][0])
        raise RunError(f"expected logp of every answer as a log-probability, <= 0, got {wrong}")
    return {
        "reward": column,
        "prompts": len(rewards),
        "samples": rewards.shape[1],
        "tilting": "each prompt's answers among themselves, one alpha for all prompts",
        "curve": {f.name: getattr(curve, f.name).tolist() for f in fields(curve)},
        "end": {
            "kl": float(curve.kl[-1]),
            "ess": float(curve.ess[-1]),
            "is_saturated": float(curve.ess[-1]) > LEAST_ESS * (1 + 1e-6),
        },
        "best_of_n": best_of_n(rewards, logp),
        "budgets": [{"kl": kl, **asdict(one)} for kl, one in zip(budgets, chosen, strict=True)],
    }


def best_of_n(rewards: Tensor, logp: Tensor | None) -> dict[str, Any]:
    """Best-of-n by this reward at powers of two: reward, bound of its KL, and where answers have
    log-probs or rewards tie the better estimate of it, all means over prompts."""
    some = [2**k for k in range(rewards.shape[1].bit_length())]
    by_prompt = theory.best_of_n_curve(rewards, rewards)[:, [n - 1 for n in some]]
    found: dict[str, Any] = {"n": some, "reward": by_prompt.mean(0).tolist()}
    if len(rewards) > 1:
        found["reward_se"] = (by_prompt.std(0) / len(rewards) ** 0.5).tolist()
    found["kl_bound"] = [theory.best_of_n_kl_bound(n) for n in some]
    has_ties = bool((rewards.sort(1).values.diff() == 0).any())
    if logp is not None or has_ties:
        found["kl_estimate"] = bestofn.kl_estimates(some, logp, rewards)
    return found


def show(found: dict[str, Any]) -> None:
    """Tables of the budgets and the runs, and what they rest on."""
    from rich.console import Console
    from rich.text import Text

    from fastalign.report.frontier import BUDGETS, RUNS, budget_cells, cells, in_short, sentence

    console = Console()
    placed = [run for run in found["runs"] if "note" not in run]
    for title, heads, rows in (
        ("What goes with a KL budget", BUDGETS, [budget_cells(one) for one in found["budgets"]]),
        ("Runs", RUNS, [(*cells(run)[:-1], in_short(run)) for run in placed]),
    ):
        if rows:
            console.print(Text(title), as_table(heads, rows))
    for run in found["runs"]:
        if "note" in run:
            log.warning("%s is not placed: %s", run["name"], run["note"])
    console.print(Text(sentence(found)))


def as_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> Any:
    """For the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, head in enumerate(heads):
        made.add_column(head, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
