"""What each method converges to on a known source, exactly.

Over whole strings, with R the reward of a string and z = (R - mean) / std:

    dpo              base e^(R / beta) / Z               of Bradley-Terry labels, P(y > y') =
                                                         sigmoid(R(y) - R(y'))
    rwr              base min(e^(z / beta), cap) / Z
    awr, k rounds    base e^(k R / beta) / Z             each round tilts the policy that sampled
    mle              base, of R > t
    dt               base, of R = what is asked for
    best of n        theory.best_of_n

Online methods are at rest where the expected gradient is 0, which is a condition on every state s
(prompt and letters so far) on its own. Q(s, a) is the return to expect after letter a, under the
policy itself, and c(s) whatever makes the policy sum to 1:

    apa         log pi - log ref = Q / lambda - c        the gradient of the squared residual e is
                                                         E_pi[e grad log pi], 0 when e is constant
                                                         in a: this is how the normaliser comes in
    ppo         log pi - log ref = (Q - kl_coef * KL to come) / kl_coef - c
    grpo, k3    pi = ref / (c - Q / (std kl_coef))       k3's gradient in the loss is that of
                                                         KL(ref || pi)

The baseline V(s) is the same for all letters: it goes into c. PPO's Q pays for the KL of later
letters, so that its rest is the tilt of whole strings, base e^(R / kl_coef) / Z. APA's does not:
its rest is that tilt where the KL to come does not depend on the letter, as in a memoryless
source; in a Markov source it is another policy, near it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastalign.laboratory.source import Source

Step = Callable[[Tensor, Tensor], Tensor]


def conditionals(p: Tensor, k: int) -> list[Tensor]:
    """Of a distribution over K^m strings: for t = 0 .. m - 1, log p(letter | t letters before it)
    as [K^t, K]."""
    found = []
    states = 1
    while states < len(p):
        joint = p.reshape(states, k, -1).sum(2)
        found.append((joint / joint.sum(1, keepdim=True)).log())
        states *= k
    return found


def at_rest(source: Source, base: Tensor, step: Step, kl_coef: float = 0.0) -> Tensor:
    """[K^m] float64: the policy of which every state obeys ``step``, from the last letter back.

    Args:
        source: gives the alphabet and the rewards.
        base: [K^m], a distribution.
        step: (log ref [S, K], Q [S, K]) -> log pi [S, K] at S states.
        kl_coef: weight of the KL to the base, taken from what a state is worth.
    """
    value, policy = source.reward, list[Tensor]()
    for log_ref in reversed(conditionals(base, source.k)):
        q = value.reshape(-1, source.k)
        log_pi = step(log_ref, q)
        value = (log_pi.exp() * (q - kl_coef * (log_pi - log_ref))).sum(1)
        policy.insert(0, log_pi)
    log_p = torch.zeros(1, 1, dtype=torch.float64)
    for log_pi in policy:
        log_p = (log_p.reshape(-1, 1) + log_pi).reshape(-1)
    p = log_p.exp()
    return p / p.sum()


def apa(source: Source, base: Tensor, lambda_: float) -> Tensor:
    """APA's policy at rest, gamma = lam = 1, advantages not whitened."""
    return at_rest(source, base, lambda log_ref, q: (log_ref + q / lambda_).log_softmax(1))


def ppo(source: Source, base: Tensor, kl_coef: float) -> Tensor:
    """PPO's, the KL in the reward by k1."""
    return at_rest(source, base, lambda log_ref, q: (log_ref + q / kl_coef).log_softmax(1), kl_coef)


def grpo(source: Source, base: Tensor, kl_coef: float, group: int) -> Tensor:
    """GRPO's, k3 in the loss, advantages divided by the standard deviation of the group.

    Of n responses the mean takes in the own one, so that advantages are (n - 1) / n as large.
    """
    policy, moved = base, 1.0
    while moved > 1e-14:
        mean = policy @ source.reward
        std = float((policy @ (source.reward - mean).square()).sqrt()) + 1e-4
        scale = (1 - 1 / group) / (std * kl_coef)
        before, step = policy, partial(forward_kl, scale=scale)
        policy = at_rest(source, base, step)
        moved = float((policy - before).abs().max())
    return policy


def forward_kl(log_ref: Tensor, q: Tensor, scale: float) -> Tensor:
    """[S, K] log of the pi that maximises scale E_pi q - KL(ref || pi) at each of S states."""
    q = scale * q
    ref, most = log_ref.exp(), q.amax(1, keepdim=True)
    low, high = torch.zeros_like(most), torch.ones_like(most)
    for _ in range(60):  # sum ref / (most + x - q) falls from infinity at x = 0 to at most 1
        x = (low + high) / 2
        above = (ref / (most + x - q)).sum(1, keepdim=True) > 1
        low, high = torch.where(above, x, low), torch.where(above, high, x)
    return (ref / (most + high - q)).log().log_softmax(1)


def weighted(base: Tensor, weights: Tensor) -> Tensor:
    """base * weights / Z."""
    found = base * weights
    return found / found.sum()


def rwr(source: Source, base: Tensor, beta: float, weight_cap: float) -> Tensor:
    """Reward-weighted regression's, on samples of the base."""
    mean = base @ source.reward
    std = (base @ (source.reward - mean).square()).sqrt()
    return weighted(base, ((source.reward - mean) / (std * beta)).exp().clamp(max=weight_cap))


def filtered(source: Source, base: Tensor, keep: float) -> Tensor:
    """Filtered maximum likelihood's: the base where the reward is above the smallest t that at most
    ``keep`` of its samples are above."""
    above = torch.stack([base[source.reward > t].sum() for t in source.reward])
    threshold = source.reward[above <= keep].min()
    return weighted(base, (source.reward > threshold).double())
