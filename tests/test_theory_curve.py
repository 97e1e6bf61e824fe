"""The best-of-n curve: integer weights, all sets written out, ties, unbiasedness, bad input."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fastalign.theory import best_of_n, best_of_n_curve


def exact(gold_by_proxy: list[int], n: int) -> Fraction:
    """sum_i C(i - 1, n - 1) gold(i) / C(N, n), gold sorted by proxy, in integers."""
    total, weight = 0, 1
    for i in range(n, len(gold_by_proxy) + 1):
        total += weight * gold_by_proxy[i - 1]
        weight = weight * i // (i - n + 1)
    return Fraction(total, math.comb(len(gold_by_proxy), n))


def test_worked_by_hand() -> None:
    """N = 5, n = 3: weights C(i - 1, 2) / C(5, 3) = (0, 0, .1, .3, .6); gold sorted by proxy is
    (5, 1, 4, 2, 3): .4 + .6 + 1.8 = 2.8. n = 2: (0, 1, 2, 3, 4) / 10, .1 + .8 + .6 + 1.2 = 2.7.
    n = 4: (0, 0, 0, .2, .8), .4 + 2.4 = 2.8. n = 1: the mean, n = 5: the last.
    """
    proxy, gold = torch.tensor([0.5, -1.0, 7.0, 2.0, 1.0]), torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0])
    curve = best_of_n_curve(gold, proxy)
    assert curve.dtype == torch.float64
    assert curve.tolist() == pytest.approx([3.0, 2.7, 2.8, 2.8, 3.0], abs=1e-15)
    assert exact([5, 1, 4, 2, 3], 2) == Fraction(27, 10)


@pytest.mark.parametrize("total", [1, 2, 33, 63, 64, 83, 84, 85, 100, 129, 199, 700])
def test_equals_integer_weights(total: int) -> None:
    """At every n, whether taken directly or between nodes."""
    gold = torch.randint(-1000, 1000, (total,))
    proxy = torch.randperm(total)
    by_proxy = gold[proxy.argsort()].tolist()
    got = best_of_n_curve(gold.double(), proxy.float())
    every = range(1, total + 1) if total < 200 else [1, 2, 31, 32, 47, 64, 65, 100, 333, 699, 700]
    for n in every:
        assert float(got[n - 1]) == pytest.approx(float(exact(by_proxy, n)), abs=2e-11), n


def test_equals_integer_weights_at_12600_samples() -> None:
    gold = torch.randint(-1000, 1000, (12_600,))
    got = best_of_n_curve(gold.double(), torch.arange(12_600.0))
    for n in (2, 40, 1000, 9999, 12_599):
        assert float(got[n - 1]) == pytest.approx(float(exact(gold.tolist(), n)), abs=2e-11), n


@pytest.mark.parametrize("total", [1000, 1024, 1500])
@pytest.mark.parametrize("above", [0, 1, 30, 300])
def test_weight_of_a_single_sample(above: int, total: int) -> None:
    """w_n(N - j) = C(N - j - 1, n - 1) / C(N, n), whether through nodes or not."""
    gold = torch.zeros(total).double()
    gold[total - 1 - above] = 1.0
    got = best_of_n_curve(gold, torch.arange(float(total)))
    weight = Fraction(1, total)
    want = []
    for n in range(1, total + 1):
        want.append(float(weight))
        # C(M, n) / C(M, n - 1) = (M - n + 1) / n, with M = N - j - 1 above and N below
        weight *= Fraction((total - above - n) * (n + 1), n * (total - n) or 1)
    assert float((got - torch.tensor(want, dtype=torch.float64)).abs().max()) < 1e-14


@pytest.mark.parametrize(
    "proxy", [(1, 1, 2, 0, 2, 2), (3, 3, 3, 3, 3, 3), (0, 5, 5, 1, 4, 2)], ids=str
)
def test_ties_are_all_sets_written_out(proxy: tuple[int, ...]) -> None:
    """Every set of n; of its samples with the highest proxy the mean gold."""
    gold = (4.0, -1.0, 2.5, 8.0, 0.0, 1.0)
    got = best_of_n_curve(torch.tensor(gold), torch.tensor(proxy).float())
    for n in range(1, 7):
        means = []
        for chosen in itertools.combinations(range(6), n):
            top = max(proxy[i] for i in chosen)
            tied = [gold[i] for i in chosen if proxy[i] == top]
            means.append(sum(tied) / len(tied))
        assert float(got[n - 1]) == pytest.approx(sum(means) / len(means), abs=1e-14)


def test_prompts_are_independent() -> None:
    """[P, N] is each row by itself; a tie does not reach into the next row."""
    gold, proxy = torch.randn(3, 90), torch.randint(0, 8, (3, 90)).float()
    proxy[:, 0] = 3.0
    got = best_of_n_curve(gold, proxy)
    for row in range(3):
        alone = best_of_n_curve(gold[row], proxy[row])
        assert float((got[row] - alone).abs().max()) < 1e-14
    # The lowest of the first row and the highest of the second are no tie.
    gold, proxy = torch.tensor([[0.0, 10.0], [4.0, 6.0]]), torch.tensor([[2.0, 1.0], [1.0, 0.0]])
    assert best_of_n_curve(gold, proxy).tolist() == [[5.0, 0.0], [5.0, 4.0]]
    same, proxy = torch.full((2, 40), 7.0), torch.rand(2, 40)
    assert torch.equal(best_of_n_curve(same, proxy), same.double())


def test_is_unbiased() -> None:
    """Mean over 4000 samples of size 40 from a small alphabet with ties against the exact pmf."""
    base = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
    proxy = torch.tensor([0.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    gold = torch.tensor([1.0, -3.0, 2.0, 5.0], dtype=torch.float64)
    drawn = torch.multinomial(base, 4000 * 40, replacement=True).reshape(4000, 40)
    curves = best_of_n_curve(gold[drawn], proxy[drawn])
    mean, se = curves.mean(0), curves.std(0) / math.sqrt(4000)
    for n in (1, 2, 5, 20, 33, 40):
        want = float(best_of_n(base, proxy, n) @ gold)
        assert abs(float(mean[n - 1]) - want) < 4 * float(se[n - 1])


def test_large_offset_and_scale() -> None:
    """An offset of the gold only moves the curve; of the proxy only the order matters."""
    gold, proxy = torch.randn(100).double(), torch.randn(100).double()
    curve = best_of_n_curve(gold, proxy)
    assert float((best_of_n_curve(gold + 1e6, proxy) - 1e6 - curve).abs().max()) < 1e-8
    assert torch.equal(best_of_n_curve(gold, 1e300 * proxy), curve)
    views = best_of_n_curve(gold.repeat_interleave(2)[::2], proxy)
    assert torch.equal(views, curve)


@pytest.mark.parametrize(
    "gold, proxy, message",
    [
        (torch.ones(3), torch.ones(4), r"expected proxy of gold's shape, \(3,\), got \(4,\)"),
        (
            torch.ones(0),
            torch.ones(0),
            r"expected gold as a float tensor \[N\] or \[P, N\], not empty",
        ),
        (torch.ones(2, 2, 2), torch.ones(2, 2, 2), r"got shape \(2, 2, 2\)"),
        (torch.tensor([1.0, math.nan]), torch.ones(2), r"expected finite gold, got nan at \[1\]"),
        (torch.ones(2), torch.tensor([math.inf, 0]), r"expected finite proxy, got inf at \[0\]"),
        (torch.ones(2).long(), torch.ones(2), "expected gold as a float tensor.*torch.int64"),
    ],
)
def test_bad_input(gold: Tensor, proxy: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"best_of_n_curve: .*{message}|{message}"):
        best_of_n_curve(gold, proxy)
