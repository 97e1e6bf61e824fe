"""Courses: a proxy reward and the gold one against KL, along a run or along best-of-n.

Of a run a course has one point a round (metrics.jsonl); of best-of-n one for every n
(samples.jsonl), for each statistic over the heads that the samples were scored with, since the same
samples serve them all. How far gold has fallen:

    drop = max of gold - final gold

Along a run gold is taken as means of `window` rounds, in the maximum as at the end. The maximum
takes the luckiest of many windows: where gold only fluctuates, each round by itself, the drop is 1
to 1.5 standard errors on average and over three in up to 4 of 100 runs (10 to 300 rounds), and one
of less than three is not told from none. A window's standard error is sigma / sqrt(window) with
sigma^2 = half the mean squared difference of neighbouring rounds; that of best-of-n is taken over
prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.commands.output import read_lines
from fastalign.ops.reduce_scores import STATISTICS, reduce_scores
from fastalign.report.read import Run, read_accounts, read_run, setting
from fastalign.theory import best_of_n_curve, best_of_n_kl_bound
from fastalign.train.run import RunError

SINGLE = "single head"


def window_of(n: int) -> int:
    """Rounds that one value of a course of n is the mean of: a tenth of them, an odd number."""
    return max(n // 10, 1) | 1


def running_mean(values: Sequence[float], window: int) -> Tensor:
    """fp64 [n - window + 1]: means of all stretches of `window` values.

    Raises:
        ValueError: not 1 <= window <= n.
    """
    found = torch.tensor(values, dtype=torch.float64)
    if not 1 <= window <= len(found):
        raise ValueError(f"running_mean: expected 1 <= window <= {len(found)}, got {window}")
    return found.unfold(0, window, 1).mean(1)


def fall(gold: Sequence[float], window: int = 1) -> dict[str, float]:
    """`drop` of gold rewards along a run, with `drop_stderr`; `peak`, `final`, and `peak_at`, the
    index of the middle of the best window. The error is NaN for fewer than two values.

    Raises:
        ValueError: not 1 <= window <= n.
    """
    means = running_mean(gold, window)
    values = torch.tensor(gold, dtype=torch.float64)
    at = int(means.argmax())
    noise = math.nan
    if len(values) > 1:
        noise = math.sqrt(float(values.diff().square().mean()) / 2)
    return {
        "peak": float(means[at]),
        "peak_at": at + window // 2,
        "final": float(means[-1]),
        "drop": float(means[at] - means[-1]),
        "drop_stderr": noise * math.sqrt(2 / window),
    }


def reached(runs: Sequence[dict[str, Any]]) -> float:
    """The largest KL that every one of some runs came to, as a mean of `window` rounds."""
    return min(float(running_mean(run["kl"], run["window"]).max()) for run in runs)


def gold_at(run: dict[str, Any], kl: float) -> float:
    """A run's gold reward in the first `window` rounds whose mean KL is at least `kl`.

    Raises:
        ValueError: it never came so far.
    """
    means = running_mean(run["kl"], run["window"])
    if not bool((means >= kl).any()):
        raise ValueError(f"gold_at: expected a KL of at most {float(means.max())}, got {kl}")
    first = int((means >= kl).int().argmax())
    return float(running_mean(run["gold"], run["window"])[first])


def of_run(run: Run) -> dict[str, Any] | None:
    """The course of a run; None where it did not log KL, proxy and gold in two rounds or more."""
    keys = {"kl": "kl/k1", "proxy": "reward/proxy", "gold": "reward/gold"}
    rows = [
        (step, row)
        for step, row in run.lines.get("train", {}).items()
        if all(math.isfinite(row.get(key, math.nan)) for key in keys.values())
    ]
    if len(rows) < 2:
        return None
    found: dict[str, Any] = {name: [row[key] for _, row in rows] for name, key in keys.items()}
    found["step"] = [step for step, _ in rows]
    window = window_of(len(rows))
    before = (run.evaluation or {}).get("before") or {}
    for name in ("proxy", "gold"):
        key = keys[name]
        found[f"{name}_start"] = before.get(key, rows[0][1][key])
        found[f"{name}_std"] = before.get(f"{key}_std", rows[0][1].get(f"{key}_std"))
    spread = [row["reward/disagreement"] for _, row in rows if "reward/disagreement" in row]
    if len(spread) == len(rows):
        means = running_mean(spread, window)
        found |= {"disagreement": spread, "disagreement_first": float(means[0])}
        found["disagreement_last"] = float(means[-1])
    return {
        "name": run.name,
        "seed": setting(run.config, "seed"),
        **_reward(run.evaluation or {"proxy": run.name}),
        **found,
        "window": window,
        **fall(found["gold"], window),
        "cost": _cost(run),
    }


def _reward(described: dict[str, Any]) -> dict[str, Any]:
    """What `RewardSource.describe` said: `source` and `statistic` for people, and the numbers."""
    entries = described.get("reward") or []
    ensembles = [entry for entry in entries if "n_heads" in entry]
    if not ensembles or len(entries) > 1:  # of a sum the heads' statistics say nothing
        source = "unfinished run"
        if entries:
            source = "a sum with reward models" if ensembles else "reward functions"
        return {"source": source, "statistic": str(described["proxy"])}
    one = ensembles[0]
    models, heads = one.get("n_models", 1), one["n_heads"]
    found = {name: one.get(name) for name in ("path", "coef", "n_heads", "n_parameters")}
    return found | {
        "n_models": models,
        "source": source_of(models, heads),
        "statistic": SINGLE if heads == 1 else one["statistic"],
    }


def source_of(models: int, heads: int) -> str:
    """For people: "4 heads, one encoder", "4 models"."""
    if models > 1:
        return f"{models} models" + (f", {heads} heads" if heads > models else "")
    return "one model" if heads == 1 else f"{heads} heads, one encoder"


def _cost(run: Run) -> dict[str, float]:
    """Seconds and model FLOPs: of the run, of scoring in it, and of training its reward models,
    where those are still where they were."""
    found = {}
    if run.accounting is not None:
        score = run.accounting.phases.get("score", {})
        for name in ("seconds", "flops"):
            found[name] = run.accounting.total[name]
            found[f"score_{name}"] = score.get(name, math.nan)
    trained = [
        account
        for folder in (_reward(run.evaluation or {"proxy": ""}).get("path") or "").split("+")
        for account in read_accounts(Path(folder).parent, "").values()
        if folder and (Path(folder).parent / "accounting.json").is_file()
    ]
    for name in ("seconds", "flops") if trained else ():
        found[f"training_{name}"] = sum(account.total[name] for account in trained)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def of_samples(folder: Path, name: str) -> list[dict[str, Any]]:
    """The courses of a folder of `fastalign bestofn` whose answers have gold rewards: one for each
    statistic over the heads, and for a single head (the mean over them).

    Raises:
        RunError: curve.json is damaged, or samples.jsonl does not hold `samples` answers to each
            prompt with finite numbers.
    """
    try:
        about = json.loads((folder / "curve.json").read_text())
        n, prompts, reward = about["samples"], about["prompts"], _reward(about["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder / 'curve.json'} is damaged: expected what bestofn writes ({error!r})"
        ) from error
    records = read_lines(folder / "samples.jsonl")
    if not records or "gold" not in records[0] or n < 2:
        return []
    if len(records) != n * prompts:
        raise RunError(
            f"{folder / 'samples.jsonl'}: expected {prompts} x {n} answers, got {len(records)}"
        )

    def column(key: str) -> Tensor:
        wrong = f"{folder / 'samples.jsonl'}: expected finite numbers as {key} of every answer"
        try:
            found = torch.tensor([record[key] for record in records], dtype=torch.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(wrong) from error
        if not bool(found.isfinite().all()):
            raise RunError(wrong)
        return found.reshape(-1, n, *found.shape[1:])

    gold = column("gold")
    proxies = {reward["statistic"]: [column("reward")]}
    if reward.get("n_heads", 1) > 1:
        heads, coef = column("heads"), reward["coef"]
        proxies = {SINGLE: list(heads.unbind(-1))}
        proxies |= {s: [reduce_scores(heads, s, coef)] for s in STATISTICS}
    kl = [best_of_n_kl_bound(k) for k in range(1, n + 1)]
    found = []
    for statistic, columns in proxies.items():
        one = _along_n(gold, columns) | {"n": list(range(1, n + 1)), "kl": kl}
        found.append({"name": name, **reward, "statistic": statistic, **one})
    return found


def _along_n(gold: Tensor, proxies: list[Tensor]) -> dict[str, Any]:
    """Expected gold and proxy reward of best-of-1..N, the mean over proxies and prompts, [P, N]."""
    golds = torch.stack([best_of_n_curve(gold, proxy) for proxy in proxies]).mean(0)
    own = torch.stack([best_of_n_curve(proxy, proxy) for proxy in proxies]).mean((0, 1))
    curve = golds.mean(0)
    at = int(curve.argmax())
    lost = golds[:, at] - golds[:, -1]
    error = float(lost.std()) / len(lost) ** 0.5 if len(lost) > 1 else math.nan
    return {
        "gold": curve.tolist(),
        "proxy": own.tolist(),
        "gold_start": float(gold.mean()),
        "gold_std": float(gold.std()),
        "proxy_start": float(torch.stack(proxies).mean()),
        "proxy_std": float(torch.stack([proxy.std() for proxy in proxies]).mean()),
        "peak": float(curve[at]),
        "peak_at": at,
        "final": float(curve[-1]),
        "drop": float(lost.mean()),
        "drop_stderr": error,
    }


def of_reward_model(run: Run) -> dict[str, Any] | None:
    """How far the heads of a run of `train reward` differ on held-out pairs and out of
    distribution; None where that was not measured."""
    rows = [row for row in run.lines.get("eval", {}).values() if "heads/correlation" in row]
    if run.kind != "reward" or not rows:
        return None
    names = {
        "accuracy": "accuracy",
        "correlation": "heads/correlation",
        "correlation_shuffled": "heads/correlation/shuffled",
        "disagreement": "disagreement",
        "disagreement_shuffled": "disagreement/shuffled",
    }
    found = {name: rows[-1][key] for name, key in names.items() if key in rows[-1]}
    return {"name": run.name, "heads": len(run.head_keys("accuracy/head_", "eval")), **found}


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All courses and reward models in a folder of runs, at any depth: `runs`, `best_of_n`,
    `reward_models`.

    Raises:
        RunError: no such folder, or none of its runs logged a gold reward.
    """
    if not folder.is_dir():
        raise RunError(f"expected a folder of runs, got {str(folder)!r}, which is not a folder")
    found: dict[str, list[dict[str, Any]]] = {"runs": [], "best_of_n": [], "reward_models": []}
    for path in sorted(folder.rglob("metrics.jsonl")):
        run = read_run(path.parent, _name(path.parent, folder))
        for kind, one in (("runs", of_run(run)), ("reward_models", of_reward_model(run))):
            if one is not None:
                found[kind].append(one)
    for path in sorted(folder.rglob("curve.json")):
        if (path.parent / "samples.jsonl").is_file():
            found["best_of_n"] += of_samples(path.parent, _name(path.parent, folder))
    if not found["runs"] and not found["best_of_n"]:
        raise RunError(
            f"no run in {folder} has a gold reward beside its own: train, or draw with bestofn, "
            "with --gold"
        )
    return found


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path != root else path.resolve().name
