"""Generalised advantage estimation over padded rows or packed sequences.

For the tokens t = 1..n of one sequence that the mask keeps, V_{n+1} = bootstrap and A_{n+1} = 0:

    delta_t = r_t + gamma * V_{t+1} - V_t
    A_t     = delta_t + gamma * lam * A_{t+1}
    R_t     = A_t + V_t

A token that the mask drops does not exist for this recursion: the kept tokens before it see the
value of the next kept token, its reward counts nowhere, no decay is spent on it, and its outputs
are 0.

Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
Estimation", arXiv 1506.02438, equations 11 and 16.

Sibling files: csrc/gae.cpp, kernels/gae.py, tests/test_gae.py, benchmarks/bench_gae.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.backend import choose

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _carry_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
        return _packed_reference(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap, rates)
    carry = _carry_dtype(rewards.dtype)
    rewards, values = rewards.to(carry), values.to(carry)
    n_rows, n_steps = rewards.shape
    gammas = rewards.new_full((n_rows,), gamma) if rates is None else rates[:, 0].to(carry)
    lams = rewards.new_full((n_rows,), lam) if rates is None else rates[:, 1].to(carry)
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


def _packed_reference(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    bootstrap: Tensor | None,
    rates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    longest = int(lengths.max()) if lengths.numel() else 0
    inside = torch.arange(longest, device=rewards.device) < lengths[:, None]

    def padded(x: Tensor) -> Tensor:
        rows = x.new_zeros(inside.shape)
        rows[inside] = x
        return rows

    kept = inside if mask is None else padded(mask)
    advantages, returns = gae_reference(
        padded(rewards), padded(values), gamma, lam, kept, None, bootstrap, rates
    )
    return advantages[inside], returns[inside]


@torch.library.custom_op("fastalign::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    rates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    which = choose("gae", rewards)
    if which == "triton":
        from fastalign.kernels.gae import gae_fwd

        return gae_fwd(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap, rates)
    if which == "cpp":
        return torch.ops.fastalign_cpp.gae(
            rewards, values, gamma, lam, mask, cu_seqlens, bootstrap, rates
        )
    return gae_reference(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap, rates)


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
) -> tuple[Tensor, Tensor]:
    carry = _carry_dtype(rewards.dtype)
    shape = rewards.shape
    return rewards.new_empty(shape, dtype=carry), rewards.new_empty(shape, dtype=carry)


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every token, by the recursion in this module's docstring.

    The result is a constant of the training step: inputs are detached and no gradient flows.

    Args:
        rewards: [B, T], or packed [N] with ``cu_seqlens``. bfloat16, float16, float32 or float64.
        values: same shape, the value of the state in which the token was chosen.
        gamma: discount in [0, 1]: a float, or one per sequence, [B] or [S] (the content of a tensor
            is not checked).
        lam: the decay of the eligibility trace in [0, 1], likewise.
        mask: same shape, bool or integer, True (nonzero) where the token is the policy's own. The
            others are skipped; what stands in their cells, NaN included, has no effect.
        cu_seqlens: [S + 1], int32 or int64: sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1]
            of the packed tensors; starts at 0, ends at N. The content is checked on CPU only (a
            check on GPU would wait).
        bootstrap: [B] or [S], the value after the last token: 0 (the default) when the response
            ended, the value of the next state when it was cut off.

    Returns:
        (advantages, returns), contiguous, of the shape of ``rewards``; float32, or float64 for
        float64 input.

    Raises:
        ValueError: a shape, dtype, device or offset that does not fit.
    """
    packed = cu_seqlens is not None
    if rewards.dim() != (1 if packed else 2):
        want = "[N] with cu_seqlens" if packed else "[B, T] without cu_seqlens"
        raise ValueError(f"gae: expected rewards {want}, got shape {tuple(rewards.shape)}")
    for name, tensor in (("rewards", rewards), ("values", values)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"gae: expected {name} of a floating dtype, got {tensor.dtype}")
    for name, other in (("values", values), ("mask", mask)):
        if other is not None and other.shape != rewards.shape:
            raise ValueError(
                f"gae: expected {name} of the shape of rewards, {tuple(rewards.shape)}, "
                f"got {tuple(other.shape)}"
            )
    if mask is not None and mask.is_floating_point():
        raise ValueError(f"gae: expected a bool or integer mask, got {mask.dtype}")
    n_rows = rewards.shape[0]
    if cu_seqlens is not None:
        n_rows = _check_offsets(cu_seqlens, rewards.shape[0])
        cu_seqlens = cu_seqlens.to(torch.int32)
    per_row = {"bootstrap": bootstrap, "gamma": gamma, "lam": lam}
    tensors = {"values": values, "mask": mask, "cu_seqlens": cu_seqlens, **per_row}
    for name, maybe in tensors.items():
        if isinstance(maybe, Tensor) and maybe.device != rewards.device:
            raise ValueError(
                f"gae: expected {name} on the device of rewards, {rewards.device}, "
                f"got {maybe.device}"
            )
    for name, row in per_row.items():
        if isinstance(row, Tensor) and row.shape != (n_rows,):
            raise ValueError(
                f"gae: expected {name} of shape ({n_rows},), one per sequence, "
                f"got {tuple(row.shape)}"
            )
    for name, rate in (("gamma", gamma), ("lam", lam)):
        if not isinstance(rate, Tensor) and not 0.0 <= rate <= 1.0:
            raise ValueError(f"gae: expected {name} in [0, 1], got {rate}")
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    carry = _carry_dtype(dtype)
    rates = None
    if isinstance(gamma, Tensor) or isinstance(lam, Tensor):
        one = torch.ones(n_rows, dtype=carry, device=rewards.device)
        rates = torch.stack([(one * rate).to(carry) for rate in (gamma, lam)], dim=1).detach()
        gamma = lam = 1.0
    return _gae(
        rewards.detach().to(dtype),
        values.detach().to(dtype),
        float(gamma),
        float(lam),
        None if mask is None else mask.to(torch.bool),
        cu_seqlens,
        None if bootstrap is None else bootstrap.detach().to(carry),
        rates,
    )


def _check_offsets(cu_seqlens: Tensor, n_tokens: int) -> int:
    """The number of sequences; ValueError when these are no offsets of ``n_tokens`` tokens."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"gae: expected cu_seqlens [S + 1], got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"gae: expected int32 or int64 cu_seqlens, got {cu_seqlens.dtype}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        falls = bool((cu_seqlens.diff() < 0).any())
        if first != 0 or last != n_tokens or falls:
            raise ValueError(
                f"gae: expected cu_seqlens to rise from 0 to N = {n_tokens}, "
                f"got {first} to {last}{', falling in between' if falls else ''}"
            )
    return cu_seqlens.shape[0] - 1
