"""Generalised advantage estimation as a reverse scan: one program per sequence, from the end.

Each kept token maps the advantage after it to its own, A -> delta + gamma lam A, and a dropped one
leaves it as it is. These affine maps compose associatively, so a block of tokens is one scan, and
two numbers are carried between blocks: the advantage and the value of the next kept token. Rewards,
values and mask are read once (their neighbours come from the cache), advantages and returns are
written once.

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
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _first(x, BLOCK: tl.constexpr):
    """The first element of a block."""
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
def _rates_and_end(
    rates_ptr, bootstrap_ptr, row, gamma, lam, PER_ROW: tl.constexpr, HAS_BOOTSTRAP: tl.constexpr
):
    """gamma, lam and the value after the last token of a sequence."""
    if PER_ROW:
        gamma = tl.load(rates_ptr + 2 * row)
        lam = tl.load(rates_ptr + 2 * row + 1)
    last = 0.0
    if HAS_BOOTSTRAP:
        last = tl.load(bootstrap_ptr + row)
    return gamma, lam, last


@triton.jit
def _is_kept(mask_ptr, t, inside, HAS_MASK: tl.constexpr):
    kept = inside
    if HAS_MASK:
        kept = inside & (tl.load(mask_ptr + t, mask=inside, other=0) != 0)
    return kept


@triton.jit
def _value_from(values_ptr, mask_ptr, t, length, last, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The value of the first kept token at or after t, `last` if there is none."""
    value = last
    if HAS_MASK:
        searching = t < length
        while searching:
            at = t + tl.arange(0, BLOCK)
            kept = _is_kept(mask_ptr, at, at < length, HAS_MASK)
            first = tl.min(tl.where(kept, at, length), 0)
            value = tl.load(values_ptr + first, mask=first < length, other=0.0).to(tl.float32)
            value = tl.where(first < length, value, last)
            t += BLOCK
            searching = (first == length) & (t < length)
    return value


@triton.jit
def _deltas(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    t,
    end,
    length,
    next_value,
    last,
    gamma,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a block of tokens t < end: (kept, value, delta, value of the first kept one or after)."""
    kept = _is_kept(mask_ptr, t, t < end, HAS_MASK)
    reward = tl.load(rewards_ptr + t, mask=kept, other=0.0).to(tl.float32)
    value = tl.load(values_ptr + t, mask=kept, other=0.0).to(tl.float32)
    if HAS_MASK:
        # Position t looks at token t + 1: the scan ends in the next kept token and needs no shift.
        following = _is_kept(mask_ptr, t + 1, t + 1 < end, HAS_MASK)
        following = following & (tl.arange(0, BLOCK) < BLOCK - 1)
        at = tl.associative_scan(tl.where(following, t + 1, end), 0, _smaller, reverse=True)
        after = tl.load(values_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        after = tl.where(at < end, after, next_value)
        next_value = _first(tl.where(kept, value, after), BLOCK)
    else:
        after = tl.load(values_ptr + t + 1, mask=t + 1 < length, other=0.0).to(tl.float32)
        after = tl.where(t + 1 < length, after, last)
    delta = reward + gamma * after - value
    return kept, value, delta, next_value


@triton.jit(**GENERIC)
def _gae_chunk_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    bootstrap_ptr,
    rates_ptr,
    scales_ptr,  # [rows, n_chunks] float32, as the shifts
    shifts_ptr,
    n_steps,
    n_chunks,
    gamma,
    lam,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    PER_ROW: tl.constexpr,
    CHUNK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    begin, length = _sequence(cu_seqlens_ptr, n_steps, row, PACKED)
    gamma, lam, last = _rates_and_end(
        rates_ptr, bootstrap_ptr, row, gamma, lam, PER_ROW, HAS_BOOTSTRAP
    )
    rewards_ptr += begin
    values_ptr += begin
    mask_ptr += begin
    start = chunk * CHUNK_T
    end = tl.minimum(start + CHUNK_T, length)
    next_value = _value_from(values_ptr, mask_ptr, end, length, last, HAS_MASK, BLOCK)
    total_scale = 1.0
    total_shift = 0.0
    n_blocks = tl.cdiv(tl.maximum(end - start, 0), BLOCK)
    for block in range(n_blocks):
        t = start + (n_blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        kept, _, delta, next_value = _deltas(
            rewards_ptr, values_ptr, mask_ptr, t, end, length, next_value, last, gamma,
            HAS_MASK, BLOCK,
        )  # fmt: skip
        scale = tl.where(kept, gamma * lam, 1.0)
        shift = tl.where(kept, delta, 0.0)
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
    CHUNK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_MAPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, length = _sequence(cu_seqlens_ptr, n_steps, row, PACKED)
    gamma, lam, last = _rates_and_end(
        rates_ptr, bootstrap_ptr, row, gamma, lam, PER_ROW, HAS_BOOTSTRAP
    )
    rewards_ptr += begin
    values_ptr += begin
    mask_ptr += begin
    advantages_ptr += begin
    returns_ptr += begin
    start = 0
    end = length
    next_value = last
    carry = 0.0
    if SPLIT:
        chunk = tl.program_id(1)
        start = chunk * CHUNK_T
        end = tl.minimum(start + CHUNK_T, length)
        next_value = _value_from(values_ptr, mask_ptr, end, length, last, HAS_MASK, BLOCK)
        n_later = n_chunks - 1 - chunk
        n_blocks = tl.cdiv(n_later, BLOCK_MAPS)
        for block in range(n_blocks):
            later = (n_blocks - 1 - block) * BLOCK_MAPS + tl.arange(0, BLOCK_MAPS)
            at = row * n_chunks + chunk + 1 + later
            scale = tl.load(scales_ptr + at, mask=later < n_later, other=1.0)
            shift = tl.load(shifts_ptr + at, mask=later < n_later, other=0.0)
            scale, shift = tl.associative_scan((scale, shift), 0, _compose, reverse=True)
            carry = _first(scale, BLOCK_MAPS) * carry + _first(shift, BLOCK_MAPS)

    n_blocks = tl.cdiv(tl.maximum(end - start, 0), BLOCK)
    for block in range(n_blocks):
        t = start + (n_blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        kept, value, delta, next_value = _deltas(
            rewards_ptr, values_ptr, mask_ptr, t, end, length, next_value, last, gamma,
            HAS_MASK, BLOCK,
        )  # fmt: skip
        scale = tl.where(kept, gamma * lam, 1.0)
        shift = tl.where(kept, delta, 0.0)
        scale, shift = tl.associative_scan((scale, shift), 0, _compose, reverse=True)
        advantage = scale * carry + shift
        carry = _first(advantage, BLOCK)
        tl.store(advantages_ptr + t, tl.where(kept, advantage, 0.0), mask=t < end)
        tl.store(returns_ptr + t, tl.where(kept, advantage + value, 0.0), mask=t < end)


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
    # Without a look at the offsets, which would wait for the GPU, a packed sequence may be all.
    longest = rewards.shape[-1]
    split = n_rows < SPLIT_BELOW and rewards.numel() > n_rows * CHUNK
    n_chunks = triton.cdiv(longest, CHUNK) if split else 1
    scales, shifts = rewards.new_empty((2, n_rows, n_chunks), dtype=torch.float32).unbind()

    # Absent tensors need some pointer; the constexpr flags keep it from being read.
    optional = [None if x is None else x.contiguous() for x in (mask, cu_seqlens, bootstrap, rates)]
    pointers = [rewards, values, *(rewards if x is None else x for x in optional), scales, shifts]
    sizes = (longest, n_chunks, gamma, lam)
    features = {
        "HAS_MASK": mask is not None,
        "PACKED": cu_seqlens is not None,
        "HAS_BOOTSTRAP": bootstrap is not None,
        "PER_ROW": rates is not None,
        "CHUNK_T": CHUNK,
        "BLOCK": BLOCK_T,
        "num_warps": 4,
    }
    grid = (n_rows, n_chunks)
    with torch.cuda.device_of(rewards):
        if split:
            _gae_chunk_kernel[grid](*pointers, *sizes, **features)
        _gae_fwd_kernel[grid](
            *pointers,
            advantages,
            returns,
            *sizes,
            **features,
            SPLIT=split,
            BLOCK_MAPS=BLOCK_CHUNKS,
        )
    return advantages, returns
