"""Row kernels on logits [N, V] or [B, T, V]; formulas: fastalign/ops/token_logprobs.py.

``_row_parts_kernel``: one program per row and block of columns: its maximum, sum and dot.
``_row_stats_kernel``: one program per row puts the blocks together. Logits are read once.
``_dlogits_kernel``: one program per row and block of columns, one read and one write, in place or
not.

Rows are cut by V alone, so the bits of a row do not depend on how many rows there are; and 16 rows
of 32k columns are 128 programs already, for the 132 multiprocessors of an H200. Where rows are many
the cut costs next to nothing: 12 bytes for each 8 or 16 KiB of logits, and a second launch of a few
microseconds. Where they are few, a row of 262k as one program would be 64 rounds of load, maximum
and exponential, each waiting for the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels._device import columns_of, one_minus_exp, row_at, soft_capped

# 32 logits per thread, all loaded at once, in 80 registers: six programs fit on a multiprocessor,
# 48 KiB of bfloat16 under way where 4.8 TB/s at a latency of 700 ns want 25 KiB on each of 132.
# Wider blocks leave multiprocessors without work at 16 rows, narrower ones are mostly reductions.
STATS_BLOCK, STATS_WARPS = 4096, 4
# One warp needs no barrier; 64 parts are a row of 262,144.
PARTS_BLOCK, PARTS_WARPS = 64, 1
# No reduction here, but a write: 16 logits per thread.
DLOGITS_BLOCK, DLOGITS_WARPS = 2048, 4

# One compilation for all sizes, strides and alignments. HAS_ALIGNED_ROWS says what alignment is
# worth; the numbers of a row (one load each) gain nothing from it.
GENERIC = {
    "do_not_specialize": [
        "vocab",
        "steps",
        "stride_logits_b",
        "stride_logits_t",
        "stride_temperature",
        "ignore_index",
    ],
    "do_not_specialize_on_alignment": [
        "logits_ptr",
        "targets_ptr",
        "temperature_ptr",
        "parts_ptr",
        "grad_logp_ptr",
        "grad_entropy_ptr",
        "logp_ptr",
        "entropy_ptr",
        "row_max_ptr",
        "log_sum_ptr",
        "out_ptr",
    ],
}


@triton.jit(**GENERIC)
def _row_parts_kernel(
    logits_ptr,  # [N / steps, steps, V]
    targets_ptr,  # [N] int64
    temperature_ptr,  # [1] or [N] float32
    parts_ptr,  # [N, 3, blocks] float32: maximum, sum, dot; not written for ignored rows
    vocab: tl.int32,
    steps: tl.int32,
    stride_logits_b: tl.int64,
    stride_logits_t: tl.int64,
    stride_temperature: tl.int32,
    softcap,
    ignore_index: tl.int64,
    BLOCK_V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIGNED_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if tl.load(targets_ptr + row) == ignore_index:
        return
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row * stride_temperature)
    x_ptr = row_at(logits_ptr, row, steps, stride_logits_b, stride_logits_t, HAS_ALIGNED_ROWS)
    columns, inside = columns_of(vocab, block, BLOCK_V, HAS_ALIGNED_ROWS)
    u = tl.load(x_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_SOFTCAP:
        u = tl.where(inside, soft_capped(u, softcap), float("-inf"))
    m = tl.max(u, 0)
    # Where every column is -inf there is no maximum to shift by: any finite shift will do.
    s = (u - tl.where(m == float("-inf"), 0.0, m)) * inverse_temperature
    s = tl.where(s < -200.0, -200.0, s)  # a finite s keeps 0 * s from being NaN; NaN stays
    e = tl.exp(s)
    blocks = tl.num_programs(1)
    part_ptr = parts_ptr + (row * 3 * blocks + block)
    tl.store(part_ptr, m)
    tl.store(part_ptr + blocks, tl.sum(e, 0))
    tl.store(part_ptr + 2 * blocks, tl.sum(e * s, 0))


@triton.jit(**GENERIC)
def _row_stats_kernel(
    logits_ptr,  # as in _row_parts_kernel
    targets_ptr,
    temperature_ptr,
    parts_ptr,
    logp_ptr,  # [N] float32, as all below
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    vocab: tl.int32,
    steps: tl.int32,
    stride_logits_b: tl.int64,
    stride_logits_t: tl.int64,
    stride_temperature: tl.int32,
    softcap,
    ignore_index: tl.int64,
    BLOCK_V: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(logp_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(row_max_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)
        return
    temperature = tl.load(temperature_ptr + row * stride_temperature)
    blocks = tl.cdiv(vocab, BLOCK_V)
    part_ptr = parts_ptr + row * 3 * blocks
    lanes = tl.arange(0, BLOCK_PARTS)
    highest = tl.full([BLOCK_PARTS], float("-inf"), tl.float32)
    for start in range(0, blocks, BLOCK_PARTS):
        at = start + lanes
        highest = tl.maximum(highest, tl.load(part_ptr + at, mask=at < blocks, other=float("-inf")))
    m = tl.max(highest, 0)
    sums = tl.zeros([BLOCK_PARTS], tl.float32)
    dots = tl.zeros([BLOCK_PARTS], tl.float32)
    for start in range(0, blocks, BLOCK_PARTS):
        at = start + lanes
        known = at < blocks
        part_max = tl.load(part_ptr + at, mask=known, other=float("-inf"))
        part_sum = tl.load(part_ptr + blocks + at, mask=known, other=0.0)
        part_dot = tl.load(part_ptr + 2 * blocks + at, mask=known, other=0.0)
        # What is added to s when a part's shift becomes the row's; nothing to shift at -inf.
        step = tl.where(part_max == float("-inf"), 0.0, (part_max - m) / temperature)
        decay = tl.exp(step)
        sums += decay * part_sum
        dots += decay * (part_dot + step * part_sum)
    total = tl.sum(sums, 0)
    log_sum = tl.log(total)
    # A target outside the row reads nothing and gives NaN: wrong input must not look like a number.
    known = (target >= 0) & (target < vocab)
    x_ptr = row_at(logits_ptr, row, steps, stride_logits_b, stride_logits_t, False)
    at_target = tl.load(x_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    if HAS_SOFTCAP:
        at_target = soft_capped(at_target, softcap)
    tl.store(logp_ptr + row, (at_target - m) / temperature - log_sum)
    tl.store(entropy_ptr + row, log_sum - tl.sum(dots, 0) / total)
    tl.store(row_max_ptr + row, m)
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit(**GENERIC)
def _dlogits_kernel(
    grad_logp_ptr,  # [N] float32
    grad_entropy_ptr,  # [N] float32, not read without HAS_ENTROPY
    logits_ptr,  # [N / steps, steps, V]
    targets_ptr,  # [N] int64
    temperature_ptr,  # [1] or [N] float32
    logp_ptr,  # [N] float32, as all below
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    out_ptr,  # [N, V] contiguous, may be logits
    vocab: tl.int32,
    steps: tl.int32,
    stride_logits_b: tl.int64,
    stride_logits_t: tl.int64,
    stride_temperature: tl.int32,
    softcap,
    ignore_index: tl.int64,
    BLOCK_V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_ALIGNED_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns, inside = columns_of(vocab, tl.program_id(1), BLOCK_V, HAS_ALIGNED_ROWS)
    out = row_at(out_ptr, row, 1, vocab, 0, HAS_ALIGNED_ROWS) + columns
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(out, tl.zeros([BLOCK_V], out_ptr.dtype.element_ty), mask=inside)
        return
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row * stride_temperature)
    g = tl.load(grad_logp_ptr + row)
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    x_ptr = row_at(logits_ptr, row, steps, stride_logits_b, stride_logits_t, HAS_ALIGNED_ROWS)
    u = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        u = soft_capped(u, softcap)
    log_p = (u - row_max) * inverse_temperature - log_sum
    log_p = tl.where(log_p < -200.0, -200.0, log_p)
    p = tl.exp(log_p)
    onehot_minus_p = tl.where(columns == target, one_minus_exp(tl.load(logp_ptr + row)), -p)
    dz = g * onehot_minus_p
    if HAS_ENTROPY:
        dz -= tl.load(grad_entropy_ptr + row) * p * (log_p + tl.load(entropy_ptr + row))
    dz *= inverse_temperature
    if HAS_SOFTCAP:
        t = u / softcap
        dz *= 1.0 - t * t
    tl.store(out, dz.to(out_ptr.dtype.element_ty), mask=inside)


def dense_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def steps_and_strides(logits: Tensor) -> tuple[int, int, int]:
    """How row i is found: row i % steps of batch i // steps, and the strides of both."""
    outer = logits.stride(0) if logits.dim() == 3 else 0
    return logits.shape[-2], outer, logits.stride(-2)


def has_aligned_rows(*tensors: Tensor) -> bool:
    """Whether every row of these tensors may be read 16 bytes at a time."""
    return all(
        x.data_ptr() % 16 == 0
        and x.shape[-1] % 16 == 0
        and all(s % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


def row_stats_fwd(
    logits: Tensor, targets: Tensor, temperature: Tensor, softcap: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, targets = dense_rows(logits), targets.contiguous()
    temperature = temperature.contiguous()
    n, vocab = targets.numel(), logits.shape[-1]
    blocks = triton.cdiv(vocab, STATS_BLOCK)
    parts = torch.empty(n, 3, blocks, dtype=torch.float32, device=logits.device)
    stats = [torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(4)]
    rows = (logits, targets, temperature, parts)
    sizes = (
        vocab,
        *steps_and_strides(logits),
        0 if temperature.numel() == 1 else 1,
        softcap,
        ignore_index,
    )
    if n > 0:
        with torch.cuda.device_of(logits):
            _row_parts_kernel[(n, blocks)](
                *rows,
                *sizes,
                BLOCK_V=STATS_BLOCK,
                HAS_SOFTCAP=softcap != 0.0,
                HAS_ALIGNED_ROWS=has_aligned_rows(logits),
                num_warps=STATS_WARPS,
            )
            _row_stats_kernel[(n,)](
                *rows,
                *stats,
                *sizes,
                BLOCK_V=STATS_BLOCK,
                BLOCK_PARTS=PARTS_BLOCK,
                HAS_SOFTCAP=softcap != 0.0,
                num_warps=PARTS_WARPS,
            )
    return stats[0], stats[1], stats[2], stats[3]


def dlogits_fwd(
    out: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    logp: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
) -> None:
    logits, targets = dense_rows(logits), targets.contiguous()
    temperature = temperature.contiguous()
    grad_logp = grad_logp.contiguous()
    n, vocab = targets.numel(), logits.shape[-1]
    if n == 0:
        return
    with torch.cuda.device_of(logits):
        _dlogits_kernel[(n, triton.cdiv(vocab, DLOGITS_BLOCK))](
            grad_logp,
            grad_logp if grad_entropy is None else grad_entropy.contiguous(),
            logits,
            targets,
            temperature,
            logp.contiguous(),
            entropy.contiguous(),
            row_max.contiguous(),
            log_sum.contiguous(),
            out,
            vocab,
            *steps_and_strides(logits),
            0 if temperature.numel() == 1 else 1,
            softcap,
            ignore_index,
            BLOCK_V=DLOGITS_BLOCK,
            HAS_SOFTCAP=softcap != 0.0,
            HAS_ENTROPY=grad_entropy is not None,
            HAS_ALIGNED_ROWS=has_aligned_rows(logits, out),
            num_warps=DLOGITS_WARPS,
        )
