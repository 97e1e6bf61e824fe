"""Every benchmark in turn, each in its own process, into one folder.

    python -m benchmarks.all --out benchmarks/results/cpu
    python -m benchmarks.all --device cuda --out benchmarks/results/h200 --minutes 25

Each bench_*.py of this folder writes FOLDER/<name>.json, with a plot beside it; tables.md holds all
tables. A benchmark that fails or runs over twice its share of the time is reported and the next one
is run; the exit status is then 1. What is already measured of it stays in its file. What each one
prints is in <name>.log.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.table import markdown

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def names() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))


def run_all(
    benchmarks: Sequence[str], device: str, out: Path, minutes: float | None, more: Sequence[str]
) -> dict[str, str]:
    """Runs the benchmarks; returns the failures, by name.

    Args:
        minutes: for all of them together; each gets an equal share of what is left. None: no limit.
        more: further arguments of every benchmark.
    """
    failures = {}
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for done, name in enumerate(benchmarks):
        result, log = out / f"{name}.json", out / f"{name}.log"
        result.unlink(missing_ok=True)  # an old one must not pass for this run's
        command = [sys.executable, "-u", "-m", f"benchmarks.{name}", "--device", device]
        command += ["--dtype", DTYPES[device], "--out", str(result), *more]
        timeout = None
        if end is not None:
            left = end - time.monotonic()
            if left <= 0:
                failures[name] = "not run: no time left"
                print(f"== {name}: {failures[name]}", flush=True)
                continue
            each = left / (len(benchmarks) - done)
            command += ["--minutes", f"{each / 60:.3g}"]
            timeout = min(left, 2 * each)
        print(f"== {name}", flush=True)
        try:
            with log.open("w") as file:
                status = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, timeout=timeout, check=False
                ).returncode
        except subprocess.TimeoutExpired:
            failures[name] = f"stopped after {timeout:.0f} s"
        else:
            if status:
                failures[name] = f"exit status {status}"
        print(log.read_text(), flush=True)
        if name in failures:
            print(f"== {name}: {failures[name]}", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further arguments are handed to every benchmark.",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--minutes", type=float, help="for all benchmarks together")
    parser.add_argument("--only", nargs="+", choices=names(), help="instead of all")
    options, more = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failures = run_all(options.only or names(), options.device, options.out, options.minutes, more)
    tables = [
        markdown(json.loads(path.read_text()), path.stem)
        for path in sorted(options.out.glob("bench_*.json"))
    ]
    (options.out / "tables.md").write_text("\n".join(tables))
    for name, why in failures.items():
        print(f"FAILED: {name}: {why}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
