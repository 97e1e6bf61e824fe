"""Generalised advantage estimation as a reverse scan: one program per sequence, from the end.

A kept token maps the discounted continuation w = gamma (V + lam A) of what follows it to its own,
w -> gamma ((1 - lam) V + lam r) + gamma lam w, and a dropped token leaves w as it is. These affine
maps compose associatively, and the advantage is r - V + w(next). Rewards, values and mask are read
once (their shifted twins come from the cache), advantages and returns are written once, and one
number is carried between blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _compose(scale_late, shift_late, scale_early, shift_early):
    return scale_early * scale_late, scale_early * shift_late + shift_early


@triton.jit(do_not_specialize=["n_steps"])
def _gae_fwd_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    bootstrap_ptr,
    rates_ptr,
    advantages_ptr,
    returns_ptr,
    n_steps,
    gamma,
    lam,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PACKED:
        begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + row + 1) - begin).to(tl.int32)
    else:
        begin = row * n_steps
        length = n_steps
    if PER_ROW:
        gamma = tl.load(rates_ptr + 2 * row)
        lam = tl.load(rates_ptr + 2 * row + 1)
    carry = 0.0
    if HAS_BOOTSTRAP:
        carry = gamma * tl.load(bootstrap_ptr + row)

    rewards_ptr += begin
    values_ptr += begin
    mask_ptr += begin
    advantages_ptr += begin
    returns_ptr += begin
    n_blocks = tl.cdiv(length, BLOCK_T)
    for block in range(n_blocks):
        t = (n_blocks - 1 - block) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = t < length
        kept = inside
        follows = t + 1 < length
        next_kept = follows
        if HAS_MASK:
            kept = inside & (tl.load(mask_ptr + t, mask=inside, other=0) != 0)
            next_kept = follows & (tl.load(mask_ptr + t + 1, mask=follows, other=0) != 0)
        reward = tl.load(rewards_ptr + t, mask=kept, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + t, mask=kept, other=0.0).to(tl.float32)
        next_reward = tl.load(rewards_ptr + t + 1, mask=next_kept, other=0.0).to(tl.float32)
        next_value = tl.load(values_ptr + t + 1, mask=next_kept, other=0.0).to(tl.float32)

        # Position t holds the map of token t + 1, so the scan ends in w(next) and needs no shift.
        scale = tl.where(next_kept, gamma * lam, 1.0)
        shift = tl.where(next_kept, gamma * (next_value + lam * (next_reward - next_value)), 0.0)
        scale, shift = tl.associative_scan((scale, shift), 0, _compose, reverse=True)
        continuation = scale * carry + shift
        carry = tl.sum(tl.where(tl.arange(0, BLOCK_T) == 0, continuation, 0.0), 0)

        advantage = tl.where(kept, reward - value + continuation, 0.0)
        tl.store(advantages_ptr + t, advantage, mask=inside)
        tl.store(returns_ptr + t, advantage + value, mask=inside)


def gae_fwd(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    rates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, float32 and contiguous; arguments as in the op ``fastalign::gae``."""
    rewards, values = rewards.contiguous(), values.contiguous()
    advantages = torch.empty_like(rewards, dtype=torch.float32)
    returns = torch.empty_like(advantages)
    if rewards.numel() == 0:
        return advantages, returns
    n_rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    optional = [None if x is None else x.contiguous() for x in (mask, cu_seqlens, bootstrap, rates)]
    # Absent tensors need some pointer; the constexpr flags keep it from being read.
    pointers = [rewards if x is None else x for x in optional]
    _gae_fwd_kernel[(n_rows,)](
        rewards,
        values,
        *pointers,
        advantages,
        returns,
        rewards.shape[1] if cu_seqlens is None else 0,
        gamma,
        lam,
        HAS_MASK=mask is not None,
        PACKED=cu_seqlens is not None,
        HAS_BOOTSTRAP=bootstrap is not None,
        PER_ROW=rates is not None,
        BLOCK_T=1024,
        num_warps=4,
    )
    return advantages, returns
