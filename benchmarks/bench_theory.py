"""Strings by types, the best-of-n curve, the frontier from samples; beside plain ways.

    python -m benchmarks.bench_theory [--shapes 320x12600x100000] [--out FILE.json]

A shape is the letters of a string, the scored samples of the curve, the samples of the frontier.
Each result is checked: types by KL(pi || phi) = KL(pi || p) - KL(phi || p) + alpha (E_phi r - E_pi
r); the curve by integer weights C(i - 1, n - 1) / C(N, n), at 16 orders n; the frontier by
the same sums in numpy's long double. Rivals of the curve: those integers (16 orders, not all), and
weights from log-gamma for all n; they take seconds and are timed once. All on the CPU in float64,
whatever ``--device`` and ``--dtype`` say.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Run, Timing, arguments, report, seconds, share, timings
from fastalign import theory

SHAPES = [(320, 12_600, 100_000)]
GOAL_MS = {"types": 1000.0, "curve": 5.0, "frontier": 1000.0}
EXACT = 1e-9
ORDERS = 16
ROWS = 200  # of the matrix of weights that the plain curve holds at once


def types(m: int) -> float:
    """All numbers of a source of m letters; the residual of the identity."""
    base = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    reward = (torch.tensor([6, 1, 2], dtype=torch.float64) / 9).log()
    alpha = theory.alpha_for_kl(base, reward, 0.11)
    source = theory.Memoryless(base, reward, m)
    best, phi = source.best_of_n(math.exp(0.11 * m)), source.tilt(alpha)
    identity = best.kl_to_base - phi.kl_to_base + alpha * (phi.reward - best.reward)
    return abs(best.kl_to(phi) - identity)


def integer_weights(gold: list[int], orders: list[int]) -> list[float]:
    """sum_i C(i - 1, n - 1) gold(i) / C(N, n) without any rounding; gold is sorted by proxy."""
    found = []
    for n in orders:
        total, weight = 0, 1
        for i in range(n, len(gold) + 1):
            total += weight * gold[i - 1]
            weight = weight * i // (i - n + 1)
        found.append(float(Fraction(total, math.comb(len(gold), n))))
    return found


def log_gamma_weights(gold: Tensor, proxy: Tensor) -> Tensor:
    """The curve for every n with e^(log C(i - 1, n - 1) - log C(N, n)), N^2 of them."""
    total = len(gold)
    by_proxy = gold[proxy.argsort()]
    log_factorial = torch.arange(1, total + 2, dtype=torch.float64).lgamma()
    i, out = torch.arange(1, total + 1), torch.empty_like(gold)
    for low in range(1, total + 1, ROWS):
        n = torch.arange(low, min(low + ROWS, total + 1))[:, None]
        above = (i - n).clamp(min=0)
        log_w = log_factorial[i - 1] - log_factorial[n - 1] - log_factorial[above]
        log_w += log_factorial[n] + log_factorial[total - n] - log_factorial[total]
        out[low - 1 : low - 1 + len(n)] = log_w.exp().masked_fill(i < n, 0.0) @ by_proxy
    return out


def frontier_error(rewards: Tensor) -> float:
    """Largest difference of KL and reward from sums in long double, at every tenth point."""
    found = theory.frontier(rewards)
    r = rewards.double().numpy().astype(np.longdouble)
    worst = 0.0
    for point in range(0, len(found.alpha), 10):
        alpha = np.longdouble(float(found.alpha[point]))
        weight = np.exp(alpha * r)
        reward = (weight * r).sum() / weight.sum()
        kl = alpha * reward - np.log(weight.mean())
        worst = max(worst, abs(float(reward - found.reward[point].item())))
        worst = max(worst, abs(float(kl - found.kl[point].item())))
    return worst


def row(task: str, size: int, what: str, of: str, timing: Timing, error: float) -> dict[str, Any]:
    own = of == "fastalign"
    return {
        "task": task,
        "N": size,
        "what": what,
        "of": of,
        "ms": 1e3 * timing.median,
        "q1 ms": 1e3 * timing.low,
        "q3 ms": 1e3 * timing.high,
        "rounds": timing.rounds,
        "goal ms": GOAL_MS[task] if own else None,
        "in time": 1e3 * timing.median < GOAL_MS[task] if own else None,
        "error": error,
        "agrees": error <= EXACT,
    }


def bench(m: int, scored: int, sampled: int, options: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    gold = torch.randint(-(10**6), 10**6, (scored,), generator=generator)
    proxy = torch.randperm(scored, generator=generator).double()
    scores = gold.double() / 1e6
    rewards = torch.randn(sampled, generator=generator, dtype=torch.float64)
    runs: dict[str, Run] = {
        "types": partial(types, m),
        "curve": partial(theory.best_of_n_curve, scores, proxy),
        "frontier": partial(theory.frontier, rewards),
    }
    for run in runs.values():
        run()
    taken = timings(runs, "cpu", options.repeats, share(options, 1))

    orders = sorted({round(scored ** (k / (ORDERS - 1))) for k in range(ORDERS)})
    by_proxy = gold[proxy.argsort()].tolist()
    exact: list[float] = []
    integers = seconds(lambda: exact.extend(integer_weights(by_proxy, orders)), "cpu")
    plain: list[Tensor] = []
    matrix = seconds(lambda: plain.append(log_gamma_weights(scores, proxy)), "cpu")

    def curve_error(curve: Tensor) -> float:
        want = torch.tensor(exact, dtype=torch.float64) / 1e6
        return float((curve[torch.tensor(orders) - 1] - want).abs().max())

    def once(time: float) -> Timing:
        return Timing(time, time, time, 1)

    own = theory.best_of_n_curve(scores, proxy)
    return [
        row("types", m, "Memoryless", "fastalign", taken["types"], types(m)),
        row("curve", scored, "best_of_n_curve", "fastalign", taken["curve"], curve_error(own)),
        row("curve", scored, f"integers, {len(orders)} orders", "python", once(integers), 0.0),
        row("curve", scored, "log-gamma", "torch", once(matrix), curve_error(plain[0])),
        row(
            "frontier", sampled, "frontier", "fastalign", taken["frontier"], frontier_error(rewards)
        ),
    ]


def main() -> int:
    options = arguments(__doc__).parse_args()
    shapes: list[tuple[int, int, int]] = options.shapes or SHAPES
    rows = [line for shape in shapes for line in bench(*shape, options)]
    report(rows, options, {"dtype": "float64", "exact": EXACT})
    return int(not all(line["agrees"] for line in rows if line["of"] == "fastalign"))


if __name__ == "__main__":
    raise SystemExit(main())
