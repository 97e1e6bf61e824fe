"""Lambda-returns and discounted returns over padded rows or packed sequences.

For the tokens t = 1..n of one sequence that the mask keeps, G_{n+1} = V_{n+1} = bootstrap:

    G_t = r_t + gamma * ((1 - lam) * V_{t+1} + lam * G_{t+1})      lambda-returns
    G_t = r_t + gamma * G_{t+1}                                    discounted returns (lam = 1)

G_t - V_t is the advantage of ``gae``, and its kernels do the work: with values of 0 and lam = 1 for
discounted returns, which read nothing but rewards. Tokens that the mask drops are skipped as in
``gae``: their rewards count nowhere and no discount is spent on them.

Source: Sutton and Barto, "Reinforcement Learning: An Introduction", second edition, equation 12.2
in the recursive form of 12.18 and 12.20.

Sibling files: kernels/lambda_returns.py (the scan: kernels/gae.py, csrc/gae.cpp),
tests/test_lambda_returns.py, benchmarks/bench_gae.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.backend import choose, plain
from fastalign.ops.scan_inputs import (
    ScanInputs,
    carry_dtype,
    check_scan,
    checked_offsets,
    inside_rows,
    padded,
    rates_of,
)


def lambda_returns_reference(
    rewards: Tensor,
    values: Tensor | None,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    rates: Tensor | None = None,
) -> Tensor:
    """The formulas above in plain PyTorch; without values, discounted returns (lam is not used)."""
    if cu_seqlens is not None:
        inside = inside_rows(cu_seqlens)
        kept = inside if mask is None else padded(mask, inside)
        rows = (padded(rewards, inside), None if values is None else padded(values, inside))
        found = lambda_returns_reference(*rows, gamma, lam, kept, None, bootstrap, rates)
        return found[inside]
    carry = carry_dtype(rewards.dtype)
    rewards = rewards.to(carry)
    n_rows, n_steps = rewards.shape
    gammas, lams = rates_of(rewards, gamma, lam, rates)
    following = rewards.new_zeros(n_rows) if bootstrap is None else bootstrap.to(carry)
    next_value = following
    kept = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    returns = torch.zeros_like(rewards, memory_format=torch.contiguous_format)
    for t in reversed(range(n_steps)):
        mixed = following
        if values is not None:
            mixed = (1 - lams) * next_value + lams * following
            next_value = torch.where(kept[:, t], values[:, t].to(carry), next_value)
        following = torch.where(kept[:, t], rewards[:, t] + gammas * mixed, following)
        returns[:, t] = following
    return torch.where(kept, returns, torch.zeros_like(returns))


def _computed(
    rewards: Tensor,
    values: Tensor | None,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    rates: Tensor | None,
) -> Tensor:
    """Without values, lam is 1."""
    offsets = checked_offsets("lambda_returns", cu_seqlens, rewards.numel())
    args = (rewards, values, gamma, lam, mask, offsets, bootstrap, rates)
    which = choose("lambda_returns", rewards)
    if which == "triton":
        from fastalign.kernels.lambda_returns import lambda_returns_fwd

        return lambda_returns_fwd(*args)
    if which == "cpp":
        return torch.ops.fastalign_cpp.lambda_returns(*args)
    return lambda_returns_reference(*args)


_lambda_returns = torch.library.custom_op("fastalign::lambda_returns", _computed, mutates_args=())


@_lambda_returns.register_fake
def _(
    rewards: Tensor,
    values: Tensor | None,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    rates: Tensor | None,
) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=carry_dtype(rewards.dtype))


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """Lambda-returns of every token: the second result of ``gae``, without writing the first.

    Args: as those of ``gae``.

    Returns:
        The shape of ``rewards``, contiguous; float32, or float64 for float64 input. No gradient.

    Raises:
        ValueError: a shape, dtype, device, rate or offset that does not fit.
    """
    op = "lambda_returns"
    inputs = check_scan(op, rewards, values, gamma, lam, mask, cu_seqlens, bootstrap)
    return (_computed if plain(rewards) else _lambda_returns)(*inputs)


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """Discounted sums of the rewards from every token on ("rewards to go" for gamma = 1).

    Args: as those of ``gae``.

    Returns:
        The shape of ``rewards``, contiguous; float32, or float64 for float64 input. No gradient.

    Raises:
        ValueError: a shape, dtype, device, rate or offset that does not fit.
    """
    op = "discounted_returns"
    inputs: ScanInputs = check_scan(op, rewards, None, gamma, 1.0, mask, cu_seqlens, bootstrap)
    return (_computed if plain(rewards) else _lambda_returns)(*inputs)
