"""Row kernels on two models' logits [N, V] or [B, T, V]; formulas: fastalign/ops/token_kl.py.

``_kl_stats_kernel``: one program per row, one read of both rows (online: the sums are shifted with
every new maximum).
``_kl_dlogits_kernel``: one program per row and block of columns, one read of both and one write, in
place or not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels._device import expm1_near, one_minus_exp, soft_capped
from fastalign.kernels.token_logprobs import dense_rows, steps_and_strides

STATS_BLOCK, STATS_WARPS = 2048, 8
DLOGITS_BLOCK, DLOGITS_WARPS = 2048, 4


@triton.jit
def _shift_and_step(m, m_new, inverse_temperature):
    """What to subtract under a running maximum, and by how much sums under the old one move."""
    # While every column so far is -inf there is no maximum to shift by: any finite shift will do.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    step = tl.where(m == float("-inf"), 0.0, (m - shift) * inverse_temperature)
    return shift, step


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


@triton.jit(do_not_specialize=["steps", "stride_temperature", "ignore_index"])
def _kl_stats_kernel(
    logits_ptr,  # [N / steps, steps, V]
    ref_ptr,  # the same shape
    targets_ptr,  # [N] int64
    temperature_ptr,  # [1] or [N] float32
    logp_ptr,  # [N] float32, as all below
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    kl_ptr,
    ref_logp_ptr,
    ref_row_max_ptr,
    mean_gap_ptr,
    vocab,
    steps,
    stride_logits_b,
    stride_logits_t,
    stride_ref_b,
    stride_ref_t,
    stride_temperature,
    softcap,
    ignore_index,
    BLOCK_V: tl.constexpr,
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
    inverse_temperature = 1.0 / temperature
    x_ptr = logits_ptr + row // steps * stride_logits_b + row % steps * stride_logits_t
    y_ptr = ref_ptr + row // steps * stride_ref_b + row % steps * stride_ref_t
    m = float("-inf")
    ref_m = float("-inf")
    sums = tl.zeros([BLOCK_V], tl.float32)  # of e^s
    dots = tl.zeros([BLOCK_V], tl.float32)  # of e^s s
    ref_sums = tl.zeros([BLOCK_V], tl.float32)  # of e^t
    gaps = tl.zeros([BLOCK_V], tl.float32)  # of e^s d, with d = t - s
    excess = tl.zeros([BLOCK_V], tl.float32)  # of e^t - e^s
    for start in range(0, vocab, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < vocab
        u = tl.load(x_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        v = tl.load(y_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if HAS_SOFTCAP:
            u = tl.where(inside, soft_capped(u, softcap), float("-inf"))
            v = tl.where(inside, soft_capped(v, softcap), float("-inf"))
        m_new = tl.maximum(m, tl.max(u, 0))
        ref_m_new = tl.maximum(ref_m, tl.max(v, 0))
        shift, step = _shift_and_step(m, m_new, inverse_temperature)
        ref_shift, ref_step = _shift_and_step(ref_m, ref_m_new, inverse_temperature)
        decay = tl.exp(step)
        ref_decay = tl.exp(ref_step)
        turn = ref_step - step
        near = decay * (excess + expm1_near(turn) * ref_sums)
        far = ref_decay * ref_sums - decay * sums
        excess = tl.where(tl.abs(turn) < 0.5, near, far)
        gaps = decay * (gaps + turn * sums)
        dots = decay * (dots + step * sums)
        sums *= decay
        ref_sums *= ref_decay
        s = (u - shift) * inverse_temperature
        s = tl.where(s < -200.0, -200.0, s)  # a finite s keeps 0 * s from being NaN; NaN stays
        t = (v - ref_shift) * inverse_temperature
        p = tl.exp(s)
        r = tl.exp(t)
        d = t - s
        sums += p
        dots += p * s
        ref_sums += r
        gaps += tl.where(p == 0.0, 0.0, p * d)
        excess += tl.where(tl.abs(d) < 0.5, p * expm1_near(d), r - p)
        m = m_new
        ref_m = ref_m_new
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


@triton.jit(do_not_specialize=["steps", "stride_temperature", "ignore_index"])
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
    vocab,
    steps,
    stride_logits_b,
    stride_logits_t,
    stride_ref_b,
    stride_ref_t,
    stride_temperature,
    softcap,
    ignore_index,
    BLOCK_V: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < vocab
    out = out_ptr + row * vocab + columns
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
    x_ptr = logits_ptr + row // steps * stride_logits_b + row % steps * stride_logits_t
    y_ptr = ref_ptr + row // steps * stride_ref_b + row % steps * stride_ref_t
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
    n, vocab = targets.numel(), logits.shape[-1]
    a, b, c, d, e, f, g, h = (
        torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(8)
    )
    if n > 0:
        steps, *strides = steps_and_strides(logits)
        with torch.cuda.device_of(logits):
            _kl_stats_kernel[(n,)](
                logits,
                ref_logits,
                targets,
                temperature,
                *(a, b, c, d, e, f, g, h),
                vocab,
                steps,
                *strides,
                *steps_and_strides(ref_logits)[1:],
                0 if temperature.numel() == 1 else 1,
                softcap,
                ignore_index,
                BLOCK_V=STATS_BLOCK,
                HAS_SOFTCAP=softcap != 0.0,
                num_warps=STATS_WARPS,
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
    steps, *strides = steps_and_strides(logits)
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
            vocab,
            steps,
            *strides,
            *steps_and_strides(ref_logits)[1:],
            0 if temperature.numel() == 1 else 1,
            softcap,
            ignore_index,
            BLOCK_V=DLOGITS_BLOCK,
            HAS_SOFTCAP=softcap != 0.0,
            HAS_ENTROPY=grad_entropy is not None,
            num_warps=DLOGITS_WARPS,
        )
