"""GAE: time, bytes moved and the fraction of this machine's copy speed, beside a loop over time.

    python -m benchmarks.bench_gae [--device cuda --dtype bfloat16] [--out FILE.json]

Traffic: rewards and values in, float32 advantages and returns out. About 6 FLOP a token.
Rivals, in the same interleaved run: the same tokens packed in sequences of unequal length, the
same with a mask, the plain PyTorch reference, and the usual loop with a few tensor operations per
step and a stack at the end (neither on the longest rows). The ceiling is a copy of as many bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from benchmarks.timing import Run, arguments, medians, report, share
from fastalign.ops import gae

SHAPES = [(64, 512), (256, 1024), (1024, 4096), (16, 131_072)]
FLOP_PER_TOKEN = 6
LONGEST_LOOP = 8192


def loop(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    advantages, advantage = [], torch.zeros_like(rewards[:, 0])
    next_value = advantage
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages.append(advantage)
    return torch.stack(advantages[::-1], dim=1)


def packed_offsets(n_tokens: int, device: str) -> Tensor:
    """Sequences of 1,000 to 8,000 tokens, the last one shorter, that fill ``n_tokens``."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(1000, 8001, (n_tokens // 1000 + 1,), generator=generator).cumsum(0)
    inside = ends[ends < n_tokens].tolist()
    return torch.tensor([0, *inside, n_tokens], dtype=torch.int32, device=device)


def bench(rows: int, steps: int, options: Any) -> list[dict[str, Any]]:
    device, dtype = options.device, getattr(torch, options.dtype)
    rewards, values = torch.randn(2, rows, steps, device=device).to(dtype)
    turns = torch.rand(rows, steps // 16, device=device) < 0.8
    mask = turns.repeat_interleave(16, dim=1).contiguous()
    flat_rewards, flat_values = rewards.flatten(), values.flatten()
    offsets = packed_offsets(rows * steps, device)
    size = rows * steps * (2 * rewards.element_size() + 8)
    source, spare = torch.zeros(2, size // 2, dtype=torch.uint8, device=device)

    def reference() -> None:
        with fa.backend("reference"):
            gae(rewards, values)

    runs: dict[str, Run] = {
        "copy (ceiling)": lambda: spare.copy_(source),
        "fastalign": lambda: gae(rewards, values),
        "fastalign, mask": lambda: gae(rewards, values, mask=mask),
        "fastalign, packed": lambda: gae(flat_rewards, flat_values, cu_seqlens=offsets),
    }
    if steps <= LONGEST_LOOP:
        runs |= {"reference": reference, "loop": lambda: loop(rewards, values)}
    taken = medians(runs, device, options.repeats, share(options, len(options.shapes or SHAPES)))
    return [
        {
            "rows": rows,
            "steps": steps,
            "what": name,
            "ms": 1e3 * time,
            "GB": size / 1e9,
            "GB/s": size / time / 1e9,
            "GFLOP/s": None
            if name.startswith("copy")
            else FLOP_PER_TOKEN * rows * steps / time / 1e9,
            "of copy speed": taken["copy (ceiling)"] / time,
            "loop / this": taken["loop"] / time if "loop" in taken else None,
        }
        for name, time in taken.items()
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    shapes: list[tuple[int, int]] = options.shapes or SHAPES
    rows = [row for shape in shapes for row in bench(*shape, options)]
    report(rows, options, {"dtype": options.dtype})


if __name__ == "__main__":
    main()
