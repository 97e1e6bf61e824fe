"""Training beside TRL 1.16: the same model, data, dialogues a step and precision; real tokens/s.

    python -m benchmarks.bench_train --sizes 25m --out benchmarks/results/cpu/bench_train.json

Each run is a process of its own, the two trainers in turn, `--repeats` times, each with the same
steps. Speed is the tokens of the steps over their seconds, after two steps of warming up, and a
step's seconds are the median over the runs: what held up one step of one run does not count. Tokens
are those of prompts and responses, padding not counted. Memory is a process's peak beyond what it
held when training began (libraries, weights, data), on CUDA the allocator's.

The lengths of the dialogues are log-normal with a median of 90 + 50 words and a mean of about 200.
In TRL activation checkpointing is off, except in "sft defaults"; "sft packed" packs a step's tokens
into one row. Both sides learn from the responses only, and DPO looks up the reference in each step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import train_ours, train_task, train_theirs
from benchmarks.timing import machine, print_table, release

WARM_UP = 2
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
WORKERS = {"fastalign": "benchmarks.train_ours", "TRL": "benchmarks.train_theirs"}


def one(who: str, name: str, folder: Path, device: str, timeout: float) -> dict[str, Any]:
    """One training run in a process of its own: tokens/s, and bytes at the peak.

    Raises:
        RuntimeError: it failed; says how.
    """
    command = [sys.executable, "-m", WORKERS[who], name, str(folder), device, DTYPES[device]]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")]),
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"stopped after {timeout:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"exit status {done.returncode}: {lines[-1][:300]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    steps = list(zip(found["tokens"], found["seconds"], strict=True))[WARM_UP:]
    if not steps:
        raise RuntimeError(f"no steps left after {WARM_UP} of warming up")
    return {
        "steps": steps,
        "peak": found["peak"],
        "beyond": found["peak"] - found.get("at start", 0),
    }


def speed(runs: list[dict[str, Any]]) -> float:
    """Tokens a second of runs of the same steps, each step at its median over the runs."""
    medians = [
        [statistics.median(numbers) for numbers in zip(*step, strict=True)]
        for step in zip(*(run["steps"] for run in runs), strict=False)
    ]
    return sum(tokens for tokens, _ in medians) / sum(seconds for _, seconds in medians)


def compare(
    size: str, methods: list[str], device: str, repeats: int, steps: int, end: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of one model size, and what failed."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train_task.write(folder, train_task.SIZES[size], steps)
        candidates = [
            (who, name)
            for method in methods
            for who, names in (("fastalign", train_ours.NAMES), ("TRL", train_theirs.NAMES))
            for name in names
            if name.split()[0] == method
        ]
        for _ in range(repeats):
            for who, name in candidates:
                left = end - time.monotonic()
                if left <= 0 or f"{who} {name}" in failed:
                    continue
                try:
                    found = one(who, name, folder, device, max(60.0, left))
                    runs.setdefault((who, name), []).append(found)
                except RuntimeError as error:
                    failed[f"{who} {name}"] = str(error)
                release(device)
    rows = []
    for (who, name), own in runs.items():
        ours = runs.get(("fastalign", name.split()[0]))
        own_speed = speed(own)
        beyond = statistics.median(run["beyond"] for run in own)
        row: dict[str, Any] = {
            "model": size,
            "method": name.split()[0],
            "of": who,
            "what": f"{who} {name}",
            "tokens/s": own_speed,
            "memory GB": beyond / 1e9,
            "process GB": statistics.median(run["peak"] for run in own) / 1e9,
        }
        if ours:
            row["fastalign is faster by"] = speed(ours) / own_speed
            least = statistics.median(run["beyond"] for run in ours)
            row["its memory / this"] = least / max(1.0, beyond)
        rows.append(row | {"runs": len(own), "timed steps": len(own[0]["steps"])})
    return rows, failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 on a GPU; no other is offered")
    parser.add_argument("--sizes", nargs="+", choices=list(train_task.SIZES))
    parser.add_argument(
        "--methods", nargs="+", default=["sft", "reward", "dpo", "grpo"], help="which of them"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    parser.add_argument("--steps", type=int, default=8, help="of a run, two of them to warm up")
    parser.add_argument("--minutes", type=float, help="begin no new run after so long")
    parser.add_argument("--out", type=Path, help="JSON file to write; a plot goes beside it")
    options = parser.parse_args()
    if options.dtype not in (None, DTYPES[options.device]):
        parser.error(f"--dtype: expected {DTYPES[options.device]}, got {options.dtype}")
    end = time.monotonic() + 60 * (options.minutes or 600)
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for size in options.sizes or (["25m"] if options.device == "cpu" else ["25m", "0.6b"]):
        more, wrong = compare(
            size, options.methods, options.device, options.repeats, options.steps, end
        )
        rows += more
        failed |= {f"{size}, {name}": why for name, why in wrong.items()}
    print_table(rows)
    for name, why in failed.items():
        print(f"failed: {name}: {why}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        notes = {
            "dtype": DTYPES[options.device],
            "models": {n: vars(train_task.SIZES[n]) for n in {row["model"] for row in rows}},
            "failed": failed,
        }
        everything = {
            "machine": machine(options.device),
            "notes": notes,
            "ratio": None,
            "rows": rows,
        }
        options.out.write_text(json.dumps(everything, indent=1) + "\n")
        plot(rows, options.device, options.out.with_suffix(".svg"))


def plot(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """Speed and memory relative to TRL's plain run of the method, one group of bars a method."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fastalign.report.style import BLUE, INK, MUTED, RULE

    sizes = list(dict.fromkeys(row["model"] for row in rows))
    with rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 0.32 * len(rows) + 1.2 * len(sizes)), layout="constrained")
        axes = figure.subplots(len(sizes), 2, squeeze=False)
        for pair, size in zip(axes, sizes, strict=True):
            mine = [row for row in rows if row["model"] == size][::-1]
            for axis, column, title in zip(
                pair,
                ("tokens/s", "memory GB"),
                (f"{size}: real tokens/s, fastalign = 1", f"{size}: peak memory, fastalign = 1"),
                strict=True,
            ):
                unit = {
                    r["what"].removeprefix("fastalign "): r[column]
                    for r in mine
                    if r["of"] == "fastalign"
                }
                values = [r[column] / unit.get(r["method"], float("nan")) for r in mine]
                colours = [BLUE if r["of"] == "fastalign" else MUTED for r in mine]
                bars = axis.barh([r["what"] for r in mine], values, color=colours, height=0.7)
                axis.bar_label(bars, fmt="%.2f", padding=3, color=INK)
                axis.set_title(title, loc="left", color=INK)
                axis.axvline(1, color=RULE)
                axis.margins(x=0.15)
                axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)


if __name__ == "__main__":
    main()
