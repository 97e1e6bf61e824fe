"""Generalised advantage estimation as a reverse scan: one program per sequence, from the end.

A kept token maps the discounted continuation w = gamma (V + lam A) of what follows it to its own,
w -> gamma ((1 - lam) V + lam r) + gamma lam w, and a dropped token leaves w as it is. These affine
maps compose associatively, and the advantage is r - V + w(next). Rewards, values and mask are read
once (their shifted twins come from the cache), advantages and returns are written once, and one
number is carried between blocks.

Few long sequences are split: ``_gae_chunk_kernel`` composes the maps of each chunk, and the main
kernel then treats a chunk as a sequence that begins with the composition of the chunks after it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T = 1024
CHUNK = 4096  # tokens of one program when sequences are split
BLOCK_CHUNKS = 128  # chunks whose maps are composed at once
SPLIT_BELOW = 128  # sequences; from here on they fill a large GPU on their own
# One compilation serves all sizes and alignments: sequences begin anywhere, so an aligned tensor
# gains nothing.
GENERIC = {
    "do_not_specialize": ["n_steps", "n_chunks"],
    "do_not_specialize_on_alignment": [
        "rewards_ptr",
        "values_ptr",
        "mask_ptr",
        "cu_seqlens_ptr",
        "bootstrap_ptr",
        "rates_ptr",
        "scales_ptr",
        "shifts_ptr",
        "advantages_ptr",
        "returns_ptr",
    ],
}


@triton.jit
def _compose(scale_late, shift_late, scale_early, shift_early):
    return scale_early * scale_late, scale_early * shift_late + shift_early


@triton.jit
def _first(x, BLOCK: tl.constexpr):
    """The first element of a block; a masked sum, as the others may be anything but NaN."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == 0, x, 0.0), 0)


@triton.jit
def _sequence(cu_seqlens_ptr, n_steps, row, PACKED: tl.constexpr):
    """Where a sequence begins and how long it is."""
    if PACKED:
        begin = tl.load(cu_seqlens_ptr + row).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + row + 1) - begin).to(tl.int32)
    else:
        begin = row * n_steps
        length = n_steps
    return begin, length


@triton.jit
def _is_kept(mask_ptr, t, inside, HAS_MASK: tl.constexpr):
    kept = inside
    if HAS_MASK:
        kept = inside & (tl.load(mask_ptr + t, mask=inside, other=0) != 0)
    return kept


@triton.jit
def _maps(rewards_ptr, values_ptr, t, kept, gamma, lam):
    """The affine map of each token t, the identity where it is not kept."""
    reward = tl.load(rewards_ptr + t, mask=kept, other=0.0).to(tl.float32)
    value = tl.load(values_ptr + t, mask=kept, other=0.0).to(tl.float32)
    scale = tl.where(kept, gamma * lam, 1.0)
    shift = tl.where(kept, gamma * (value + lam * (reward - value)), 0.0)
    return scale, shift


@triton.jit(**GENERIC)
def _gae_chunk_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    rates_ptr,
    scales_ptr,  # [rows, n_chunks] float32, as the shifts
    shifts_ptr,
    n_steps,
    n_chunks,
    gamma,
    lam,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    PER_ROW: tl.constexpr,
    CHUNK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    begin, length = _sequence(cu_seqlens_ptr, n_steps, row, PACKED)
    if PER_ROW:
        gamma = tl.load(rates_ptr + 2 * row)
        lam = tl.load(rates_ptr + 2 * row + 1)
    begin += chunk.to(tl.int64) * CHUNK_T
    length = tl.minimum(length - chunk * CHUNK_T, CHUNK_T)
    total_scale = 1.0
    total_shift = 0.0
    n_blocks = tl.cdiv(tl.maximum(length, 0), BLOCK)
    for block in range(n_blocks):
        t = (n_blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        kept = _is_kept(mask_ptr + begin, t, t < length, HAS_MASK)
        scale, shift = _maps(rewards_ptr + begin, values_ptr + begin, t, kept, gamma, lam)
        scale, shift = tl.associative_scan((scale, shift), 0, _compose, reverse=True)
        first_scale = _first(scale, BLOCK)
        total_shift = first_scale * total_shift + _first(shift, BLOCK)
        total_scale = first_scale * total_scale
    tl.store(scales_ptr + row * n_chunks + chunk, total_scale)
    tl.store(shifts_ptr + row * n_chunks + chunk, total_shift)


@triton.jit(**GENERIC)
def _gae_fwd_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    bootstrap_ptr,
    rates_ptr,
    scales_ptr,
    shifts_ptr,
    advantages_ptr,
    returns_ptr,
    n_steps,
    n_chunks,
    gamma,
    lam,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    PER_ROW: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_MAPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, length = _sequence(cu_seqlens_ptr, n_steps, row, PACKED)
    if PER_ROW:
        gamma = tl.load(rates_ptr + 2 * row)
        lam = tl.load(rates_ptr + 2 * row + 1)
    carry = 0.0
    if HAS_BOOTSTRAP:
        carry = gamma * tl.load(bootstrap_ptr + row)
    if SPLIT:
        chunk = tl.program_id(1)
        n_later = n_chunks - 1 - chunk
        n_blocks = tl.cdiv(n_later, BLOCK_MAPS)
        for block in range(n_blocks):
            later = (n_blocks - 1 - block) * BLOCK_MAPS + tl.arange(0, BLOCK_MAPS)
            at = row * n_chunks + chunk + 1 + later
            scale = tl.load(scales_ptr + at, mask=later < n_later, other=1.0)
            shift = tl.load(shifts_ptr + at, mask=later < n_later, other=0.0)
            scale, shift = tl.associative_scan((scale, shift), 0, _compose, reverse=True)
            carry = _first(scale, BLOCK_MAPS) * carry + _first(shift, BLOCK_MAPS)
        begin += chunk.to(tl.int64) * CHUNK_T
        length = tl.minimum(length - chunk * CHUNK_T, CHUNK_T)

    rewards_ptr += begin
    values_ptr += begin
    mask_ptr += begin
    n_blocks = tl.cdiv(tl.maximum(length, 0), BLOCK)
    for block in range(n_blocks):
        t = (n_blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        inside = t < length
        # Position t holds the map of token t + 1, so the scan ends in w(next) and needs no shift.
        next_kept = _is_kept(mask_ptr, t + 1, t + 1 < length, HAS_MASK)
        scale, shift = _maps(rewards_ptr, values_ptr, t + 1, next_kept, gamma, lam)
        scale, shift = tl.associative_scan((scale, shift), 0, _compose, reverse=True)
        continuation = scale * carry + shift
        carry = _first(continuation, BLOCK)

        kept = _is_kept(mask_ptr, t, inside, HAS_MASK)
        reward = tl.load(rewards_ptr + t, mask=kept, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + t, mask=kept, other=0.0).to(tl.float32)
        advantage = tl.where(kept, reward - value + continuation, 0.0)
        tl.store(advantages_ptr + begin + t, advantage, mask=inside)
        tl.store(returns_ptr + begin + t, advantage + value, mask=inside)


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
    packed = cu_seqlens is not None
    n_rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # Without a look at the offsets, which would wait for the GPU, a packed sequence may be all.
    longest = rewards.shape[-1]
    split = n_rows < SPLIT_BELOW and rewards.numel() > n_rows * CHUNK
    n_chunks = triton.cdiv(longest, CHUNK) if split else 1

    # Absent tensors need some pointer; the constexpr flags keep it from being read.
    maps = rewards.new_empty((2, n_rows, n_chunks), dtype=torch.float32) if split else None
    scales, shifts = (rewards, rewards) if maps is None else maps.unbind()
    optional = [None if x is None else x.contiguous() for x in (mask, cu_seqlens, bootstrap, rates)]
    mask_, cu_seqlens_, bootstrap_, rates_ = (rewards if x is None else x for x in optional)
    sizes = (longest, n_chunks, gamma, lam)
    features = {
        "HAS_MASK": mask is not None,
        "PACKED": packed,
        "PER_ROW": rates is not None,
        "CHUNK_T": CHUNK,
        "BLOCK": BLOCK_T,
        "num_warps": 4,
    }
    grid = (n_rows, n_chunks)
    if split:
        _gae_chunk_kernel[grid](
            rewards, values, mask_, cu_seqlens_, rates_, scales, shifts, *sizes, **features
        )
    _gae_fwd_kernel[grid](
        rewards,
        values,
        mask_,
        cu_seqlens_,
        bootstrap_,
        rates_,
        scales,
        shifts,
        advantages,
        returns,
        *sizes,
        HAS_BOOTSTRAP=bootstrap is not None,
        SPLIT=split,
        BLOCK_MAPS=BLOCK_CHUNKS,
        **features,
    )
    return advantages, returns
