"""Device functions that several Triton kernels use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_at(logits_ptr, row, steps, stride_b, stride_t, HAS_ALIGNED_ROWS: tl.constexpr):
    """Row i is row i % steps of batch i // steps."""
    x_ptr = logits_ptr + (row // steps * stride_b + row % steps * stride_t)
    if HAS_ALIGNED_ROWS:
        x_ptr = tl.multiple_of(x_ptr, 16)
    return x_ptr


@triton.jit
def columns_of(vocab, block, BLOCK_V: tl.constexpr, HAS_ALIGNED_ROWS: tl.constexpr):
    """Columns of a block, and which of them there are."""
    if HAS_ALIGNED_ROWS:
        vocab = vocab // 16 * 16  # as it is; now the compiler knows
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    return columns, columns < vocab


@triton.jit
def soft_capped(x, softcap):
    """softcap * tanh(x / softcap): an odd polynomial where tanh is steep, exp elsewhere."""
    y = x * (1.0 / softcap)  # a division here costs two registers too many on sm_80 and sm_90
    size = tl.abs(y)
    decay = tl.exp(-2.0 * size)
    far = (1.0 - decay) / (1.0 + decay)
    y2 = y * y
    p = -5.70498872745e-3 * y2 + 2.06390887954e-2
    p = p * y2 - 5.37397155531e-2
    p = p * y2 + 1.33314422036e-1
    p = p * y2 - 3.33332819422e-1
    near = y + y * y2 * p
    return softcap * tl.where(size < 0.625, near, tl.where(y < 0.0, -far, far))


@triton.jit
def expm1_near(x):
    """exp(x) - 1 for |x| < 0.5."""
    series = 1.0 + x * (1.0 / 7.0)
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * (1.0 / 2.0) * series
    return x * series


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation near 0."""
    return tl.where(x > -0.5, -expm1_near(x), 1.0 - tl.exp(x))


@triton.jit
def log1p_unit(x):
    """log(1 + x) for x in [0, 1]: 2 artanh(x / (2 + x)) by its series, without cancellation."""
    t = x / (2.0 + x)
    t2 = t * t
    p = t2 * (1.0 / 15.0) + 1.0 / 13.0
    p = p * t2 + 1.0 / 11.0
    p = p * t2 + 1.0 / 9.0
    p = p * t2 + 1.0 / 7.0
    p = p * t2 + 1.0 / 5.0
    p = p * t2 + 1.0 / 3.0
    return 2.0 * (t + t * t2 * p)


@triton.jit
def kl_k3(d):
    """exp(d) - 1 - d: a series where the difference would lose its digits."""
    series = 1.0 / 720.0 + d * (1.0 / 5040.0 + d * (1.0 / 40320.0))
    series = 0.5 + d * (1.0 / 6.0 + d * (1.0 / 24.0 + d * (1.0 / 120.0 + d * series)))
    return tl.where(tl.abs(d) < 0.5, d * d * series, tl.exp(d) - 1.0 - d)
