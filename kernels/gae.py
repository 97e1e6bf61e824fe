"""The scans over time (gae, lambda_returns, vtrace), from the end of each sequence to its start.

Each kept token maps the advantage after it to its own, A -> shift + scale A, and a dropped one
leaves it as it is. These affine maps compose associatively, so a block of tokens is one scan, and
two numbers are carried between blocks: the advantage and the value of the next kept token. Rewards,
values, log-ratios and mask are read once (their neighbours come from the cache), results are
written once.

A program takes one sequence, or BATCH_ROWS short ones. Few long sequences are split:
``_scan_chunk_kernel`` composes the maps of each chunk, and the main kernel then treats a chunk as a
sequence that begins with the composition of the chunks after it. No program waits for another, and
all sums have a fixed order. The maps are formed in scan_inputs.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels.scan_inputs import (
    chunk_of,
    compose,
    compose_with_rest,
    first_column,
    maps_of,
    rates_and_end,
    sequence_of,
    value_from,
)

BLOCK_T = 1024
CHUNK = 4096  # tokens of one program when sequences are split
BLOCK_CHUNKS = 128  # chunks whose maps are composed at once
SPLIT_BELOW = 128  # sequences; from here on they fill a large GPU on their own
BATCH_UPTO = 256  # mean tokens of sequences of which a program takes several
BATCH_ROWS = 16
BATCH_T = 32
BLOCK_PARTS = 1024  # programs whose moments are added up at once
# One compilation serves all sizes and alignments: sequences begin anywhere, so an aligned tensor
# gains nothing.
GENERIC = {
    "do_not_specialize": ["n_rows", "n_steps", "n_chunks", "n_parts"],
    "do_not_specialize_on_alignment": [
        "rewards_ptr",
        "values_ptr",
        "log_ratio_ptr",
        "mask_ptr",
        "cu_seqlens_ptr",
        "bootstrap_ptr",
        "rates_ptr",
        "maps_ptr",
        "advantages_ptr",
        "returns_ptr",
        "parts_ptr",
    ],
}


@triton.jit(**GENERIC)
def _scan_chunk_kernel(
    rewards_ptr, values_ptr, log_ratio_ptr, mask_ptr, cu_seqlens_ptr, bootstrap_ptr, rates_ptr,
    maps_ptr,  # [programs, 2] float32: scale and shift
    n_rows, n_steps, n_chunks, gamma, lam, rho_bar, c_bar, pg_rho_bar,
    HAS_VALUES: tl.constexpr, HAS_RATIO: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr, PER_ROW: tl.constexpr,
    CHUNK_T: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
):  # fmt: skip
    row, chunk = chunk_of(
        cu_seqlens_ptr, n_rows, n_steps, n_chunks, PACKED, CHUNK_T, BLOCK_SEQUENCES
    )
    begin, length = sequence_of(cu_seqlens_ptr, n_steps, row, True, PACKED)
    gamma, lam, last = rates_and_end(
        rates_ptr, bootstrap_ptr, row, True, gamma, lam, PER_ROW, HAS_BOOTSTRAP
    )
    columns = tl.arange(0, BLOCK)[None, :]
    start = chunk * CHUNK_T
    end = tl.minimum(start + CHUNK_T, length)
    if (chunk > 0) & (start < length):  # nobody asks for the map of the first chunk
        next_value = value_from(
            values_ptr, mask_ptr, begin, end, length, last, HAS_VALUES, HAS_MASK, BLOCK
        )
        next_value = tl.zeros([1, 1], tl.float32) + next_value
        total_scale = tl.full([1, 1], 1.0, tl.float32)
        total_shift = tl.zeros([1, 1], tl.float32)
        n_blocks = tl.cdiv(end - start, BLOCK)
        for block in range(n_blocks):
            t = start + (n_blocks - 1 - block) * BLOCK + columns
            _, _, _, _, scale, shift, next_value = maps_of(
                rewards_ptr, values_ptr, log_ratio_ptr, mask_ptr, begin, t, columns, end, length,
                next_value, last, gamma, lam, rho_bar, c_bar,
                HAS_VALUES, HAS_RATIO, HAS_MASK, BLOCK,
            )  # fmt: skip
            scale, shift = tl.associative_scan((scale, shift), 1, compose, reverse=True)
            first_scale = first_column(scale, columns)
            total_shift = first_scale * total_shift + first_column(shift, columns)
            total_scale = first_scale * total_scale
        at = maps_ptr + 2 * tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int32)
        tl.store(at, total_scale)
        tl.store(at + 1, total_shift)


@triton.jit
def _merged(count, mean, squares, other_count, other_mean, other_squares):
    """Moments of two sets of numbers together: count, mean, squares about it."""
    total = count + other_count
    # A division in float64 would take a stack.
    share = (other_count.to(tl.float32) / tl.maximum(total, 1.0).to(tl.float32)).to(tl.float64)
    gap = other_mean - mean
    return total, mean + gap * share, squares + other_squares + gap * gap * count * share


@triton.jit
def _tile_moments(x, kept):
    """Count, mean and squares about it in float64; the second pass also corrects the mean."""
    count = tl.sum(tl.sum(kept.to(tl.int32), 1), 0)
    n = tl.maximum(count, 1).to(tl.float32)
    centre = tl.sum(tl.sum(tl.where(kept, x, 0.0), 1), 0) / n
    d = tl.where(kept, x - centre, 0.0)
    off = tl.sum(tl.sum(d, 1), 0) / n
    squares = tl.sum(tl.sum(d * d, 1), 0) - off * off * n
    return count.to(tl.float64), centre.to(tl.float64) + off, squares.to(tl.float64)


@triton.jit(**GENERIC)
def _scan_kernel(
    rewards_ptr, values_ptr, log_ratio_ptr, mask_ptr, cu_seqlens_ptr, bootstrap_ptr, rates_ptr,
    maps_ptr, advantages_ptr, returns_ptr,
    parts_ptr,  # [programs, 3] float64, the moments of each program's advantages
    n_rows, n_steps, n_chunks, gamma, lam, rho_bar, c_bar, pg_rho_bar,
    HAS_VALUES: tl.constexpr, HAS_RATIO: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr, PER_ROW: tl.constexpr,
    CHUNK_T: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
    HAS_ADVANTAGES: tl.constexpr, HAS_PARTS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_MAPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    carry = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    next_value = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    if SPLIT:
        row, chunk = chunk_of(
            cu_seqlens_ptr, n_rows, n_steps, n_chunks, PACKED, CHUNK_T, BLOCK_SEQUENCES
        )
        begin, length = sequence_of(cu_seqlens_ptr, n_steps, row, True, PACKED)
        gamma, lam, last = rates_and_end(
            rates_ptr, bootstrap_ptr, row, True, gamma, lam, PER_ROW, HAS_BOOTSTRAP
        )
        start = chunk * CHUNK_T
        end = tl.minimum(start + CHUNK_T, length)
        next_value += value_from(
            values_ptr, mask_ptr, begin, end, length, last, HAS_VALUES, HAS_MASK, BLOCK
        )
        if not HAS_VALUES:
            carry += last
        n_later = tl.cdiv(length, CHUNK_T) - 1 - chunk
        n_blocks = tl.cdiv(tl.maximum(n_later, 0), BLOCK_MAPS)
        for block in range(n_blocks):
            later = (n_blocks - 1 - block) * BLOCK_MAPS + tl.arange(0, BLOCK_MAPS)[None, :]
            at = maps_ptr + 2 * (program + 1 + later)
            scale = tl.load(at, mask=later < n_later, other=1.0)
            shift = tl.load(at + 1, mask=later < n_later, other=0.0)
            scale, shift = tl.associative_scan((scale, shift), 1, compose, reverse=True)
            first = tl.arange(0, BLOCK_MAPS)[None, :]
            carry = first_column(scale, first) * carry + first_column(shift, first)
        n_blocks = tl.cdiv(tl.maximum(end - start, 0), BLOCK)
    else:
        row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        begin, length = sequence_of(cu_seqlens_ptr, n_steps, row, row < n_rows, PACKED)
        gamma, lam, last = rates_and_end(
            rates_ptr, bootstrap_ptr, row, row < n_rows, gamma, lam, PER_ROW, HAS_BOOTSTRAP
        )
        start = 0
        end = length
        next_value += last
        if not HAS_VALUES:
            carry += last
        n_blocks = tl.cdiv(tl.max(tl.max(length, 1), 0), BLOCK)

    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    squares = tl.full([], 0.0, tl.float64)
    for block in range(n_blocks):
        t = start + (n_blocks - 1 - block) * BLOCK + columns
        kept, value, delta, weight, scale, shift, next_value = maps_of(
            rewards_ptr, values_ptr, log_ratio_ptr, mask_ptr, begin, t, columns, end, length,
            next_value, last, gamma, lam, rho_bar, c_bar, HAS_VALUES, HAS_RATIO, HAS_MASK, BLOCK,
        )  # fmt: skip
        if HAS_RATIO:
            rest = (tl.zeros_like(scale) + 1.0, tl.zeros_like(shift))
            scale, shift, rest_scale, rest_shift = tl.associative_scan(
                (scale, shift, rest[0], rest[1]), 1, compose_with_rest, reverse=True
            )
            capped = tl.where(weight > pg_rho_bar, pg_rho_bar, weight)
            result = capped * (delta + gamma * (rest_scale * carry + rest_shift))
            advantage = scale * carry + shift
        else:
            scale, shift = tl.associative_scan((scale, shift), 1, compose, reverse=True)
            advantage = scale * carry + shift
            result = advantage
        tl.store(returns_ptr + begin + t, tl.where(kept, advantage + value, 0.0), mask=t < end)
        result = tl.where(kept, result, 0.0)
        if HAS_ADVANTAGES:
            tl.store(advantages_ptr + begin + t, result, mask=t < end)
        if HAS_PARTS:
            moments = _tile_moments(advantage, kept)
            count, mean, squares = _merged(count, mean, squares, moments[0], moments[1], moments[2])
        carry = first_column(advantage, columns)
    if HAS_PARTS:
        tl.store(parts_ptr + 3 * program, count)
        tl.store(parts_ptr + 3 * program + 1, mean)
        tl.store(parts_ptr + 3 * program + 2, squares)


@triton.jit(**GENERIC)
def _statistics_kernel(
    parts_ptr,  # [n_parts, 3] float64, as in _scan_kernel
    out_ptr,  # [3] float64: count, mean, unbiased variance
    n_parts,
    BLOCK: tl.constexpr,
):
    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    squares = tl.full([], 0.0, tl.float64)
    for first in range(0, n_parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        at = parts_ptr + 3 * part.to(tl.int64)
        counts = tl.load(at, mask=part < n_parts, other=0.0)
        means = tl.load(at + 1, mask=part < n_parts, other=0.0)
        own = tl.load(at + 2, mask=part < n_parts, other=0.0)
        n = tl.sum(counts, 0)
        centre = tl.sum(counts * means, 0) / tl.maximum(n, 1.0)
        own += counts * (means - centre) * (means - centre)
        count, mean, squares = _merged(count, mean, squares, n, centre, tl.sum(own, 0))
    variance = squares / tl.maximum(count - 1.0, 1.0)
    i = tl.arange(0, 4)
    tl.store(out_ptr + i, tl.where(i == 0, count, tl.where(i == 1, mean, variance)), mask=i < 3)


def scan(
    rewards: Tensor,
    values: Tensor | None,
    log_ratio: Tensor | None,
    caps: tuple[float, float, float],
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    rates: Tensor | None,
    *,
    keep_advantages: bool = True,
    statistics: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages (empty unless kept), returns, and the statistics [3] (or empty).

    Without values, those of discounted returns; with log-ratios, pg_advantages and vs of vtrace,
    whose caps are rho_bar, c_bar and pg_rho_bar.
    """
    rewards = rewards.contiguous()
    returns = torch.empty_like(rewards, dtype=torch.float32)
    advantages = torch.empty_like(returns) if keep_advantages else returns.new_empty(0)
    stats = returns.new_zeros(3 if statistics else 0, dtype=torch.float64)
    if rewards.numel() == 0:
        return advantages, returns, stats
    n_rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n_tokens, n_steps = rewards.numel(), rewards.shape[-1]
    split = n_rows < SPLIT_BELOW and n_tokens > n_rows * CHUNK
    batch = not split and n_tokens <= n_rows * BATCH_UPTO
    block_rows = BATCH_ROWS if batch else 1
    # Without a look at the offsets, which would wait for the GPU.
    n_chunks = triton.cdiv(n_steps, CHUNK)
    if split:
        programs = n_tokens // CHUNK + n_rows if cu_seqlens is not None else n_rows * n_chunks
    else:
        programs = triton.cdiv(n_rows, block_rows)
    maps = returns.new_empty(2 * programs if split else 0)
    parts = stats.new_empty(3 * programs if statistics else 0)
    given = (values, log_ratio, mask, cu_seqlens, bootstrap, rates)
    # Absent tensors need some pointer; the constexpr flags keep it from being read.
    pointers = [rewards, *(rewards if x is None else x.contiguous() for x in given), maps]
    scalars = (n_rows, n_steps, n_chunks, gamma, lam, *caps)
    features = {
        "HAS_VALUES": values is not None,
        "HAS_RATIO": log_ratio is not None,
        "HAS_MASK": mask is not None,
        "PACKED": cu_seqlens is not None,
        "HAS_BOOTSTRAP": bootstrap is not None,
        "PER_ROW": rates is not None,
        "CHUNK_T": CHUNK,
        "BLOCK": BATCH_T if batch else BLOCK_T,
        "BLOCK_SEQUENCES": SPLIT_BELOW,
        "num_warps": 4,
    }
    with torch.cuda.device_of(rewards):
        if split:
            _scan_chunk_kernel[(programs,)](*pointers, *scalars, **features)
        _scan_kernel[(programs,)](
            *pointers,
            advantages,
            returns,
            parts,
            *scalars,
            **features,
            HAS_ADVANTAGES=keep_advantages,
            HAS_PARTS=statistics,
            SPLIT=split,
            BLOCK_ROWS=block_rows,
            BLOCK_MAPS=BLOCK_CHUNKS,
        )
        if statistics:
            _statistics_kernel[(1,)](parts, stats, programs, BLOCK=BLOCK_PARTS, num_warps=4)
    return advantages, returns, stats


def gae_fwd(
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
    """Arguments and results as in the op ``fastalign::gae``."""
    settings = (gamma, lam, mask, cu_seqlens, bootstrap, rates)
    return scan(rewards, values, None, (1.0, 1.0, 1.0), *settings, statistics=statistics)
