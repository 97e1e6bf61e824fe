"""Memoryless sources: the paper's Table 1, asymptotics, all strings written out, ties, errors."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fastalign.theory import (
    Memoryless,
    alpha_for_kl,
    best_of_n,
    best_of_n_kl_bound,
    kl_divergence,
    tilt,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


BASE = vector(0.2, 0.3, 0.5)
REWARD = (vector(6, 1, 2) / 9).log()
ALPHA = alpha_for_kl(BASE, REWARD, 0.11)
PHI = tilt(BASE, REWARD, ALPHA)


def test_table_1_of_the_paper() -> None:
    """arXiv 2404.01730, Table 1: m = 2, N = 2, p = (.2, .3, .5), r = (log 6, 0, log 2). The best
    pair, (0, 0), has probability 1/25: 1 - (24/25)^2 = 49/625.
    """
    source = Memoryless(BASE, vector(6, 1, 2).log(), 2)
    policy = source.best_of_n(2)
    table = {
        (0, 0): Fraction(49, 625),
        (0, 1): Fraction(21, 250),
        (0, 2): Fraction(43, 250),
        (1, 1): Fraction(81, 10_000),
        (1, 2): Fraction(9, 125),
        (2, 2): Fraction(103, 400),
    }
    for (first, second), want in table.items():
        for string in {(first, second), (second, first)}:
            got = math.exp(policy.logp(torch.tensor(string)))
            assert got == pytest.approx(float(want), abs=1e-15)
    assert float(policy.letters[0]) == pytest.approx(209 / 625, abs=1e-15)


@pytest.mark.parametrize(
    "m, kl, bound, to_phi, per_letter, gap, distance",
    [
        (10, 0.431549, 0.432871, 0.283095, 0.028310, 0.134183, 0.18361),
        (40, 3.411476, 3.412277, 0.606182, 0.015155, 0.056220, 0.07767),
        (160, 16.599688, 16.600000, 1.192860, 0.007455, 0.019330, 0.02705),
    ],
)
def test_asymptotics(
    m: int, kl: float, bound: float, to_phi: float, per_letter: float, gap: float, distance: float
) -> None:
    """Best of N = e^(.11 m) beside the tilt of KL .11 a letter: KL to base, log N - (N - 1) / N, KL
    to the tilt, the same per letter, the reward per letter that it is short of, L1 distance of the
    mean type. And Lemma 2's identity over strings.
    """
    n = math.exp(0.11 * m)
    source = Memoryless(BASE, REWARD, m)
    best, phi = source.best_of_n(n), source.tilt(ALPHA)
    assert best.kl_to_base == pytest.approx(kl, abs=5.1e-7)
    assert best_of_n_kl_bound(n) == pytest.approx(bound, abs=5.1e-7)
    assert best.kl_to(phi) == pytest.approx(to_phi, abs=5.1e-7)
    assert best.kl_to(phi) / m == pytest.approx(per_letter, abs=5.1e-7)
    assert float(PHI @ REWARD) - best.reward / m == pytest.approx(gap, abs=5.1e-7)
    assert float((best.letters - PHI).abs().sum()) == pytest.approx(distance, abs=5.1e-6)
    assert phi.kl_to_base == pytest.approx(0.11 * m, abs=1e-10)
    assert phi.reward == pytest.approx(m * float(PHI @ REWARD), abs=1e-10)
    identity = best.kl_to_base - phi.kl_to_base + ALPHA * (phi.reward - best.reward)
    assert best.kl_to(phi) == pytest.approx(identity, abs=1e-11)


def test_mean_type_at_m_10_and_n_3() -> None:
    """E[type] = (.297472, .212092, .490436): far from phi, but near the tilt of its own KL, which
    is .043155 a letter: (.31332, .20945, .47722), at an L1 distance of .0315.
    """
    source = Memoryless(BASE, REWARD, 10)
    want = vector(0.297472, 0.212092, 0.490436)
    assert float((source.best_of_n(3).letters - want).abs().max()) < 5.1e-7
    best = source.best_of_n(math.exp(1.1))
    own = best.kl_to_base / 10
    assert own == pytest.approx(0.043155, abs=5.1e-7)
    matched = tilt(BASE, REWARD, alpha_for_kl(BASE, REWARD, own))
    assert float((matched - vector(0.31332, 0.20945, 0.47722)).abs().max()) < 5.1e-6
    assert float((best.letters - matched).abs().sum()) == pytest.approx(0.0315, abs=5.1e-5)


@pytest.mark.parametrize("m, want", [(80, -1.307), (160, -1.345), (320, -1.367)])
def test_kl_to_the_tilt_grows_like_half_log_m(m: int, want: float) -> None:
    """Per letter it vanishes, over strings not; and best-of-N spends a nat less than log N."""
    best = Memoryless(BASE, REWARD, m).best_of_n(math.exp(0.11 * m))
    kl = best.kl_to(best.source.tilt(ALPHA))
    assert kl - 0.5 * math.log(m) == pytest.approx(want, abs=5.1e-4)
    assert best.kl_to_base - 0.11 * m == pytest.approx(-1.0, abs=2e-3)


@pytest.mark.parametrize(
    "base, reward, m",
    [
        ((0.2, 0.3, 0.5), (0.3, -1.0, 0.7), 5),
        ((0.2, 0.3, 0.5), (0.1, 0.2, 0.3), 4),  # ties that are not equal as floats
        ((0.1, 0.4, 0.0, 0.5), (1.0, 1.0, 9.0, 0.0), 3),  # ties, and a letter without mass
        ((0.25, 0.25, 0.25, 0.25), (2.0, 2.0, 2.0, 2.0), 2),
        ((1.0,), (3.0,), 4),
        ((0.3, 0.7), (1.0, 0.0), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2.5, 6])
def test_is_best_of_n_over_all_strings(
    base: tuple[float, ...], reward: tuple[float, ...], m: int, n: float
) -> None:
    """The same from all K^m strings, one by one, their rewards rounded so that ties are ties."""
    letters, values = vector(*base), vector(*reward)
    strings = list(itertools.product(range(len(base)), repeat=m))
    p = vector(*[math.prod(base[y] for y in string) for string in strings])
    r = vector(*[round(sum(reward[y] for y in string), 9) for string in strings])
    source = Memoryless(letters, values, m)
    best, phi = source.best_of_n(n), source.tilt(0.8)
    pi, tilted = best_of_n(p, r, n), tilt(p, r, 0.8)
    for policy, want in ((best, pi), (phi, tilted)):
        got = vector(*[math.exp(policy.logp(torch.tensor(string))) for string in strings])
        assert float((got - want).abs().max()) < 1e-14
        assert policy.kl_to_base == pytest.approx(kl_divergence(want, p), abs=1e-12)
        assert policy.reward == pytest.approx(float(want @ r), abs=1e-8)
    assert best.kl_to(phi) == pytest.approx(kl_divergence(pi, tilted), abs=1e-12)
    assert phi.kl_to(best) == pytest.approx(kl_divergence(tilted, pi), abs=1e-10)


def test_types_are_all_there_once() -> None:
    source = Memoryless(vector(0.1, 0.2, 0.3, 0.4), vector(1, 2, 3, 4), 6)
    assert source.types.shape == (math.comb(9, 3), 4)
    assert bool((source.types.sum(1) == 6).all()) and bool((source.types >= 0).all())
    assert len(torch.unique(source.types, dim=0)) == len(source.types)
    assert float(source.log_strings.exp().sum()) == pytest.approx(4**6)
    assert float(torch.logsumexp(source.log_base, 0)) == pytest.approx(0.0, abs=1e-14)


def test_long_strings() -> None:
    """m = 320: 51,681 types down to e^-515; every mass sums to 1, no KL is inf or NaN."""
    source = Memoryless(BASE, REWARD, 320)
    assert len(source.types) == 51_681
    best, phi = source.best_of_n(math.exp(0.11 * 320)), source.tilt(ALPHA)
    for policy in (best, phi, source.tilt(0.0), source.tilt(math.inf)):
        assert float(torch.logsumexp(policy.log_p, 0)) == pytest.approx(0.0, abs=1e-10)
    assert 34.1 < best.kl_to_base < best_of_n_kl_bound(math.exp(0.11 * 320))
    assert math.isfinite(phi.kl_to(best)) and phi.kl_to(best) > 0
    assert source.tilt(math.inf).reward == pytest.approx(320 * float(REWARD.max()))
    assert best.kl_to(source.tilt(math.inf)) == math.inf
    # e^(1000 gap) is no float, its logarithm is: the identity holds where letters underflow.
    sharp = source.tilt(1000.0)
    right = best.kl_to_base - sharp.kl_to_base + 1000 * (sharp.reward - best.reward)
    assert best.kl_to(sharp) == pytest.approx(right, rel=1e-9)
    with pytest.raises(ValueError, match="Memoryless.tilt: expected a number as alpha, got nan"):
        source.tilt(math.nan)


@pytest.mark.parametrize(
    "base, reward, m, message",
    [
        (BASE, REWARD, 0, "Memoryless: expected m as a whole number >= 1, got 0"),
        (BASE, REWARD, 2.5, "Memoryless: expected m as a whole number >= 1, got 2.5"),
        (BASE, REWARD, math.inf, "Memoryless: expected m as a whole number >= 1, got inf"),
        (BASE, REWARD, math.nan, "Memoryless: expected m as a whole number >= 1, got nan"),
        (2 * BASE, REWARD, 3, "Memoryless: expected base to sum to 1"),
        (BASE, REWARD[:2], 3, r"Memoryless: expected reward of shape \(3,\), got \(2,\)"),
        (
            torch.full((9,), 1 / 9, dtype=torch.float64),
            torch.ones(9),
            99,
            "at most 20,000,000 types, got",
        ),
    ],
)
def test_bad_source(base: Tensor, reward: Tensor, m: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Memoryless(base, reward, m)


def test_bad_use() -> None:
    source = Memoryless(BASE, REWARD, 3)
    with pytest.raises(ValueError, match="Memoryless.best_of_n: expected a finite n >= 1, got 0.0"):
        source.best_of_n(0.0)
    with pytest.raises(ValueError, match="kl_to: expected a policy of the same Memoryless"):
        source.best_of_n(2).kl_to(Memoryless(BASE, REWARD, 4).tilt(1.0))
    for string in (torch.tensor([0, 1]), torch.tensor([0, 1, 3]), torch.tensor([0.0, 1, 2])):
        with pytest.raises(ValueError, match=r"logp: expected int64 letters \[3\] in \[0, 3\)"):
            source.tilt(1.0).logp(string)
