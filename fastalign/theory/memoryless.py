"""Memoryless sources, exact by the method of types: strings of m letters drawn independently.

The probability of a string and its reward, the sum of its letters' rewards, depend only on its
type: how often each letter occurs. With c = (c_1, .., c_K), sum m,

    P(c) = m! / prod_k c_k! * prod_k base_k^c_k         R(c) = sum_k c_k r_k

and there are only C(m + K - 1, K - 1) types, where there are K^m strings: 51,681 for K = 3 and
m = 320. Best-of-n among strings is best-of-n among types (fastalign/theory/best_of_n.py), the tilt
is again memoryless, and since base, tilt and best-of-n are constant on a type, a divergence over
strings is one over types:

    KL(pi || phi) = sum_c pi(c) log(pi(c) / phi(c))

Two types tie when their rewards differ by no more than rounding.

Source: arXiv 2404.01730, Assumptions 1 and 2, Lemma 4, Theorem 2. Tests:
tests/test_theory_memoryless.py. Benchmark: benchmarks/bench_theory.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastalign.theory.best_of_n import log_best_of_n
from fastalign.theory.checks import distribution, number, on_support
from fastalign.theory.tilt import tilted

MOST_TYPES = 20_000_000


@dataclass(frozen=True, eq=False)
class Memoryless:
    """Strings of ``m`` independent letters, with a reward that is the sum of its letters'.

    Args:
        base: [K] float64, the distribution of a letter.
        reward: [K], of a letter; finite where the base has mass.
        m: letters in a string, >= 1.

    Raises:
        ValueError: inputs that are not as above, or more than 20 million types.
    """

    base: Tensor
    reward: Tensor
    m: int

    def __post_init__(self) -> None:
        op = "Memoryless"
        base = distribution(op, "base", self.base)
        object.__setattr__(self, "reward", on_support(op, "reward", self.reward, base))
        if not (math.isfinite(self.m) and int(self.m) == self.m and self.m >= 1):
            raise ValueError(f"{op}: expected m as a whole number >= 1, got {self.m}")
        object.__setattr__(self, "m", int(self.m))
        letters = int((base > 0).sum())
        n_types = math.comb(self.m + letters - 1, letters - 1)
        if n_types > MOST_TYPES:
            raise ValueError(
                f"{op}: expected at most {MOST_TYPES:,} types, "
                f"got {n_types:,} with {letters} letters and m = {self.m}"
            )

    @cached_property
    def types(self) -> Tensor:
        """[types, K] int64: all ways to write m as a sum of K counts, 0 without mass."""
        device = self.base.device
        kept = (self.base > 0).nonzero()[:, 0].tolist()
        left = torch.full((1,), self.m, dtype=torch.int64, device=device)
        columns: list[Tensor] = []
        for _ in kept[:-1]:
            # Each partial type goes on with 0, 1, .., left of the next letter.
            options = left + 1
            starts = options.cumsum(0) - options
            count = torch.arange(int(options.sum()), device=device)
            count = count - starts.repeat_interleave(options)
            columns = [column.repeat_interleave(options) for column in columns]
            left = left.repeat_interleave(options) - count
            columns.append(count)
        columns.append(left)
        types = torch.zeros(len(left), len(self.base), dtype=torch.int64, device=device)
        for letter, column in zip(kept, columns, strict=True):
            types[:, letter] = column
        return types

    @cached_property
    def rewards(self) -> Tensor:
        """[types] R(c)."""
        return self.types.double() @ torch.where(self.base > 0, self.reward, 0.0)

    @cached_property
    def log_strings(self) -> Tensor:
        """[types] log of the number of strings of each type, m! / prod_k c_k!."""
        log_factorial = torch.arange(1, self.m + 2, dtype=torch.float64, device=self.base.device)
        return log_factorial.lgamma()[self.m] - log_factorial.lgamma()[self.types].sum(1)

    @cached_property
    def log_base(self) -> Tensor:
        """[types] log P(c)."""
        return self._log_product(self.base.log())

    @cached_property
    def rank(self) -> Tensor:
        """[types] int64: 0 for the lowest reward, equal for those that tie."""
        values, order = self.rewards.sort()
        largest = float(torch.where(self.base > 0, self.reward, 0.0).abs().max())
        rounding = 4.0 * torch.finfo(torch.float64).eps * self.m * largest
        rank = torch.zeros_like(order)
        rank[order[1:]] = (values.diff() > rounding).cumsum(0)
        return rank

    def _log_product(self, log_letter: Tensor) -> Tensor:
        """[types] log probabilities under independent letters, from [K] a letter's."""
        each = torch.where(self.types > 0, self.types * log_letter, 0.0)  # 0 log 0 is 0
        return self.log_strings + each.sum(1)

    def best_of_n(self, n: float) -> TypePolicy:
        """Best-of-n: of n strings from the base the one with the highest reward.

        Args:
            n: a real number >= 1; ties are broken evenly.

        Raises:
            ValueError: another n.
        """
        n = number("Memoryless.best_of_n", "n", n, 1.0)
        return TypePolicy(self, log_best_of_n(self.log_base, self.rank, n))

    def tilt(self, alpha: float) -> TypePolicy:
        """The tilt by e^(alpha R): independent letters of ``tilt(base, reward, alpha)``.

        Args:
            alpha: any real number, or +-inf.

        Raises:
            ValueError: alpha is NaN.
        """
        if math.isnan(alpha):
            raise ValueError(f"Memoryless.tilt: expected a number as alpha, got {alpha}")
        kept = self.base > 0
        log_letter = torch.full_like(self.base, -math.inf)
        log_letter[kept] = tilted(self.base[kept].log(), self.reward[kept], float(alpha)).log_p
        return TypePolicy(self, self._log_product(log_letter))


@dataclass(frozen=True, eq=False)
class TypePolicy:
    """A distribution over strings that gives all strings of a type the same probability."""

    source: Memoryless
    log_p: Tensor
    """[types] float64: log of the probability of each type, of ``source.types``."""

    @cached_property
    def kl_to_base(self) -> float:
        """KL to the base over strings, nats."""
        return self._kl(self.source.log_base)

    def kl_to(self, other: TypePolicy) -> float:
        """KL to another policy of the same source, over strings, nats; inf where it has no mass.

        Raises:
            ValueError: a policy of another source.
        """
        if other.source is not self.source:
            raise ValueError("TypePolicy.kl_to: expected a policy of the same Memoryless object")
        return self._kl(other.log_p)

    def _kl(self, log_q: Tensor) -> float:
        p = self.log_p.exp()
        return max(0.0, float(torch.where(p > 0, p * (self.log_p - log_q), 0.0).sum()))

    @cached_property
    def reward(self) -> float:
        """Expected reward of a string, the sum over its m letters."""
        return float((self.log_p.exp() * self.source.rewards).sum())

    @cached_property
    def letters(self) -> Tensor:
        """[K] float64: how often each letter occurs, as a share of m, on average.

        Strings of one type are equally probable, so this is also the distribution of the first
        letter.
        """
        return self.log_p.exp() @ self.source.types.double() / self.source.m

    def logp(self, string: Tensor) -> float:
        """log probability of one string, nats.

        Args:
            string: [m] int64, letters in [0, K).

        Raises:
            ValueError: not a string of m letters.
        """
        source = self.source
        if (
            string.shape != (source.m,)
            or string.dtype != torch.int64
            or not ((string >= 0) & (string < len(source.base))).all()
        ):
            raise ValueError(
                f"TypePolicy.logp: expected int64 letters [{source.m}] in [0, {len(source.base)}), "
                f"got shape {tuple(string.shape)}, {string.dtype}"
            )
        counts = torch.bincount(string, minlength=len(source.base))
        place = (source.types == counts).all(1).nonzero()
        if len(place) == 0:  # a letter that the base does not have
            return -math.inf
        return float(self.log_p[place[0, 0]] - source.log_strings[place[0, 0]])
