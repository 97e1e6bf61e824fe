"""Best-of-n over a small alphabet, exact: the one of n draws from the base with the highest reward.

With F(y) = P(r <= r(y)), F_-(y) = P(r < r(y)) and P(class) = F - F_- the mass of all symbols with
the reward of y, ties being broken evenly among the draws,

    pi_n(y) = base(y) / P(class) * (F(y)^n - F_-(y)^n)

F^n is e^(n log1p(-P(r > r(y)))): near the top 1 - F has digits that F has not. n may be real.

    KL(pi_n || base) <= log n - (n - 1) / n             equal for continuous rewards
    win rate         <= n / (n + 1)                     again equal for continuous rewards

and with eps the base's probability of the answer that was chosen, the estimate

    (1 - eps)^n [log n + (n - 1) log(1 - eps) - (n - 1) / n] + a log(a / eps),  a = 1 - (1 - eps)^n

lies between 0 and that bound; it is the KL itself when one symbol of mass eps is on top of a
continuum. That its mean is never under the KL is conjectured.

It knows nothing of ties, which lower the KL: pi_n / base is the same for all answers of one reward,
so that only the classes count. From rewards of N samples, with F and F_- their shares, those that
tie are taken for atoms and the others for a continuum:

    sum over atoms of a log(a / (F - F_-)), a = F^n - F_-^n, + sum over others of G(F) - G(F_-)
    G(u) = u^n [log n + (n - 1) log u - (n - 1) / n]     the integral of n v^(n-1) log(n v^(n-1))

which is the bound, G(1), where no two tie, and 0 where all do.

Source: arXiv 2401.01879, Theorem 3.1 and its estimator; arXiv 2404.01730, Table 1. Tests:
tests/test_theory_best_of_n.py. All orders from samples: fastalign/theory/curve.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.theory.checks import (
    FLOAT_DTYPES,
    distribution,
    number,
    on_support,
    same_length,
    samples,
)

# log(1 - e^-y) is log y to the last digit from here on down.
LOG_EPS = -37.0


def log_best_of_n(log_base: Tensor, rank: Tensor, n: float) -> Tensor:
    """log pi_n [S] from log base [S], and the rank [S] of each symbol's reward.

    Args:
        rank: int64, 0 for the lowest reward, equal for equal rewards, no number left out.
    """
    n_classes = int(rank.max()) + 1
    top = log_base.new_full((n_classes,), -math.inf).scatter_reduce(0, rank, log_base, "amax")
    mass = torch.zeros_like(top).index_add(0, rank, (log_base - top[rank]).exp())
    log_class = top + mass.log()
    log_up_to = log_class.logcumsumexp(0)
    log_from = log_class.flip(0).logcumsumexp(0).flip(0)
    log_above = torch.cat([log_from[1:], log_from.new_full((1,), -math.inf)])
    log_f = torch.where(log_above < -math.log(2), torch.log1p(-log_above.exp()), log_up_to)
    # F^n - F_-^n = F^n (1 - (1 - share)^n) with share = P(class) / F, which may underflow.
    log_share = (log_class - log_up_to).clamp(max=0.0)
    log_y = math.log(n) + torch.where(
        log_share < LOG_EPS, log_share, (-torch.log1p(-log_share.exp())).log()
    )
    log_hit = torch.where(log_y < LOG_EPS, log_y, (-torch.expm1(-log_y.exp())).log())
    return log_base - log_class[rank] + (n * log_f + log_hit)[rank]


def best_of_n(base: Tensor, reward: Tensor, n: float) -> Tensor:
    """pi_n [K] float64, by the formula in this module's docstring.

    Rewards tie when they are equal as floats.

    Args:
        base: [K] float64, a distribution; where it is 0, so is the result.
        reward: [K], any float dtype, finite where the base has mass.
        n: a real number >= 1.

    Raises:
        ValueError: inputs that are not as above.
    """
    op = "best_of_n"
    base = distribution(op, "base", base)
    reward = on_support(op, "reward", reward, base)
    n = number(op, "n", n, 1.0)
    kept = base > 0
    rank = torch.unique(reward[kept], return_inverse=True)[1]
    out = torch.zeros_like(base)
    out[kept] = log_best_of_n(base[kept].log(), rank, n).exp()
    return out


def best_of_n_kl_bound(n: float) -> float:
    """log n - (n - 1) / n, in nats: KL(pi_n || base) is at most this, for every base and reward.

    Raises:
        ValueError: n < 1, or not finite.
    """
    n = number("best_of_n_kl_bound", "n", n, 1.0)
    return math.log(n) - (n - 1.0) / n


def n_for_kl(kl: float) -> int:
    """The largest n whose bound log n - (n - 1) / n is at most ``kl`` nats.

    Raises:
        ValueError: a KL that is negative or over 30 (n over 10^13).
    """
    op = "n_for_kl"
    kl = number(op, "kl", kl, 0.0)
    if kl > 30:
        raise ValueError(f"{op}: expected a KL of at most 30 nats, got {kl}")
    # With x = log n the bound is x - 1 + e^-x: between x - 1 and x.
    low, high = max(1, math.floor(math.exp(kl))), math.floor(math.exp(kl + 1.0)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if best_of_n_kl_bound(middle) <= kl:
            low = middle
        else:
            high = middle
    return low


def best_of_n_kl_estimate(n: float, selected_prob: Tensor) -> Tensor:
    """Estimate of KL(pi_n || base) in nats from each chosen answer; average over the answers.

    Args:
        n: a real number >= 1.
        selected_prob: any shape and float dtype, in [0, 1]: the base's probability of the answer
            that best-of-n chose, e^(sum of its log-probs). 0, where that underflows, is the limit:
            the bound.

    Returns:
        float64 of the same shape, in [0, log n - (n - 1) / n].

    Raises:
        ValueError: inputs that are not as above.
    """
    op = "best_of_n_kl_estimate"
    n = number(op, "n", n, 1.0)
    if not isinstance(selected_prob, Tensor) or selected_prob.dtype not in FLOAT_DTYPES:
        got = getattr(selected_prob, "dtype", type(selected_prob).__name__)
        raise ValueError(f"{op}: expected selected_prob as a float tensor, got {got}")
    eps = selected_prob.double()
    wrong = ~((eps >= 0) & (eps <= 1))
    if wrong.any():
        raise ValueError(f"{op}: expected probabilities in [0, 1], got {float(eps[wrong][0])}")
    log_rest = torch.log1p(-eps)
    rest = (n * log_rest).exp()
    chosen = -torch.expm1(n * log_rest)
    bound = best_of_n_kl_bound(n)
    # 0 * inf is NaN: at eps = 1 the first term is 0, at eps = 0 the second.
    first = torch.where(rest > 0, rest * (bound + (n - 1.0) * log_rest), 0.0)
    second = torch.where(chosen > 0, chosen * (chosen / eps).log(), 0.0)
    return (first + second).clamp(0.0, bound)


def best_of_n_kl_of_ties(n: float, rewards: Tensor) -> Tensor:
    """Estimate of KL(pi_n || base) in nats from rewards that tie, by this module's docstring.

    Args:
        n: a real number >= 1.
        rewards: of samples of the base: [N] for one prompt, [P, N] for P prompts; any float dtype.
            They tie when they are equal as floats.

    Returns:
        float64 [] or [P], in [0, log n - (n - 1) / n].

    Raises:
        ValueError: inputs that are not as above.
    """
    op = "best_of_n_kl_of_ties"
    n = number(op, "n", n, 1.0)
    ordered = samples(op, "rewards", rewards, (1, 2)).sort(-1).values
    total, bound = ordered.shape[-1], best_of_n_kl_bound(n)
    place = torch.arange(total, dtype=torch.float64, device=ordered.device).expand_as(ordered)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[..., 1:] = ordered.diff() > 0
    is_last = torch.ones_like(is_first)
    is_last[..., :-1] = is_first[..., 1:]
    below = place.where(is_first, 0.0).cummax(-1).values
    up_to = (place + 1).where(is_last, float(total)).flip(-1).cummin(-1).values.flip(-1)
    count, f, f_below = up_to - below, up_to / total, below / total

    def integral(u: Tensor) -> Tensor:
        mass = u**n
        return bound * mass + (n - 1.0) * torch.xlogy(mass, u)

    chosen = f**n - f_below**n
    atom = torch.xlogy(chosen, chosen * total / count) / count  # a share for each of its samples
    each = torch.where(count > 1, atom, integral(f) - integral(f_below))
    return each.sum(-1).clamp(0.0, bound)


def win_rate(policy: Tensor, base: Tensor, reward: Tensor) -> float:
    """P(policy's draw has the higher reward than the base's) + half of P(equal rewards).

    Args:
        policy, base: [K] float64, distributions.
        reward: [K], finite where either has mass.

    Raises:
        ValueError: inputs that are not as above.
    """
    op = "win_rate"
    policy, base = distribution(op, "policy", policy), distribution(op, "base", base)
    same_length(op, "policy", policy, base)
    reward = on_support(op, "reward", reward, policy + base)
    kept = (policy + base) > 0
    rank = torch.unique(reward[kept], return_inverse=True)[1]
    zeros = torch.zeros(int(rank.max()) + 1, dtype=torch.float64, device=base.device)
    of_base = zeros.index_add(0, rank, base[kept])
    of_policy = zeros.index_add(0, rank, policy[kept])
    below = torch.cat([zeros[:1], of_base.cumsum(0)[:-1]])
    return float((of_policy * (below + 0.5 * of_base)).sum())
