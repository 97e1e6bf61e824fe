"""Best-of-n over small alphabets: vectors, all draws written out, ties, bounds, bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.theory import (
    alpha_for_kl,
    best_of_n,
    best_of_n_kl_bound,
    best_of_n_kl_estimate,
    best_of_n_kl_of_ties,
    kl_divergence,
    kl_to_tilt,
    n_for_kl,
    renyi_cross_entropy,
    tilt,
    win_rate,
)
from fastalign.theory.best_of_n import log_best_of_n


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def uniform(size: int) -> Tensor:
    return torch.full((size,), 1.0 / size, dtype=torch.float64)


def ascending(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float64)


SKEWED = vector(0.9, 0.09, 0.0099, 0.0001)


@pytest.mark.parametrize(
    "base, n, kl, estimate, bound",
    [
        (uniform(10), 2, 0.189318195, 0.193059437, 0.193147181),
        (uniform(10), 4, 0.628825136, 0.634870281, 0.636294361),
        (uniform(2), 2, 0.130812036, 0.179098831, 0.193147181),
        (SKEWED, 10, 0.896869338, 0.940319002, 1.402585093),
        (SKEWED, 100, 3.144649137, 3.157445237, 3.615170186),
    ],
)
def test_vectors(base: Tensor, n: int, kl: float, estimate: float, bound: float) -> None:
    """pi_n = F^n - F_-^n for rewards that differ; the estimate at eps = base(y), averaged over
    pi_n; log n - (n - 1) / n (arXiv 2401.01879, Theorem 3.1 and the estimator). Two symbols, n = 2:
    pi = (1/4, 3/4), KL = 1/4 log(1/2) + 3/4 log(3/2) = .1308.
    """
    pi = best_of_n(base, ascending(len(base)), n)
    assert kl_divergence(pi, base) == pytest.approx(kl, abs=1e-9)
    assert float(best_of_n_kl_estimate(n, base) @ pi) == pytest.approx(estimate, abs=1e-9)
    assert best_of_n_kl_bound(n) == pytest.approx(bound, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "reward", [(0, 1, 2, 3), (1, 0, 1, 1), (2, 2, 5, 0), (7, 7, 7, 7)], ids=str
)
def test_all_draws_written_out(reward: tuple[float, ...], n: int) -> None:
    """Every ordered draw of n symbols, its best ones in equal shares, with its probability."""
    base = vector(0.1, 0.2, 0.3, 0.4)
    want = torch.zeros(4, dtype=torch.float64)
    for draw in itertools.product(range(4), repeat=n):
        top = max(reward[y] for y in draw)
        winners = [y for y in draw if reward[y] == top]
        for y in winners:
            want[y] += math.prod(float(base[x]) for x in draw) / len(winners)
    got = best_of_n(base, vector(*reward), n)
    assert float((got - want).abs().max()) < 1e-14
    assert torch.equal(best_of_n(base, vector(*reward).float(), n), got)


def test_uniform_log_reward_is_a_tilt() -> None:
    """With r = log U, U uniform under the base, best-of-n has the density n u^(n - 1) = n e^((n -
    1) r): the tilt by alpha = n - 1, exactly. Here on 10^5 cells.
    """
    base = uniform(10**5)
    reward = ((ascending(10**5) + 0.5) * 1e-5).log()
    for n in (2, 5, 50):
        pi = best_of_n(base, reward, n)
        assert kl_divergence(pi, tilt(base, reward, n - 1.0)) < 1e-13
        assert alpha_for_kl(base, reward, kl_divergence(pi, base)) == pytest.approx(n - 1, rel=1e-9)


@pytest.mark.parametrize("n, want", [(4, 1.029375373), (16, 1.765991393), (64, 2.343733465)])
def test_expected_maximum_of_normals(n: int, want: float) -> None:
    """E max of n draws from N(0, 1), on cells of width 1e-4."""
    edges = torch.arange(-90_000, 90_001, dtype=torch.float64) * 1e-4
    base = torch.special.ndtr(edges).diff()
    middle = 0.5 * (edges[1:] + edges[:-1])
    assert float(best_of_n(base, middle, n) @ middle) == pytest.approx(want, abs=1e-9)


def test_uniform_reward() -> None:
    """E max of n uniforms is n / (n + 1); it is also the win rate against one more draw."""
    base, middle = uniform(10**5), (ascending(10**5) + 0.5) * 1e-5
    for n in (1, 2, 7, 2.5):
        pi = best_of_n(base, middle, n)
        assert float(pi @ middle) == pytest.approx(n / (n + 1), abs=1e-9)
        assert win_rate(pi, base, middle) == pytest.approx(n / (n + 1), abs=1e-9)


@pytest.mark.parametrize("n, gap", [(2, 0.00924), (4, 0.0040), (8, 0.0008)])
def test_best_win_rate_at_the_kl_of_best_of_n(n: int, gap: float) -> None:
    """The most win rate at a KL has p e^(c U) / Z, U the quantile of the reward (arXiv 2406.00832):
    KL = ((c - 1) e^c + 1) / (e^c - 1) - log((e^c - 1) / c), win = ((c - 1) e^c + 1) / (c (e^c -
    1)). Best-of-n is within .00924 of it at n = 2 (.675907 against 2/3), .0040 at 4, .0008 at 8.
    """
    base, quantile = uniform(10**5), (ascending(10**5) + 0.5) * 1e-5
    c = alpha_for_kl(base, quantile, best_of_n_kl_bound(n))
    kl = ((c - 1) * math.exp(c) + 1) / math.expm1(c) - math.log(math.expm1(c) / c)
    assert kl == pytest.approx(best_of_n_kl_bound(n), abs=1e-9)
    win = win_rate(tilt(base, quantile, c), base, quantile)
    assert win == pytest.approx(((c - 1) * math.exp(c) + 1) / (c * math.expm1(c)), abs=1e-9)
    assert win - n / (n + 1) == pytest.approx(gap, abs=6e-5)
    if n == 2:
        assert win == pytest.approx(0.675907, abs=5e-7)


def test_kl_is_under_its_bounds() -> None:
    """log n - (n - 1) / n - KL lies in [0, 2 n (n - 1) e^(-H_2(p))]; the win rate's gap to n / (n +
    1) is at most (n - 1) / 2 e^(-H_2(p)); e^(-H_2) = sum p^2 (arXiv 2401.01879).
    """
    for size in (2, 10, 300):
        base = torch.randn(size, dtype=torch.float64).softmax(0)
        collision = math.exp(-renyi_cross_entropy(base, base, 2.0))
        assert collision == pytest.approx(float(base.square().sum()))
        for n in (1, 2, 5, 30):
            pi, reward = best_of_n(base, ascending(size), n), ascending(size)
            gap = best_of_n_kl_bound(n) - kl_divergence(pi, base)
            assert -1e-12 <= gap <= 2 * n * (n - 1) * collision + 1e-12
            lost = n / (n + 1) - win_rate(pi, base, reward)
            assert -1e-12 <= lost <= 0.5 * (n - 1) * collision + 1e-12
            assert float(best_of_n_kl_estimate(n, base) @ pi) >= kl_divergence(pi, base) - 1e-12


def test_claim_about_large_alphabets() -> None:
    """arXiv 2404.01730, section 5: at equal KL, best-of-n is within 0.01 nats of the tilt for all n
    up to 1000 when K > 1000. So for K = 20,000 with p and q iid uniform, normalised; not for K =
    1001, where n = 300 is beyond it. (The tilt underflows to 0 where best-of-n does not:
    kl_to_tilt.)
    """

    def largest(size: int, orders: tuple[int, ...]) -> float:
        base, align = torch.rand(2, size, dtype=torch.float64)
        base, align = base / base.sum(), align / align.sum()
        found = []
        for n in orders:
            pi = best_of_n(base, align.log(), n)
            alpha = alpha_for_kl(base, align.log(), kl_divergence(pi, base))
            found.append(kl_to_tilt(pi, base, align.log(), alpha))
        return max(found)

    assert largest(20_000, (3, 30, 300, 1000)) < 0.02
    assert largest(1001, (3,)) < 0.01 < largest(1001, (300,))


def test_extremes() -> None:
    """n so large that only the top is left, mass so small that F^n underflows."""
    reward = ascending(3)
    assert best_of_n(uniform(3), reward, 1e300).tolist() == [0.0, 0.0, 1.0]
    base = vector(1 - 1e-200, 0, 1e-200)
    pi = best_of_n(base, reward, 1e6)
    assert float(pi[2]) == pytest.approx(1e-194, rel=1e-12) and pi[1] == 0
    assert float(best_of_n(base, reward, 1e200)[2]) == pytest.approx(-math.expm1(-1.0))
    low = best_of_n(vector(1e-200, 1 - 1e-200), ascending(2), 2)
    assert float(low[1]) == 1.0 and float(low[0]) == 0.0  # 1e-400
    assert float(best_of_n(vector(1e-100, 1), ascending(2), 2)[0]) == pytest.approx(1e-200)
    tail = vector(0.5, 0.5 - 1e-13, 1e-13)  # 1 - F has digits that F has lost
    assert float(best_of_n(tail, reward, 2)[2]) == pytest.approx(2e-13 - 1e-26, rel=1e-14)
    assert torch.equal(best_of_n(vector(1), vector(3), 7), vector(1))
    base = torch.randn(9, dtype=torch.float64).softmax(0)
    assert float((best_of_n(base, torch.randn(9), 1) - base).abs().max()) < 1e-15


def test_masses_below_the_smallest_float() -> None:
    """In logarithms: a top symbol of mass e^-1000 has n e^-1000, a lowest one e^(-1000 n)."""
    rank = torch.tensor([0, 1])
    top = log_best_of_n(vector(0, -1000), rank, 3)
    assert top.tolist() == pytest.approx([0.0, math.log(3) - 1000], abs=1e-12)
    low = log_best_of_n(vector(-1000, 0), rank, 3)
    assert low.tolist() == pytest.approx([-3000.0, 0.0], abs=1e-12)


def test_symbols_without_mass_never_win() -> None:
    base, reward = vector(0.4, 0, 0.6), vector(1, math.inf, 0)
    assert best_of_n(base, reward, 2)[1] == 0
    assert float(best_of_n(base, reward, 2)[0]) == pytest.approx(1 - 0.36)


def test_estimate_is_exact_for_an_atom_on_a_continuum() -> None:
    """An atom of mass eps has the highest reward, the rest is a continuum (10^5 cells): the KL is
    the estimate at that eps, and it falls from the bound, at 0, to 0 at 1.
    """
    for eps, n in ((0.1, 2), (0.3, 5), (0.001, 40), (0.5, 2.5)):
        base = torch.cat([(1 - eps) * uniform(10**5), vector(eps)])
        kl = kl_divergence(best_of_n(base, ascending(10**5 + 1), n), base)
        assert float(best_of_n_kl_estimate(n, vector(eps))) == pytest.approx(kl, abs=1e-8)
    got = best_of_n_kl_estimate(7, torch.linspace(0, 1, 101).reshape(1, 101))
    assert got.shape == (1, 101) and got.dtype == torch.float64
    assert float(got[0, 0]) == best_of_n_kl_bound(7) and float(got[0, -1]) == 0.0
    assert bool((got.diff() <= 0).all())
    tiny = best_of_n_kl_estimate(7, vector(1e-320, 1e-18))
    assert float((tiny - best_of_n_kl_bound(7)).abs().max()) < 1e-15
    assert best_of_n_kl_estimate(1, vector(0, 0.4, 1)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("n", [1, 2, 7.5, 300])
def test_kl_of_ties_is_exact_for_samples_in_proportion(n: float) -> None:
    """Rewards 0, 1, 5 and 9 in exact proportion are the alphabet itself. Atoms among a continuum,
    10^5 cells: classes of 3 in 10 at the top, of 2 in 10 amid the rest."""
    base, reward = vector(0.4, 0.3, 0.2, 0.1), vector(5, 0, 9, 1)
    rewards = reward.repeat_interleave(torch.tensor([40, 30, 20, 10]))
    kl = kl_divergence(best_of_n(base, reward, n), base)
    both = best_of_n_kl_of_ties(n, torch.stack([rewards.flip(0), torch.full((100,), 2.5).double()]))
    assert both.tolist() == pytest.approx([kl, 0.0], abs=1e-12)
    assert both.shape == (2,) and best_of_n_kl_of_ties(n, rewards.float()).shape == ()
    cells = 10**5
    mixed = torch.arange(cells).double()
    mixed[-3 * cells // 10 :] = cells
    mixed[cells // 5 : 2 * cells // 5] = cells // 5
    values, count = mixed.unique(return_counts=True)
    exact = best_of_n(count / count.sum().double(), values, n)
    want = kl_divergence(exact, count / count.sum().double())
    assert float(best_of_n_kl_of_ties(n, mixed)) == pytest.approx(want, abs=1e-4)
    assert float(best_of_n_kl_of_ties(n, torch.randn(50))) == pytest.approx(best_of_n_kl_bound(n))


def test_n_for_kl_inverts_the_bound() -> None:
    for n in (1, 2, 3, 10, 999, 12_600, 10**9):
        assert n_for_kl(best_of_n_kl_bound(n)) == n
        assert n_for_kl(best_of_n_kl_bound(n + 1) * (1 - 1e-12)) == n
    assert n_for_kl(0.0) == 1
    # log n - 1 + 1/n = 5: n is a little under e^6 = 403.4
    assert n_for_kl(5.0) == 402


def test_win_rate_counts_ties_half() -> None:
    """Rewards (1, 1, 2), policy (.5, 0, .5) against (.2, .3, .5): .5 * .25 + .5 * (.5 + .25)."""
    rewards = vector(1, 1, 2)
    policy, base = vector(0.5, 0, 0.5), vector(0.2, 0.3, 0.5)
    assert win_rate(policy, base, rewards) == pytest.approx(0.5, abs=1e-15)
    assert win_rate(base, base, rewards) == pytest.approx(0.5, abs=1e-15)
    assert win_rate(vector(0, 0, 1), base, rewards) == pytest.approx(0.75, abs=1e-15)


P = vector(0.5, 0.5)
BAD: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (best_of_n, (P, P, 0.5), "best_of_n: expected a finite n >= 1, got 0.5"),
    (best_of_n, (P, P, math.inf), "best_of_n: expected a finite n >= 1, got inf"),
    (best_of_n, (P, vector(0, math.nan), 2), "best_of_n: expected reward to be finite"),
    (best_of_n, (2 * P, P, 2), "best_of_n: expected base to sum to 1, got a sum of 2.0"),
    (best_of_n_kl_bound, (0,), "best_of_n_kl_bound: expected a finite n >= 1, got 0"),
    (best_of_n_kl_bound, (math.nan,), "best_of_n_kl_bound: expected a finite n >= 1, got nan"),
    (n_for_kl, (-0.1,), "n_for_kl: expected a finite kl >= 0, got -0.1"),
    (n_for_kl, (31,), "n_for_kl: expected a KL of at most 30 nats, got 31"),
    (best_of_n_kl_estimate, (2, 0.5), "expected selected_prob as a float tensor, got float"),
    (best_of_n_kl_estimate, (2, vector(0.5, 1.5)), r"expected probabilities in \[0, 1\], got 1.5"),
    (best_of_n_kl_estimate, (2, vector(math.nan)), r"expected probabilities in \[0, 1\], got nan"),
    (best_of_n_kl_of_ties, (0.5, P), "best_of_n_kl_of_ties: expected a finite n >= 1, got 0.5"),
    (best_of_n_kl_of_ties, (2, vector(math.nan)), "expected finite rewards, got nan"),
    (win_rate, (P, vector(1), P), r"win_rate: expected policy of shape \(1,\), got \(2,\)"),
]


@pytest.mark.parametrize("f, arguments, message", BAD)
def test_bad_input(f: Callable[..., Any], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        f(*arguments)
