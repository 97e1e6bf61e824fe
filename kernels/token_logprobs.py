"""Row kernels on logits [N, V] or [B, T, V]; formulas: fastalign/ops/token_logprobs.py.

``_row_stats_kernel``: one program per row, one read of the row (online softmax with entropy).
``_dlogits_kernel``: one program per row and block of columns, one read and one write, in place or
not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels._device import one_minus_exp, soft_capped

STATS_BLOCK, STATS_WARPS = 4096, 8
DLOGITS_BLOCK, DLOGITS_WARPS = 2048, 4


@triton.jit(do_not_specialize=["steps", "stride_temperature", "ignore_index"])
def _row_stats_kernel(
    logits_ptr,  # [N / steps, steps, V]
    targets_ptr,  # [N] int64
    temperature_ptr,  # [1] or [N] float32
    logp_ptr,  # [N] float32, as all below
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    vocab,
    steps,
    stride_logits_b,
    stride_logits_t,
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
        return
    temperature = tl.load(temperature_ptr + row * stride_temperature)
    inverse_temperature = 1.0 / temperature
    x_ptr = logits_ptr + row // steps * stride_logits_b + row % steps * stride_logits_t
    m = float("-inf")
    sums = tl.zeros([BLOCK_V], tl.float32)
    dots = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocab, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < vocab
        u = tl.load(x_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if HAS_SOFTCAP:
            u = tl.where(inside, soft_capped(u, softcap), float("-inf"))
        m_new = tl.maximum(m, tl.max(u, 0))
        # While every column so far is -inf there is no maximum to shift by: any finite shift will
        # do.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        step = tl.where(m == float("-inf"), 0.0, (m - shift) * inverse_temperature)
        decay = tl.exp(step)
        dots = decay * (dots + step * sums)
        sums *= decay
        s = (u - shift) * inverse_temperature
        s = tl.where(s < -200.0, -200.0, s)  # a finite s keeps 0 * s from being NaN; NaN stays
        e = tl.exp(s)
        sums += e
        dots += e * s
        m = m_new
    total = tl.sum(sums, 0)
    log_sum = tl.log(total)
    # A target outside the row reads nothing and gives NaN: wrong input must not look like a number.
    known = (target >= 0) & (target < vocab)
    at_target = tl.load(x_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    if HAS_SOFTCAP:
        at_target = soft_capped(at_target, softcap)
    tl.store(logp_ptr + row, (at_target - m) / temperature - log_sum)
    tl.store(entropy_ptr + row, log_sum - tl.sum(dots, 0) / total)
    tl.store(row_max_ptr + row, m)
    tl.store(log_sum_ptr + row, log_sum)


@triton.jit(do_not_specialize=["steps", "stride_temperature", "ignore_index"])
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
    vocab,
    steps,
    stride_logits_b,
    stride_logits_t,
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
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    x_ptr = logits_ptr + row // steps * stride_logits_b + row % steps * stride_logits_t
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


def row_stats_fwd(
    logits: Tensor, targets: Tensor, temperature: Tensor, softcap: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, targets = dense_rows(logits), targets.contiguous()
    temperature = temperature.contiguous()
    n, vocab = targets.numel(), logits.shape[-1]
    stats = [torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(4)]
    if n > 0:
        with torch.cuda.device_of(logits):
            _row_stats_kernel[(n,)](
                logits,
                targets,
                temperature,
                *stats,
                vocab,
                *steps_and_strides(logits),
                0 if temperature.numel() == 1 else 1,
                softcap,
                ignore_index,
                BLOCK_V=STATS_BLOCK,
                HAS_SOFTCAP=softcap != 0.0,
                num_warps=STATS_WARPS,
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
            num_warps=DLOGITS_WARPS,
        )
