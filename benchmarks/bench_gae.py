"""GAE: time, bytes moved and the fraction of this machine's copy speed, beside a loop over time.

    python benchmarks/bench_gae.py [--device cuda] [--out results/gae.csv]

Rivals in one run, interleaved, medians: the kernel, the same on packed sequences of unequal length,
the plain PyTorch reference, and `loop`, the usual backward loop with one tensor operation per step
and a stack at the end. Traffic: rewards and values in, advantages and returns out (float32: 16
bytes a token, bfloat16 in: 12); 6 FLOP a token. The ceiling is a copy that moves as many bytes.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.gae import gae

SHAPES = [(64, 512), (256, 1024), (1024, 4096), (16, 131_072)]
FLOP_PER_TOKEN = 6


def loop(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    advantages, advantage = [], torch.zeros_like(rewards[:, 0])
    steps = rewards.shape[1]
    for t in reversed(range(steps)):
        next_value = values[:, t + 1] if t + 1 < steps else torch.zeros_like(advantage)
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1], dim=1)


def seconds(run: Callable[[], object], device: str) -> float:
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


def medians(runs: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Median seconds of each; slow runs are repeated less, every round visits all that are left."""
    times: dict[str, list[float]] = {name: [seconds(run, device)] for name, run in runs.items()}
    counts = {name: max(3, min(repeats, int(2.0 / first[0]))) for name, first in times.items()}
    times = {name: [] for name in runs}
    for turn in range(max(counts.values())):
        for name, run in runs.items():
            if turn < counts[name]:
                times[name].append(seconds(run, device))
    return {name: statistics.median(taken) for name, taken in times.items()}


def packed_offsets(n_tokens: int, device: str) -> Tensor:
    """Sequences of 1,000 to 8,000 tokens (one shorter at the end) that fill ``n_tokens``."""
    random = torch.Generator().manual_seed(0)
    ends = torch.randint(1000, 8001, (n_tokens // 1000 + 1,), generator=random).cumsum(0)
    inside = ends[ends < n_tokens].tolist()
    return torch.tensor([0, *inside, n_tokens], dtype=torch.int32, device=device)


def bench(rows: int, steps: int, dtype: torch.dtype, device: str, repeats: int) -> list[dict]:
    rewards = torch.randn(rows, steps, device=device).to(dtype)
    values = torch.randn(rows, steps, device=device).to(dtype)
    mask = torch.rand(rows, steps // 16 + 1, device=device) < 0.8
    mask = mask.repeat_interleave(16, dim=1)[:, :steps].contiguous()
    flat_rewards, flat_values = rewards.flatten(), values.flatten()
    offsets = packed_offsets(rows * steps, device)
    n_bytes = rows * steps * (2 * rewards.element_size() + 8)
    source = torch.zeros(n_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def reference() -> None:
        with fa.backend("reference"):
            gae(rewards, values)

    runs: dict[str, Callable[[], object]] = {
        "fastalign": lambda: gae(rewards, values),
        "fastalign, mask": lambda: gae(rewards, values, mask=mask),
        "fastalign, packed": lambda: gae(flat_rewards, flat_values, cu_seqlens=offsets),
        "copy": lambda: target.copy_(source),
    }
    if steps <= 8192:
        runs |= {"reference": reference, "loop": lambda: loop(rewards, values)}
    taken = medians(runs, device, repeats)
    return [
        {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "rows": rows,
            "steps": steps,
            "dtype": str(dtype).removeprefix("torch."),
            "what": name,
            "MB": f"{n_bytes / 1e6:.1f}",
            "ms": f"{1e3 * time_:.4f}",
            "GB/s": f"{n_bytes / time_ / 1e9:.1f}",
            "GFLOP/s": f"{FLOP_PER_TOKEN * rows * steps / time_ / 1e9:.1f}",
            "of copy speed": f"{taken['copy'] / time_:.2f}",
            "times faster than loop": f"{taken['loop'] / time_:.1f}" if "loop" in taken else "",
        }
        for name, time_ in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", help="also write the rows to this CSV file")
    args = parser.parse_args()
    found: list[dict] = []
    for rows, steps in SHAPES:
        for dtype in args.dtypes:
            for row in bench(rows, steps, getattr(torch, dtype), args.device, args.repeats):
                if not found:
                    print("  ".join(f"{name:>12}" for name in row))
                found.append(row)
                print("  ".join(f"{value!s:>12}" for value in row.values()), flush=True)
    if args.out:
        with open(args.out, "w", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(found[0]))
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
