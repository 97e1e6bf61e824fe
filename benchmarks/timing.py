"""Timing shared by the benchmarks: interleaved rounds, peak memory, the machine, a table and JSON.

Every round runs each candidate once, so that a slow phase of the machine hits all of them, in an
order of its own, so that no candidate always follows the same other one.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

Run = Callable[[], object]

PACKAGES = [
    "fastalign",
    "torch",
    "triton",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "transformers",
    "numpy",
]
# About a millisecond of a GPU's cycles: long enough for the host to queue what is timed.
HEAD_START = 1_500_000
LEAST_ROUNDS = 3
M_ARENA_MAX = -8  # malloc.h


class Timing(NamedTuple):
    """Seconds of one candidate over the rounds."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int


def seconds(run: Run, device: str) -> float:
    """Seconds of one call; on CUDA between two events, with the launches queued beforehand."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def timings(
    runs: Mapping[str, Run],
    device: str,
    repeats: int,
    limit: float | None = None,
) -> dict[str, Timing]:
    """Each candidate's seconds over interleaved rounds; call every candidate once before.

    On a CPU a candidate is called twice in its turn and the second call is timed, as in a loop that
    computes all the time: the threads are awake, and memory that the first call freed is at hand
    (the host of a virtual machine takes back idle cores and free memory within seconds).

    Args:
        repeats: rounds.
        limit: seconds after which no new round begins; LEAST_ROUNDS are run all the same.
    """
    if device == "cuda":
        for run in runs.values():  # try_out left the allocator empty
            run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names, order = list(runs), random.Random(0)
    begin = time.perf_counter()
    for done in range(repeats):
        late = limit is not None and time.perf_counter() - begin > limit
        if late and done >= min(LEAST_ROUNDS, repeats):
            break
        order.shuffle(names)
        for name in names:
            if device == "cpu":
                runs[name]()
            taken[name].append(seconds(runs[name], device))
    return {name: spread(values) for name, values in taken.items()}


def spread(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


def medians(
    runs: dict[str, Run], device: str, repeats: int, limit: float | None = None
) -> dict[str, float]:
    """Median seconds of each candidate over interleaved rounds, after one warm-up round."""
    for run in runs.values():
        run()
    taken = timings(runs, device, repeats, limit)
    return {name: timing.median for name, timing in taken.items()}


def try_out(runs: dict[str, Run], device: str) -> tuple[dict[str, int | None], dict[str, str]]:
    """Calls each candidate twice, to warm it up and for its memory.

    Returns:
        (peaks, failures): ``peak_bytes`` of each candidate that ran, what the others raised.
    """
    peaks: dict[str, int | None] = {}
    failures: dict[str, str] = {}
    # Modules need no looking through each time: a third of a second with torch's compiler.
    gc.collect()
    gc.freeze()
    for name, run in runs.items():
        try:
            run()
            peaks[name] = peak_bytes(run, device)
        except Exception as error:  # other people's code on any machine: reported, never hidden
            failures[name] = failure(error, name, device)
        release(device)
    gc.unfreeze()
    return peaks, failures


def failure(error: Exception, name: str, device: str) -> str:
    """What a candidate raised, in one line; RuntimeError when it left the GPU unusable."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as dead:
            raise RuntimeError(f"{name}: {text}; run again --without it") from dead
    return text


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(run: Run, device: str) -> int | None:
    """Bytes that one call takes at most beside what was there before.

    On CUDA by the allocator's count; on CPU the process's peak resident size, where the system can
    reset it (Linux), else None. There the call is made in a new thread, for which nothing is kept
    from earlier calls.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    counter = Path("/proc/self/clear_refs")
    if not counter.exists():
        return None
    gc.collect()
    give_back_freed()
    counter.write_text("5")
    before = resident("VmRSS")
    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()
    return max(0, resident("VmHWM") - before)


def give_back_freed() -> None:
    """Memory that was freed but is still the process's would be taken again unseen.

    glibc gives all of it back only from its main arena, so that new threads are told to use it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.mallopt(M_ARENA_MAX, 1)
        libc.malloc_trim(0)


def resident(field: str) -> int:
    """A size in bytes from /proc/self/status: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"resident: no {field} in /proc/self/status")


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what is measured; "absent" for what is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": device,
        "name": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0],
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "name": properties.name,
            "processor": processor(),
            "capability": f"{properties.major}.{properties.minor}",
            "GiB": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
        }
    return {
        **facts,
        "torch": torch.__version__,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }


def _module() -> str:
    path = Path(sys.argv[0])
    return f"benchmarks.{path.stem}" if path.parent.name == "benchmarks" else path.name


def arguments(doc: str | None, dtype: str = "float32") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=dtype, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--minutes", type=float, help="begin no new round after so long")
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, help="instead of the usual ones, for example 16x8x96"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="WORD",
        help="leave out other libraries so named",
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; a plot goes beside it")
    return parser


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


def share(options: argparse.Namespace, shapes: int) -> float | None:
    """Seconds of rounds for each of so many shapes: half the minutes, the rest is for warm-up."""
    return None if options.minutes is None else 30.0 * options.minutes / shapes


def report(
    rows: list[dict[str, Any]],
    options: argparse.Namespace,
    notes: dict[str, Any],
    *,
    ratio: str | None = None,
) -> None:
    """Prints the rows as a table and writes them, with the machine, to ``options.out``.

    Args:
        ratio: the column that a plot shows, a time over that of the ceiling.
    """
    print_table(rows)
    for name, value in notes.items():
        print(f"{name}: {value}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        everything = {
            "machine": machine(options.device),
            "notes": notes,
            "ratio": ratio,
            "rows": rows,
        }
        options.out.write_text(json.dumps(everything, indent=1) + "\n")
        from benchmarks.plot import draw

        draw(everything, options.out.with_suffix(".svg"))


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [
        max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)
    ]
    for line in [columns, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
