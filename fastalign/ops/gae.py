"""Generalised advantage estimation over padded rows or packed sequences.

For the tokens t = 1..n of one sequence that the mask keeps, V_{n+1} = bootstrap and A_{n+1} = 0:

    delta_t = r_t + gamma * V_{t+1} - V_t
    A_t     = delta_t + gamma * lam * A_{t+1}
    R_t     = A_t + V_t

A token that the mask drops does not exist for this recursion: the kept tokens before it see the
value of the next kept token, its reward counts nowhere, no decay is spent on it, and its outputs
are 0. So tokens of a dialogue that are not the policy's own (a tool's output, another speaker) are
skipped, and what follows them is credited to what came before.

The statistics for whitening are those of all kept advantages of the call:

    count,   mean = sum A / count,   var = sum (A - mean)^2 / (count - 1)      (0 for count < 2)

Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
Estimation", arXiv 1506.02438, equations 11 and 16.

Sibling files: csrc/gae.cpp, kernels/gae.py, tests/test_gae.py, benchmarks/bench_gae.py. The other
scans of the same kernels: lambda_returns.py, vtrace.py.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastalign.backend import choose, plain
from fastalign.ops.scan_inputs import (
    carry_dtype,
    check_scan,
    checked_offsets,
    inside_rows,
    padded,
    rates_of,
)


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    rates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula above in plain PyTorch: a loop over time, all rows at once."""
    if cu_seqlens is not None:
        inside = inside_rows(cu_seqlens)
        kept = inside if mask is None else padded(mask, inside)
        rows = (padded(rewards, inside), padded(values, inside))
        advantages, returns = gae_reference(*rows, gamma, lam, kept, None, bootstrap, rates)
        return advantages[inside], returns[inside]
    carry = carry_dtype(rewards.dtype)
    rewards, values = rewards.to(carry), values.to(carry)
    n_rows, n_steps = rewards.shape
    gammas, lams = rates_of(rewards, gamma, lam, rates)
    next_value = rewards.new_zeros(n_rows) if bootstrap is None else bootstrap.to(carry)
    advantage = rewards.new_zeros(n_rows)
    kept = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    advantages = torch.zeros_like(rewards, memory_format=torch.contiguous_format)
    for t in reversed(range(n_steps)):
        delta = rewards[:, t] + gammas * next_value - values[:, t]
        advantage = torch.where(kept[:, t], delta + gammas * lams * advantage, advantage)
        next_value = torch.where(kept[:, t], values[:, t], next_value)
        advantages[:, t] = advantage
    zero = torch.zeros_like(advantages)
    return torch.where(kept, advantages, zero), torch.where(kept, advantages + values, zero)


def statistics_reference(advantages: Tensor, mask: Tensor | None) -> Tensor:
    """count, mean and variance [3], float64, by the formula above."""
    kept = (advantages if mask is None else advantages[mask]).double()
    count = kept.new_full((), kept.numel())
    mean = kept.sum() / count.clamp(min=1)
    variance = (kept - mean).square().sum() / (count - 1).clamp(min=1)
    return torch.stack([count, mean, variance])


def _computed(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    rates: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """advantages, returns and, of float64 [3] or [0], the statistics."""
    offsets = checked_offsets("gae", cu_seqlens, rewards.numel())
    args = (rewards, values, gamma, lam, mask, offsets, bootstrap, rates)
    which = choose("gae", rewards)
    if which == "triton":
        from fastalign.kernels.gae import gae_fwd

        return gae_fwd(*args, statistics)
    if which == "cpp":
        return torch.ops.fastalign_cpp.gae(*args, statistics)
    advantages, returns = gae_reference(*args)
    none = advantages.new_empty(0, dtype=torch.float64)
    return advantages, returns, statistics_reference(advantages, mask) if statistics else none


_gae = torch.library.custom_op("fastalign::gae", _computed, mutates_args=())


@_gae.register_fake
def _(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    rates: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    advantages = rewards.new_empty(rewards.shape, dtype=carry_dtype(rewards.dtype))
    stats = rewards.new_empty(3 if statistics else 0, dtype=torch.float64)
    return advantages, torch.empty_like(advantages), stats


@overload
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = ...,
    lam: float | Tensor = ...,
    mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    bootstrap: Tensor | None = ...,
    return_statistics: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = ...,
    lam: float | Tensor = ...,
    mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    bootstrap: Tensor | None = ...,
    return_statistics: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = ...,
    lam: float | Tensor = ...,
    mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    bootstrap: Tensor | None = ...,
    return_statistics: bool,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]: ...
def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    return_statistics: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Advantages and returns of every token, by the recursion in this module's docstring.

    The result is a constant of the training step: inputs are detached and no gradient flows.

    Args:
        rewards: [B, T], or packed [N] with ``cu_seqlens``. bfloat16, float16, float32 or float64;
            any strides.
        values: same shape, the value of the state in which the token was chosen.
        gamma: discount in [0, 1]: a float, or one per sequence, [B] or [S] (the content of a tensor
            is not checked).
        lam: the decay of the eligibility trace in [0, 1], likewise.
        mask: same shape, bool or integer, True (nonzero) where the token is the policy's own. The
            others are skipped; what stands in their cells, NaN included, has no effect.
        cu_seqlens: [S + 1], int32 or int64: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1]
            of the packed tensors; starts at 0, ends at N < 2^31. Sequences may be empty. The
            content is checked on CPU only (a check on GPU would wait; FASTALIGN_DEBUG=1 makes it).
        bootstrap: [B] or [S], the value after the last token: 0 (the default) when the response
            ended, the value of the next state when it was cut off.
        return_statistics: also return what whitening needs, taken in the same pass:
            ``whiten(advantages, mask, statistics=statistics)`` reads the advantages once.

    Returns:
        (advantages, returns), contiguous, of the shape of ``rewards``; float32, or float64 for
        float64 input. With ``return_statistics`` (advantages, returns, statistics), the last one
        [3] in float64: count, mean and unbiased variance of the kept advantages.

    Raises:
        ValueError: a shape, dtype, device, rate or offset that does not fit.
    """
    inputs = check_scan("gae", rewards, values, gamma, lam, mask, cu_seqlens, bootstrap)
    call: Any = _computed if plain(rewards) else _gae
    advantages, returns, statistics = call(*inputs, return_statistics)
    return (advantages, returns, statistics) if return_statistics else (advantages, returns)
