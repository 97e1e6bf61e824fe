"""Scans over time (gae, returns, vtrace): time, bytes, fraction of copy speed, beside loops.

    python -m benchmarks.bench_gae [--device cuda --dtype bfloat16] [--out FILE.json]

Traffic: each input is read once, each result, float32, written once; the ceiling is the measured
speed of a copy. About 6 FLOP a token (12 for vtrace). Rivals, in the same interleaved run:

  loop            over time with a few tensor operations per step and a stack at the end, as TRL,
                  torchtune and OpenRLHF have it; with a mask as verl has it
  loop, time first  over rows of [T, B], written in place, as CleanRL has it
  NumPy, packed   a loop over the steps of rows into which sequences are packed, whose ends are
                  flags: the form of open-instruct
  lfilter         SciPy's recursive filter of the TD errors, where SciPy is installed
  associative_scan  torch's own, compiled on CUDA; on a CPU as it is, because there it takes a
                  minute to compile and is then slower

torch.compile unrolls a loop over time and does not end in reasonable time on these. "equal" packs
the rows as they are, "packed" sequences of 1,000 to 8,000 tokens. No loop runs on the longest rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Run, arguments, medians, report, share
from fastalign.ops import discounted_returns, gae, lambda_returns, vtrace, whiten

SHAPES = [(64, 512), (256, 1024), (1024, 4096), (16, 131_072)]
GAMMA, LAM = 0.99, 0.95
LONGEST_LOOP = 8192


def backwards(steps: int, step: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([step(t) for t in reversed(range(steps))][::-1], dim=1)


def loop(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    advantage: Any = 0.0
    steps = rewards.shape[1]

    def step(t: int) -> Tensor:
        nonlocal advantage
        following = values[:, t + 1] if t < steps - 1 else 0.0
        advantage = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * advantage
        return advantage

    advantages = backwards(steps, step)
    return advantages, advantages + values


def time_first_loop(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """On [T, B], contiguous."""
    advantages = torch.zeros_like(rewards)
    advantage: Any = 0.0
    following: Any = 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + GAMMA * following - values[t]
        advantages[t] = advantage = delta + GAMMA * LAM * advantage
        following = values[t]
    return advantages, advantages + values


def whitened(rewards: Tensor, values: Tensor, mask: Tensor, rates: dict[str, Any]) -> Tensor:
    advantages, _, statistics = gae(rewards, values, mask=mask, return_statistics=True, **rates)
    return whiten(advantages, mask, statistics=statistics)


def masked_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    advantage: Any = 0.0
    following: Any = 0.0

    def step(t: int) -> Tensor:
        nonlocal advantage, following
        kept, skipped = mask[:, t], 1 - mask[:, t]
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        following = values[:, t] * kept + skipped * following
        advantage = (delta + GAMMA * LAM * advantage) * kept + skipped * advantage
        return advantage

    advantages = backwards(rewards.shape[1], step)
    return advantages, advantages + values


def numpy_packed(
    rewards: np.ndarray, values: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    advantages = np.zeros_like(rewards)
    advantage = np.zeros(len(rewards), dtype=rewards.dtype)
    following = np.zeros_like(advantage)
    for t in reversed(range(rewards.shape[1])):
        goes_on = 1 - ends[:, t]
        delta = rewards[:, t] + GAMMA * following * goes_on - values[:, t]
        advantage = delta + GAMMA * LAM * goes_on * advantage
        advantages[:, t] = advantage
        following = values[:, t]
    return advantages, advantages + values


def td_errors(rewards: Tensor, values: Tensor) -> Tensor:
    return rewards + GAMMA * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values


def torch_scan(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    from torch._higher_order_ops.associative_scan import associative_scan

    delta = td_errors(rewards, values)
    _, advantages = associative_scan(
        lambda late, early: (early[0] * late[0], early[0] * late[1] + early[1]),
        (torch.full_like(delta, GAMMA * LAM), delta),
        dim=1,
        reverse=True,
        combine_mode="pointwise" if delta.is_cuda else "generic",
    )
    return advantages, advantages + values


def lfilter(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """None where SciPy is not installed."""
    try:
        signal = importlib.import_module("scipy.signal")
    except ModuleNotFoundError:
        return None
    delta = td_errors(rewards, values).flip(1).numpy()
    advantages = torch.from_numpy(signal.lfilter([1.0], [1.0, -GAMMA * LAM], delta, axis=1))
    return advantages.flip(1), advantages.flip(1) + values


def discounted_loop(rewards: Tensor) -> Tensor:
    following: Any = 0.0

    def step(t: int) -> Tensor:
        nonlocal following
        following = rewards[:, t] + GAMMA * following
        return following

    return backwards(rewards.shape[1], step)


def lambda_loop(rewards: Tensor, values: Tensor) -> Tensor:
    following: Any = torch.zeros_like(rewards[:, 0])
    next_value = following

    def step(t: int) -> Tensor:
        nonlocal following, next_value
        following = rewards[:, t] + GAMMA * ((1 - LAM) * next_value + LAM * following)
        next_value = values[:, t]
        return following

    return backwards(rewards.shape[1], step)


def vtrace_loop(rewards: Tensor, values: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    capped = torch.exp(log_ratio).clamp(max=1.0)
    delta = capped * td_errors(rewards, values)
    excess: Any = 0.0

    def step(t: int) -> Tensor:
        nonlocal excess
        excess = delta[:, t] + GAMMA * capped[:, t] * excess
        return excess

    vs = backwards(rewards.shape[1], step) + values
    return vs, capped * (td_errors(rewards, vs) + vs - values)


def packed_offsets(n_tokens: int, device: str) -> Tensor:
    """Sequences of 1,000 to 8,000 tokens, the last one shorter, that fill ``n_tokens``."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(1000, 8001, (n_tokens // 1000 + 1,), generator=generator).cumsum(0)
    inside = ends[ends < n_tokens].tolist()
    return torch.tensor([0, *inside, n_tokens], dtype=torch.int32, device=device)


class Batch:
    """The inputs of all cases: rewards, values, turns of a dialogue as the mask, log-ratios."""

    def __init__(self, rows: int, steps: int, device: str, dtype: torch.dtype) -> None:
        self.rewards, self.values = torch.randn(2, rows, steps, device=device).to(dtype)
        turns = torch.rand(rows, -(-steps // 16), device=device) < 0.8
        self.mask = turns.repeat_interleave(16, dim=1)[:, :steps].contiguous()
        self.log_ratio = 0.3 * torch.randn(rows, steps, device=device)
        n_tokens = rows * steps
        self.offsets = packed_offsets(n_tokens, device)
        self.equal_offsets = torch.arange(0, n_tokens + 1, steps, dtype=torch.int32, device=device)

    def ours(self) -> dict[str, tuple[str, int, Run]]:
        """Of each case: its name, the numbers of 4 bytes beside rewards and values, the call."""
        r, v, mask = self.rewards, self.values, self.mask
        flat = (r.flatten(), v.flatten())
        rates: dict[str, Any] = {"gamma": GAMMA, "lam": LAM}
        equal, packed = self.equal_offsets, self.offsets
        w = self.log_ratio
        stats: dict[str, Any] = {"return_statistics": True, **rates}
        return {
            "gae": ("gae", 2, lambda: gae(r, v, **rates)),
            "gae, equal": ("gae", 2, lambda: gae(*flat, cu_seqlens=equal, **rates)),
            "gae, packed": ("gae", 2, lambda: gae(*flat, cu_seqlens=packed, **rates)),
            "gae, statistics": ("gae", 2, lambda: gae(r, v, **stats)),
            "gae, mask": ("gae, mask", 2, lambda: gae(r, v, mask=mask, **rates)),
            "gae, mask, statistics": ("gae, mask", 2, lambda: gae(r, v, mask=mask, **stats)),
            "gae, mask, then whiten": (
                "gae, mask, whiten",
                3,
                lambda: whiten(gae(r, v, mask=mask, **rates)[0], mask),
            ),
            "gae, mask, whiten by its statistics": (
                "gae, mask, whiten",
                3,
                lambda: whitened(r, v, mask, rates),
            ),
            "discounted_returns": ("discounted", 1, lambda: discounted_returns(r, gamma=GAMMA)),
            "lambda_returns": ("lambda", 1, lambda: lambda_returns(r, v, **rates)),
            "vtrace": ("vtrace", 3, lambda: vtrace(r, v, w, gamma=GAMMA)),
        }

    def rivals(self) -> dict[str, tuple[str, Run]]:
        r, v = self.rewards, self.values
        numbers = self.mask.to(r.dtype)
        time_first = (r.t().contiguous(), v.t().contiguous())
        runs: dict[str, tuple[str, Run]] = {
            "loop": ("gae", lambda: loop(r, v)),
            "loop, time first": ("gae", lambda: time_first_loop(*time_first)),
            "loop with a mask": ("gae, mask", lambda: masked_loop(r, v, numbers)),
            "loop of discounted returns": ("discounted", lambda: discounted_loop(r)),
            "loop of lambda-returns": ("lambda", lambda: lambda_loop(r, v)),
            "loop of vtrace": ("vtrace", lambda: vtrace_loop(r, v, self.log_ratio)),
        }
        scan = torch.compile(torch_scan) if r.is_cuda else torch_scan
        runs["associative_scan"] = ("gae", lambda: scan(r, v))
        if not r.is_cuda and r.dtype == torch.float32:
            flags = torch.zeros(r.numel())
            flags[self.offsets[1:].long() - 1] = 1.0
            arrays = (r.numpy(), v.numpy(), flags.view_as(r).numpy())
            runs["NumPy, packed"] = ("gae", lambda: numpy_packed(*arrays))
            if lfilter(r[:1, :2], v[:1, :2]) is not None:
                runs["lfilter"] = ("gae", lambda: lfilter(r, v))
        return runs


def bench(rows: int, steps: int, options: Any) -> list[dict[str, Any]]:
    dtype = getattr(torch, options.dtype)
    batch = Batch(rows, steps, options.device, dtype)
    source, spare = torch.zeros(2, 8 * rows * steps, dtype=torch.uint8, device=options.device)
    ours, runs = batch.ours(), {"copy (ceiling)": lambda: spare.copy_(source)}
    rivals = batch.rivals() if steps <= LONGEST_LOOP else {}
    runs |= {name: run for name, (_, _, run) in ours.items()}
    runs |= {name: run for name, (_, run) in rivals.items()}
    limit = share(options, len(options.shapes or SHAPES))
    taken = medians(runs, options.device, options.repeats, limit)
    copied = 2 * source.numel() / taken["copy (ceiling)"]
    # The loop over the same inputs as each of ours.
    # Of several the first one named.
    rival_of = {case: taken[name] for name, (case, _) in reversed(rivals.items())}
    found = []
    for name, time in taken.items():
        case, others, _ = ours.get(name, (None, 0, None))
        inputs = 1 if case == "discounted" else 2
        size = rows * steps * (inputs * dtype.itemsize + 4 * others + ("mask" in name))
        size = 2 * source.numel() if name.startswith("copy") else size if case else 0
        found.append(
            {
                "rows": rows,
                "steps": steps,
                "what": name,
                "ms": 1e3 * time,
                "MB": size / 1e6 if size else None,
                "GB/s": size / time / 1e9 if size else None,
                "of copy speed": size / time / copied if size else None,
                "loop / this": rival_of[case] / time if case in rival_of else None,
                "NumPy / this": taken["NumPy, packed"] / time
                if case == "gae" and "NumPy, packed" in taken
                else None,
                "this / gae": time / taken["gae"] if case == "gae" else None,
            }
        )
    return found


def main() -> None:
    options = arguments(__doc__).parse_args()
    shapes: list[tuple[int, int]] = options.shapes or SHAPES
    rows = [row for shape in shapes for row in bench(*shape, options)]
    report(rows, options, {"dtype": options.dtype})


if __name__ == "__main__":
    main()
