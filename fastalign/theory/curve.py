"""The best-of-n curve from samples: unbiased, for every n from 1 to N, in O(N log N).

Of N samples sorted by proxy, a set of n drawn without replacement has sample i (1 is the lowest) as
its best with probability

    w_n(i) = C(i - 1, n - 1) / C(N, n)         so        curve[n] = sum_i w_n(i) gold(i)

is the mean gold score of best-of-n over all C(N, n) sets: the unbiased estimate of least variance.
Samples whose proxies tie are best equally often: each counts with the mean gold of its tie.

Exact weights are ratios of integers of thousands of digits. Here, with j = N - i samples above,

    w_n(N - j) = n / N * prod_{l=1..j} (N - n + 1 - l) / (N - l)

is a product of floats, at most about (1 - n / N)^j: after 38 N / n samples from the top the rest is
under 1e-16. And it is a polynomial in n, so smooth that over an octave of n, 20 Chebyshev nodes
give its values to 1e-15. An octave costs 20 * 38 N / n products, all octaves together O(N); the
sort costs more. Up to n = 63 the weights are taken one n after the other, w_(n+1)(i) = w_n(i)
(n + 1) (i - n) / (n (N - n)).

Source: the estimator is that of arXiv 2112.09332 (WebGPT). Tests: tests/test_theory_curve.py.
Benchmark: benchmarks/bench_theory.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.theory.checks import samples

FIRST_OCTAVE = 64
NODES = 20
DECAY = 38.0  # e^-38 is 3e-17


def best_of_n_curve(gold: Tensor, proxy: Tensor) -> Tensor:
    """Expected gold score of the best of n by proxy, for n = 1..N; unbiased.

    Args:
        gold: [N] scores of N samples for one prompt, or [P, N] for P prompts, any float dtype.
        proxy: the same shape; what the best one is chosen by. ``gold`` itself for the reward that
            best-of-n has under its own reward.

    Returns:
        gold's shape, float64: entry n - 1 is for best-of-n. For P prompts average over the first
        dimension.

    Raises:
        ValueError: shapes, dtypes, or scores that are not finite.
    """
    op = "best_of_n_curve"
    gold, proxy = samples(op, "gold", gold, (1, 2)), samples(op, "proxy", proxy, (1, 2))
    if gold.shape != proxy.shape:
        raise ValueError(
            f"{op}: expected proxy of gold's shape, {tuple(gold.shape)}, got {tuple(proxy.shape)}"
        )
    total = gold.shape[-1]
    mean = gold.mean(-1, keepdim=True)
    best_first = _by_proxy(gold - mean, proxy)
    curve = torch.empty_like(gold)
    last = min(FIRST_OCTAVE - 1, total)
    curve[..., :last] = _first(best_first, last)
    for low in _octaves(total):
        high = min(2 * low - 1, total)
        depth = min(total, int(DECAY * total / low) + 1)
        curve[..., low - 1 : high] = _octave(best_first[..., :depth], low, high, total)
    return curve + mean


def _by_proxy(gold: Tensor, proxy: Tensor) -> Tensor:
    """gold, the one with the highest proxy first; tied ones are their mean."""
    proxy, order = proxy.sort(dim=-1, descending=True)
    gold = gold.gather(-1, order)
    new = torch.ones_like(proxy, dtype=torch.bool)
    new[..., 1:] = proxy[..., 1:] != proxy[..., :-1]
    if bool(new.all()):
        return gold
    tie = new.flatten().cumsum(0) - 1
    count = torch.bincount(tie)
    means = gold.new_zeros(len(count)).index_add(0, tie, gold.flatten()) / count
    return means[tie].reshape(gold.shape)


def _first(best_first: Tensor, last: int) -> Tensor:
    """curve[1..last], each n from the weights of the one before."""
    total = best_first.shape[-1]
    # (i - l) / N of every sample i is a slice of one vector, for any l.
    shares = 1.0 - _range(0, total + last - 1, best_first) / total
    weight, scale = torch.ones_like(shares[:total]), 1.0 / total
    sums, scales = [], []
    for n in range(1, last + 1):
        sums.append((best_first * weight).sum(-1))
        scales.append(scale * n)
        weight *= shares[n : n + total]
        scale *= total / max(total - n, 1)
    return torch.stack(sums, -1) * torch.tensor(scales, dtype=torch.float64, device=weight.device)


def _weights(n: Tensor, total: int, depth: int) -> Tensor:
    """w_n(N - j) [len(n), depth] for j = 0..depth - 1; n real."""
    factors = n.new_empty(len(n), depth)
    factors[:, 0] = n / total
    remaining = total - _range(1, depth - 1, n)
    torch.sub(remaining, n[:, None] - 1.0, out=factors[:, 1:])
    factors[:, 1:].mul_(1.0 / remaining)
    return factors.cumprod_(1)


def _octaves(total: int) -> list[int]:
    """The first n of each octave: 32, 64, .. up to ``total``."""
    return [2**k for k in range(FIRST_OCTAVE.bit_length() - 1, total.bit_length())]


def _octave(best_first: Tensor, low: int, high: int, total: int) -> Tensor:
    """curve[low..high] from the samples that matter for it, best first."""
    n = _range(low, high, best_first)
    depth = best_first.shape[-1]
    if len(n) <= NODES:
        return best_first @ _weights(n, total, depth).T
    k = _range(0, NODES - 1, best_first)
    angle = math.pi * (k + 0.5) / NODES
    node = 0.5 * (low + high) + 0.5 * (high - low) * torch.cos(angle)
    node = torch.where(node == node.round(), node + 1e-12 * low, node)  # n - node is never 0
    at_node = best_first @ _weights(node, total, depth).T
    # The barycentric formula for Chebyshev nodes.
    weight = torch.sin(angle) * (1.0 - 2.0 * (k % 2)) / (n[:, None] - node)
    return (at_node @ weight.T) / weight.sum(1)


def _range(low: int, high: int, like: Tensor) -> Tensor:
    """low..high as floats."""
    return torch.arange(low, high + 1, dtype=torch.float64, device=like.device)
