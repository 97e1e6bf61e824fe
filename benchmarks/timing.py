"""Timing shared by the benchmarks: interleaved medians, a measured ceiling, a table and JSON.

Every round runs each candidate once, in turn, so that a slow phase of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]


def seconds(run: Run, device: str) -> float:
    """Seconds of one call; on CUDA between two events, so without the launch from an idle GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def medians(runs: dict[str, Run], device: str, repeats: int) -> dict[str, float]:
    """Median seconds of each candidate over interleaved rounds, after one warm-up round."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(taken) for name, taken in times.items()}


def peak_bytes(run: Run, device: str) -> int | None:
    """Bytes on CUDA that one call takes at most beside what was there before; None on CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": device,
        "name": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def arguments(doc: str | None, dtype: str = "float32") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=dtype, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def report(rows: list[dict[str, Any]], options: argparse.Namespace, notes: dict[str, Any]) -> None:
    """Prints the rows as a table and writes them, with the machine, to ``options.out``."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [
        max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)
    ]
    for line in [columns, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    for name, value in notes.items():
        print(f"{name}: {value}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        everything = {"machine": machine(options.device), "notes": notes, "rows": rows}
        options.out.write_text(json.dumps(everything, indent=1) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
