"""Row kernels on two models' logits [N, V] or [B, T, V]; formulas: fastalign/ops/token_kl.py.

``_kl_parts_kernel``: one program per row and block of columns: both maxima and the sums below them.
``_kl_stats_kernel``: one program per row puts the blocks together. Both models' logits are read
once. Rows are cut by V alone, for the reasons of kernels/token_logprobs.py.
``_kl_dlogits_kernel``: one program per row and block of columns, one read of both and one write, in
place or not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels._device import (
    columns_of,
    expm1_near,
    one_minus_exp,
    row_at,
    soft_capped,
)
from fastalign.kernels.token_logprobs import (
    GENERIC,
    dense_rows,
    has_aligned_rows,
    steps_and_strides,
)

# 16 logits of each model per thread, all loaded at once.
STATS_BLOCK, STATS_WARPS = 4096, 8
PARTS_BLOCK, PARTS_WARPS = 64, 1
DLOGITS_BLOCK, DLOGITS_WARPS = 2048, 4
PARTS = 7

KL_GENERIC = {
    "do_not_specialize": [*GENERIC["do_not_specialize"], "stride_ref_b", "stride_ref_t"],
    "do_not_specialize_on_alignment": [
        *GENERIC["do_not_specialize_on_alignment"],
        "ref_ptr",
        "grad_kl_ptr",
        "kl_ptr",
        "ref_logp_ptr",
        "ref_row_max_ptr",
        "mean_gap_ptr",
    ],
}


@triton.jit
def _log1p_near(x):
    """log(1 + x) for |x| < 0.5, as 2 atanh(x / (2 + x)): tl.log is no use so near to 1."""
    z = x / (2.0 + x)
    z2 = z * z
    series = 1.0 / 11.0 + z2 * (1.0 / 13.0)
    series = 1.0 / 9.0 + z2 * series
    series = 1.0 / 7.0 + z2 * series
    series = 1.0 / 5.0 + z2 * series
    series = 1.0 / 3.0 + z2 * series
    return 2.0 * z * (1.0 + z2 * series)


@triton.jit(**KL_GENERIC)
def _kl_parts_kernel(
    logits_ptr,  # [N / steps, steps, V]
    ref_ptr,  # the same shape
    targets_ptr,  # [N] int64
    temperature_ptr,  # [1] or [N] float32
    parts_ptr,  # [N, 7, blocks] float32, as stored below; not written for ignored rows
    vocab: tl.int32,
    steps: tl.int32,
    stride_logits_b: tl.int64,
    stride_logits_t: tl.int64,
    stride_ref_b: tl.int64,
    stride_ref_t: tl.int64,
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
    y_ptr = row_at(ref_ptr, row, steps, stride_ref_b, stride_ref_t, HAS_ALIGNED_ROWS)
    columns, inside = columns_of(vocab, block, BLOCK_V, HAS_ALIGNED_ROWS)
    u = tl.load(x_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    v = tl.load(y_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_SOFTCAP:
        u = tl.where(inside, soft_capped(u, softcap), float("-inf"))
        v = tl.where(inside, soft_capped(v, softcap), float("-inf"))
    m = tl.max(u, 0)
    ref_m = tl.max(v, 0)
    # Where every column is -inf there is no maximum to shift by: any finite shift will do.
    s = (u - tl.where(m == float("-inf"), 0.0, m)) * inverse_temperature
    s = tl.where(s < -200.0, -200.0, s)  # a finite s keeps 0 * s from being NaN; NaN stays
    t = (v - tl.where(ref_m == float("-inf"), 0.0, ref_m)) * inverse_temperature
    p = tl.exp(s)
    r = tl.exp(t)
    d = t - s
    blocks = tl.num_programs(1)
    part_ptr = parts_ptr + (row * 7 * blocks + block)
    tl.store(part_ptr, m)
    tl.store(part_ptr + blocks, ref_m)
    tl.store(part_ptr + 2 * blocks, tl.sum(p, 0))
    tl.store(part_ptr + 3 * blocks, tl.sum(p * s, 0))
    tl.store(part_ptr + 4 * blocks, tl.sum(r, 0))
    tl.store(part_ptr + 5 * blocks, tl.sum(tl.where(p == 0.0, 0.0, p * d), 0))
    # e^t - e^s, with all digits where d is small.
    excess = tl.where(tl.abs(d) < 0.5, p * expm1_near(d), r - p)
    tl.store(part_ptr + 6 * blocks, tl.sum(excess, 0))


@triton.jit
def _highest(part_ptr, blocks, BLOCK_PARTS: tl.constexpr):
    """The maximum of the parts' maxima."""
    highest = tl.full([BLOCK_PARTS], float("-inf"), tl.float32)
    for start in range(0, blocks, BLOCK_PARTS):
        at = start + tl.arange(0, BLOCK_PARTS)
        highest = tl.maximum(highest, tl.load(part_ptr + at, mask=at < blocks, other=float("-inf")))
    return tl.max(highest, 0)


@triton.jit(**KL_GENERIC)
def _kl_stats_kernel(
    logits_ptr,  # as in _kl_parts_kernel
    ref_ptr,
    targets_ptr,
    temperature_ptr,
    parts_ptr,
    logp_ptr,  # [N] float32, as all below
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    kl_ptr,
    ref_logp_ptr,
    ref_row_max_ptr,
    mean_gap_ptr,
    vocab: tl.int32,
    steps: tl.int32,
    stride_logits_b: tl.int64,
    stride_logits_t: tl.int64,
    stride_ref_b: tl.int64,
    stride_ref_t: tl.int64,
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
        tl.store(kl_ptr + row, 0.0)
        tl.store(ref_logp_ptr + row, 0.0)
        tl.store(ref_row_max_ptr + row, 0.0)
        tl.store(mean_gap_ptr + row, 0.0)
        return
    temperature = tl.load(temperature_ptr + row * stride_temperature)
    blocks = tl.cdiv(vocab, BLOCK_V)
    part_ptr = parts_ptr + row * 7 * blocks
    m = _highest(part_ptr, blocks, BLOCK_PARTS)
    ref_m = _highest(part_ptr + blocks, blocks, BLOCK_PARTS)
    sums = tl.zeros([BLOCK_PARTS], tl.float32)
    dots = tl.zeros([BLOCK_PARTS], tl.float32)
    ref_sums = tl.zeros([BLOCK_PARTS], tl.float32)
    gaps = tl.zeros([BLOCK_PARTS], tl.float32)
    excess = tl.zeros([BLOCK_PARTS], tl.float32)
    for start in range(0, blocks, BLOCK_PARTS):
        at = start + tl.arange(0, BLOCK_PARTS)
        known = at < blocks
        part_max = tl.load(part_ptr + at, mask=known, other=float("-inf"))
        part_ref_max = tl.load(part_ptr + blocks + at, mask=known, other=float("-inf"))
        part_sum = tl.load(part_ptr + 2 * blocks + at, mask=known, other=0.0)
        part_dot = tl.load(part_ptr + 3 * blocks + at, mask=known, other=0.0)
        part_ref_sum = tl.load(part_ptr + 4 * blocks + at, mask=known, other=0.0)
        part_gap = tl.load(part_ptr + 5 * blocks + at, mask=known, other=0.0)
        part_excess = tl.load(part_ptr + 6 * blocks + at, mask=known, other=0.0)
        # What is added to s and t when a part's shift becomes the row's; nothing to shift at -inf.
        step = tl.where(part_max == float("-inf"), 0.0, (part_max - m) / temperature)
        ref_step = tl.where(
            part_ref_max == float("-inf"), 0.0, (part_ref_max - ref_m) / temperature
        )
        turn = ref_step - step
        decay = tl.exp(step)
        ref_decay = tl.exp(ref_step)
        sums += decay * part_sum
        dots += decay * (part_dot + step * part_sum)
        ref_sums += ref_decay * part_ref_sum
        # A part that fades to p = 0 adds nothing, even where its r is 0 and its gap infinite.
        gaps += tl.where(decay == 0.0, 0.0, decay * (part_gap + turn * part_sum))
        near = decay * (part_excess + expm1_near(turn) * part_ref_sum)
        far = ref_decay * part_ref_sum - decay * part_sum
        excess += tl.where(tl.abs(turn) < 0.5, near, far)
    total = tl.sum(sums, 0)
    ref_total = tl.sum(ref_sums, 0)
    log_sum = tl.log(total)
    # Where the sums are alike their logarithms would lose the difference.
    relative = tl.sum(excess, 0) / total
    alike = tl.abs(relative) < 0.5
    log_ratio = tl.where(alike, _log1p_near(relative), tl.log(ref_total / total))
    ref_log_sum = tl.where(alike, log_sum + log_ratio, tl.log(ref_total))
    mean_gap = tl.sum(gaps, 0) / total
    # A target outside the row reads nothing and gives NaN: wrong input must not look like a number.
    known = (target >= 0) & (target < vocab)
    x_ptr = row_at(logits_ptr, row, steps, stride_logits_b, stride_logits_t, False)
    y_ptr = row_at(ref_ptr, row, steps, stride_ref_b, stride_ref_t, False)
    at_target = tl.load(x_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    ref_at_target = tl.load(y_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    if HAS_SOFTCAP:
        at_target = soft_capped(at_target, softcap)
        ref_at_target = soft_capped(ref_at_target, softcap)
    tl.store(logp_ptr + row, (at_target - m) / temperature - log_sum)
    tl.store(entropy_ptr + row, log_sum - tl.sum(dots, 0) / total)
    tl.store(row_max_ptr + row, m)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(kl_ptr + row, log_ratio - mean_gap)
    tl.store(ref_logp_ptr + row, (ref_at_target - ref_m) / temperature - ref_log_sum)
    tl.store(ref_row_max_ptr + row, ref_m)
    tl.store(mean_gap_ptr + row, mean_gap)


@triton.jit(**KL_GENERIC)
def _kl_dlogits_kernel(
    grad_logp_ptr,  # [N] float32
    grad_entropy_ptr,  # [N] float32, not read without HAS_ENTROPY
    grad_kl_ptr,  # [N] float32
    logits_ptr,  # [N / steps, steps, V]
    ref_ptr,  # the same shape
    targets_ptr,  # [N] int64
    temperature_ptr,  # [1] or [N] float32
    logp_ptr,  # [N] float32, as all below
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    kl_ptr,
    ref_row_max_ptr,
    mean_gap_ptr,
    out_ptr,  # [N, V] contiguous, may be logits
    vocab: tl.int32,
    steps: tl.int32,
    stride_logits_b: tl.int64,
    stride_logits_t: tl.int64,
    stride_ref_b: tl.int64,
    stride_ref_t: tl.int64,
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
    k = tl.load(grad_kl_ptr + row)
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    ref_row_max = tl.load(ref_row_max_ptr + row)
    # log p - log r - KL = mean_gap - d; an infinite KL has no gradient.
    endless = tl.load(kl_ptr + row) == float("inf")
    k = tl.where(endless, 0.0, k)
    mean_gap = tl.where(endless, 0.0, tl.load(mean_gap_ptr + row))
    x_ptr = row_at(logits_ptr, row, steps, stride_logits_b, stride_logits_t, HAS_ALIGNED_ROWS)
    y_ptr = row_at(ref_ptr, row, steps, stride_ref_b, stride_ref_t, HAS_ALIGNED_ROWS)
    u = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(y_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        u = soft_capped(u, softcap)
        v = soft_capped(v, softcap)
    s = (u - row_max) * inverse_temperature
    log_p = s - log_sum
    log_p = tl.where(log_p < -200.0, -200.0, log_p)
    p = tl.exp(log_p)
    onehot_minus_p = tl.where(columns == target, one_minus_exp(tl.load(logp_ptr + row)), -p)
    dz = g * onehot_minus_p
    if HAS_ENTROPY:
        dz -= tl.load(grad_entropy_ptr + row) * p * (log_p + tl.load(entropy_ptr + row))
    t = (v - ref_row_max) * inverse_temperature
    t = tl.where(t < -1e20, -1e20, t)  # finite, so that times 0 it is 0
    d = t - tl.where(s < -200.0, -200.0, s)
    dz += k * p * (mean_gap - d)
    dz *= inverse_temperature
    if HAS_SOFTCAP:
        slope = u / softcap
        dz *= 1.0 - slope * slope
    tl.store(out, dz.to(out_ptr.dtype.element_ty), mask=inside)


def _sizes(
    logits: Tensor, ref_logits: Tensor, temperature: Tensor, softcap: float, ignore_index: int
) -> tuple[float, ...]:
    return (
        logits.shape[-1],
        *steps_and_strides(logits),
        *steps_and_strides(ref_logits)[1:],
        0 if temperature.numel() == 1 else 1,
        softcap,
        ignore_index,
    )


def kl_stats_fwd(
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits, ref_logits = dense_rows(logits), dense_rows(ref_logits)
    targets, temperature = targets.contiguous(), temperature.contiguous()
    n, blocks = targets.numel(), triton.cdiv(logits.shape[-1], STATS_BLOCK)
    parts = torch.empty(n, PARTS, blocks, dtype=torch.float32, device=logits.device)
    a, b, c, d, e, f, g, h = (
        torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(8)
    )
    rows = (logits, ref_logits, targets, temperature, parts)
    sizes = _sizes(logits, ref_logits, temperature, softcap, ignore_index)
    if n > 0:
        with torch.cuda.device_of(logits):
            _kl_parts_kernel[(n, blocks)](
                *rows,
                *sizes,
                BLOCK_V=STATS_BLOCK,
                HAS_SOFTCAP=softcap != 0.0,
                HAS_ALIGNED_ROWS=has_aligned_rows(logits, ref_logits),
                num_warps=STATS_WARPS,
            )
            _kl_stats_kernel[(n,)](
                *rows,
                *(a, b, c, d, e, f, g, h),
                *sizes,
                BLOCK_V=STATS_BLOCK,
                BLOCK_PARTS=PARTS_BLOCK,
                HAS_SOFTCAP=softcap != 0.0,
                num_warps=PARTS_WARPS,
            )
    return a, b, c, d, e, f, g, h


def kl_dlogits_fwd(
    out: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    logp: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    kl: Tensor,
    ref_row_max: Tensor,
    mean_gap: Tensor,
) -> None:
    logits, ref_logits = dense_rows(logits), dense_rows(ref_logits)
    targets, temperature = targets.contiguous(), temperature.contiguous()
    n, vocab = targets.numel(), logits.shape[-1]
    if n == 0:
        return
    stats = (logp, entropy, row_max, log_sum, kl, ref_row_max, mean_gap)
    with torch.cuda.device_of(logits):
        _kl_dlogits_kernel[(n, triton.cdiv(vocab, DLOGITS_BLOCK))](
            grad_logp.contiguous(),
            (grad_logp if grad_entropy is None else grad_entropy).contiguous(),
            grad_kl.contiguous(),
            logits,
            ref_logits,
            targets,
            temperature,
            *(x.contiguous() for x in stats),
            out,
            *_sizes(logits, ref_logits, temperature, softcap, ignore_index),
            BLOCK_V=DLOGITS_BLOCK,
            HAS_SOFTCAP=softcap != 0.0,
            HAS_ENTROPY=grad_entropy is not None,
            HAS_ALIGNED_ROWS=has_aligned_rows(logits, ref_logits, out),
            num_warps=DLOGITS_WARPS,
        )
