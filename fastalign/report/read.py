"""Reads run folders: metrics, evaluation, samples, configuration; forgives a killed run.

A run that was stopped may end in half a line, and one that was resumed may have logged steps twice:
of two lines with the same phase and step the later one counts. Nothing here guesses a value; what
could not be read becomes a note, and the page shows the notes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastalign.errors import UserError

POLICY_METHODS = (
    *("apa", "ppo", "awr", "grpo", "dpo"),
    *("rwr", "mle", "dt", "apa-offline", "awr-offline"),
)


class ReportError(UserError):
    """The folder cannot be reported on; the message is one line for the person at the terminal."""


@dataclass(frozen=True)
class Accounting:
    """accounting.json: costs by phase and in all; NaN where one was not measured."""

    phases: dict[str, dict[str, float]]
    total: dict[str, float]
    energy: str | None
    peak_flops: float | None
    peak_source: str | None
    resumes: int
    method: str | None = None
    repeat: dict[str, Any] = field(default_factory=dict)
    """The command, the machine and the versions, where they were recorded."""


@dataclass(frozen=True)
class Run:
    """One run folder."""

    name: str
    path: Path
    kind: str
    """"sft", "reward" or "policy"."""
    lines: dict[str, dict[int, dict[str, float]]]
    """phase -> step -> metrics, steps ascending; numbers only, NaN and infinities kept."""
    evaluation: dict[str, Any] | None
    samples: list[dict[str, Any]]
    config: str | None
    """The text of config.yaml."""
    notes: list[str] = field(default_factory=list)
    accounting: Accounting | None = None

    def series(self, key: str, phase: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """Steps int64 [n] and values float64 [n] of one metric, where it was logged."""
        rows = [(step, row[key]) for step, row in self.lines.get(phase, {}).items() if key in row]
        steps = np.array([step for step, _ in rows], dtype=np.int64)
        return steps, np.array([value for _, value in rows], dtype=np.float64)

    def finite(self, key: str, phase: str = "train") -> tuple[np.ndarray, np.ndarray]:
        """As ``series``, without NaN and infinities."""
        steps, values = self.series(key, phase)
        keep = np.isfinite(values)
        return steps[keep], values[keep]

    def has(self, key: str, phase: str = "train") -> bool:
        return self.finite(key, phase)[0].size > 0

    def head_keys(self, prefix: str, phase: str = "train") -> list[str]:
        """The logged keys ``prefix0``, ``prefix1``, ... in the order of their numbers."""
        found = {key for row in self.lines.get(phase, {}).values() for key in row}
        heads = [key for key in found if re.fullmatch(re.escape(prefix) + r"\d+", key)]
        return sorted(heads, key=lambda key: int(key[len(prefix) :]))

    @property
    def last_step(self) -> int | None:
        return max((step for rows in self.lines.values() for step in rows), default=None)


@dataclass(frozen=True)
class Road:
    """What one report is about: a policy run, the stages before it, or any one of them alone."""

    path: Path
    name: str
    is_road: bool
    policy: Run | None
    reward: Run | None
    sft: Run | None
    notes: list[str]
    accounts: dict[str, Accounting]
    """Of all runs in the folder, whatever their method, and of those to compare them with."""

    @property
    def runs(self) -> list[Run]:
        return [run for run in (self.policy, self.reward, self.sft) if run is not None]


def read_folder(path: Path, against: Sequence[Path] = ()) -> Road:
    """Reads a run folder or a folder of stages.

    Args:
        against: runs, or folders of runs, whose costs are to stand beside this one's.

    Raises:
        ReportError: no such folder, or no ``metrics.jsonl`` in it or in one of its stages.
    """
    if not path.is_dir():
        raise ReportError(
            f"report: expected a run folder, got {str(path)!r}, which is not a folder"
        )
    name = path.resolve().name
    if (path / "metrics.jsonl").is_file():
        run = read_run(path, name)
        stages = {run.kind: run}
        notes: list[str] = []
    else:
        folders = [stage for stage in ("sft", "reward", *POLICY_METHODS) if _is_run(path / stage)]
        if not folders:
            raise ReportError(
                f"report: expected metrics.jsonl in {str(path)!r} or in its subfolders sft/,"
                " reward/, apa/, found none"
            )
        methods = [stage for stage in folders if stage in POLICY_METHODS]
        notes = [
            f"{stage}/ is also in this folder and has a report of its own." for stage in methods[1:]
        ]
        stages = {
            stage: read_run(path / stage, stage, stage)
            for stage in folders
            if stage in ("sft", "reward")
        }
        if methods:
            stages["policy"] = read_run(path / methods[0], methods[0], "policy")
    accounts = read_accounts(path, name)
    for other in against:
        more = read_accounts(other, other.resolve().name)
        if not more:
            raise ReportError(f"report: no accounting.json in {str(other)!r} or in its subfolders")
        for own_name, account in more.items():
            key = own_name if own_name not in accounts else f"{other}: {own_name}"
            accounts[key] = account
    return Road(
        path=path,
        name=name,
        is_road=not (path / "metrics.jsonl").is_file(),
        policy=stages.get("policy"),
        reward=stages.get("reward"),
        sft=stages.get("sft"),
        notes=notes,
        accounts=accounts,
    )


def read_accounts(path: Path, name: str) -> dict[str, Accounting]:
    """Costs by the run's name: of a run's folder, or of all runs in a folder of them."""
    if (path / "accounting.json").is_file():
        account = _read_accounting(path / "accounting.json", [])
        return {} if account is None else {name: account}
    found = {}
    for folder in sorted(path.iterdir()) if path.is_dir() else ():
        if (folder / "accounting.json").is_file():
            account = _read_accounting(folder / "accounting.json", [])
            if account is not None:
                found[folder.name] = account
    return found


def read_run(path: Path, name: str, kind: str | None = None) -> Run:
    """Reads one run folder; without ``kind`` the metrics tell what it was."""
    notes: list[str] = []
    lines = _read_metrics(path / "metrics.jsonl", notes)
    evaluation = read_evaluation(path / "evaluation.json", notes)
    samples = []
    if (path / "samples.jsonl").is_file():
        records, _ = _read_jsonl(path / "samples.jsonl", notes)
        samples = [record for record in records if "prompt" in record]
    config = None
    if (path / "config.yaml").is_file():
        config = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
    return Run(
        name=name,
        path=path,
        kind=kind or _kind(lines, evaluation),
        lines=lines,
        evaluation=evaluation,
        samples=samples,
        config=config,
        notes=notes,
        accounting=_read_accounting(path / "accounting.json", notes),
    )


def setting(config: str | None, name: str) -> str | None:
    """The value of a top-level setting of config.yaml, as it is written there."""
    found = re.search(rf"^{re.escape(name)}:[ \t]*(\S.*)$", config or "", re.MULTILINE)
    return found.group(1).strip() if found else None


def seeds(config: str | None) -> list[tuple[str, str]]:
    """The lines of a configuration that set a seed, as (name, value)."""
    pattern = re.compile(r"^\s*(\w*seed\w*):[ \t]*(\S.*)$", re.MULTILINE)
    return [(name, value.strip()) for name, value in pattern.findall(config or "")]


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file()


def _kind(lines: dict[str, dict[int, dict[str, float]]], evaluation: dict[str, Any] | None) -> str:
    keys = {key for rows in lines.values() for row in rows.values() for key in row}
    if evaluation is not None or any(
        key.startswith(("reward/", "rewards/", "kl/")) for key in keys
    ):
        return "policy"
    if "accuracy" in keys:
        return "reward"
    return "sft" if "perplexity" in keys else "policy"


def _read_jsonl(path: Path, notes: list[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a JSON-lines file and their line numbers; notes say what had to be
    skipped."""
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    records, numbers, broken = [], [], []
    for number, line in rows:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
            numbers.append(number)
        else:
            broken.append(number)
    if broken and broken[-1] == rows[-1][0]:
        notes.append(
            f"{path.name}: the last line is cut off (stopped while writing); it is left out."
        )
        broken.pop()
    if broken:
        listed = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        notes.append(f"{path.name}: {len(broken)} unreadable line(s) left out (line {listed}).")
    return records, numbers


def _read_metrics(path: Path, notes: list[str]) -> dict[str, dict[int, dict[str, float]]]:
    if not path.is_file():
        notes.append("metrics.jsonl is missing.")
        return {}
    records, numbers = _read_jsonl(path, notes)
    lines: dict[str, dict[int, dict[str, float]]] = {}
    repeated = 0
    not_finite: dict[str, int] = {}
    for record, number in zip(records, numbers, strict=True):
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            notes.append(f"metrics.jsonl: line {number} has no step; it is left out.")
            continue
        rows = lines.setdefault(str(record.get("phase", "train")), {})
        repeated += step in rows
        rows[step] = {
            key: math.nan if value is None else float(value)
            for key, value in record.items()
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        }
    for rows in lines.values():
        for row in rows.values():
            for key, value in row.items():
                if not math.isfinite(value):
                    not_finite[key] = not_finite.get(key, 0) + 1
    if not lines:
        notes.append("metrics.jsonl holds no step yet.")
    if repeated:
        notes.append(
            f"metrics.jsonl: {repeated} step(s) logged again after a resume; the later line counts."
        )
    if not_finite:
        listed = ", ".join(f"{key} ({count}x)" for key, count in sorted(not_finite.items()))
        notes.append(f"metrics.jsonl: values that are not finite: {listed}.")
    return {phase: dict(sorted(rows.items())) for phase, rows in lines.items()}


def read_evaluation(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """evaluation.json; None, and why in the notes, where it is damaged."""
    if not path.is_file():
        return None
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError:
        evaluation = None
    if not isinstance(evaluation, dict) or not all(
        isinstance(evaluation.get(side), dict) for side in ("before", "after")
    ):
        notes.append("evaluation.json is damaged or holds no before and after; it is left out.")
        return None
    return evaluation


def _read_accounting(path: Path, notes: list[str]) -> Accounting | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        peak = content["peak_flops"]
        return Accounting(
            phases={str(name): _numbers(cost) for name, cost in content["phases"].items()},
            total=_numbers(content["total"]),
            energy=content["energy"] and str(content["energy"]),
            peak_flops=peak and float(peak),
            peak_source=content["peak_source"] and str(content["peak_source"]),
            resumes=int(content["resumes"]),
            method=content.get("method"),
            repeat={
                name: content[name]
                for name in ("command", "machine", "versions")
                if name in content
            },
        )
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
        notes.append("accounting.json is damaged; it is left out.")
        return None


def _numbers(cost: dict[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in cost.items()}
