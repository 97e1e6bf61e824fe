"""Statistics over the K scores of each sample; formulas: fastalign/ops/reduce_scores.py.

One program per block of samples, all heads of a sample in one tile: one read of the scores, one
write of what is asked for. The device functions are shared with kernels/reward_heads.py, which
applies them to scores still in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_CELLS = 256  # samples times heads of one program
SIZES = ["n_samples", "heads", "lower", "upper"]


def heads_block(heads: int) -> int:
    """Heads of a tile: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(heads))


def _samples_block(heads: int) -> int:
    return BLOCK_CELLS // heads_block(heads)


@triton.jit
def moments(s, real, columns, heads):
    """(mean, deviations from it, variance with ddof 1) over the real heads of a tile."""
    mean = tl.sum(tl.where(real, s, 0.0), 1) / heads
    # By way of the first score: equal scores are 0 from it, and not from a mean that is rounded.
    first = tl.sum(tl.where(columns == 0, s, 0.0), 1)
    apart = tl.where(real, s - first[:, None], 0.0)
    centred = tl.where(real, apart - (tl.sum(apart, 1) / heads)[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / tl.maximum(heads - 1, 1)
    return mean, centred, tl.where(heads == 1, 0.0, variance)


@triton.jit
def middle(s, real, columns, lower, upper):
    """The scores at two places of the ascending order; NaN where one of the scores is."""
    ordered = tl.sort(tl.where(real, s, float("inf")), dim=1)
    at_lower = tl.sum(tl.where(columns == lower, ordered, 0.0), 1)
    at_upper = tl.sum(tl.where(columns == upper, ordered, 0.0), 1)
    broken = tl.sum(tl.where(real & (s != s), 1, 0), 1) > 0
    nan = float("nan")
    return tl.where(broken, nan, at_lower), tl.where(broken, nan, at_upper)


@triton.jit
def reduced_and_std(s, real, columns, heads, lower, upper, std_coef, variance_coef):
    mean, _, variance = moments(s, real, columns, heads)
    std = tl.sqrt_rn(variance)
    # A coefficient of 0 must not turn an infinite spread into NaN.
    spread = tl.where(std_coef != 0.0, std_coef * std, 0.0)
    spread += tl.where(variance_coef != 0.0, variance_coef * variance, 0.0)
    reduced = mean - spread
    if lower >= 0:
        at_lower, at_upper = middle(s, real, columns, lower, upper)
        reduced = 0.5 * at_lower + 0.5 * at_upper
    return reduced, std


@triton.jit
def _dscores(
    samples,
    inside,
    grad_scores_ptr,
    grad_reduced_ptr,
    grad_std_ptr,
    scores_ptr,
    heads,
    lower,
    upper,
    std_coef,
    variance_coef,
    BLOCK_K: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_REDUCED: tl.constexpr,
    HAS_STD: tl.constexpr,
):
    """dL/dscores of a tile of samples, 0 where not inside."""
    columns = tl.arange(0, BLOCK_K)[None, :]
    real = inside[:, None] & (columns < heads)
    at = samples[:, None] * heads + columns
    total = tl.zeros(real.shape, tl.float32)
    if HAS_SCORES:
        total += tl.load(grad_scores_ptr + at, mask=real, other=0.0).to(tl.float32)
    if HAS_REDUCED or HAS_STD:
        s = tl.load(scores_ptr + at, mask=real, other=0.0).to(tl.float32)
        _, centred, variance = moments(s, real, columns, heads)
        std = tl.sqrt_rn(variance)[:, None]
        ddof = tl.maximum(heads - 1, 1)
        dstd = tl.where(std == 0.0, 0.0, centred / (ddof * std))
        if HAS_REDUCED:
            share = tl.where(real, 1.0 / heads, 0.0)
            share -= tl.where(std_coef != 0.0, std_coef * dstd, 0.0)
            share -= tl.where(variance_coef != 0.0, 2.0 * variance_coef * centred / ddof, 0.0)
            if lower >= 0:
                at_lower, at_upper = middle(s, real, columns, lower, upper)
                equal = tl.where(real & (s == at_lower[:, None]), 1.0, 0.0)
                share = 0.5 * equal / tl.sum(equal, 1)[:, None]
                equal = tl.where(real & (s == at_upper[:, None]), 1.0, 0.0)
                share += 0.5 * equal / tl.sum(equal, 1)[:, None]
            g = tl.load(grad_reduced_ptr + samples, mask=inside, other=0.0)
            total += g[:, None] * share
        if HAS_STD:
            g = tl.load(grad_std_ptr + samples, mask=inside, other=0.0)
            total += g[:, None] * dstd
    return tl.where(real, total, 0.0)


@triton.jit(do_not_specialize=SIZES)
def _reduce_scores_kernel(
    scores_ptr,  # [n_samples, heads]
    reduced_ptr,  # [n_samples] float32, as std
    std_ptr,
    n_samples,
    heads,
    lower,
    upper,
    std_coef,
    variance_coef,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    samples = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = samples < n_samples
    columns = tl.arange(0, BLOCK_K)[None, :]
    real = inside[:, None] & (columns < heads)
    s = tl.load(scores_ptr + samples[:, None] * heads + columns, mask=real, other=0.0)
    s = s.to(tl.float32)
    reduced, std = reduced_and_std(
        s, real, columns, heads, lower, upper, std_coef, variance_coef
    )  # fmt: skip
    tl.store(reduced_ptr + samples, reduced, mask=inside)
    tl.store(std_ptr + samples, std, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _dscores_kernel(
    grad_scores_ptr,  # [n_samples, heads], read with HAS_SCORES
    grad_reduced_ptr,  # [n_samples], read with HAS_REDUCED
    grad_std_ptr,  # [n_samples], read with HAS_STD
    scores_ptr,  # [n_samples, heads]
    rows_ptr,  # [n_samples] ascending, read with HAS_ORDER
    order_ptr,  # [n_samples], the sample at each place of rows
    out_ptr,  # [n_samples, heads] float32
    n_samples,
    heads,
    lower,
    upper,
    std_coef,
    variance_coef,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_REDUCED: tl.constexpr,
    HAS_STD: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = places < n_samples
    if HAS_ORDER:
        # The first place of a run of equal rows takes the sum over the run, the others stay 0.
        row = tl.load(rows_ptr + places, mask=inside, other=-1)
        before = tl.load(rows_ptr + places - 1, mask=inside & (places > 0), other=-1)
        active = inside & ((places == 0) | (row != before))
        total = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
        step = 0
        going = True
        while going:
            samples = tl.load(order_ptr + places + step, mask=active, other=0)
            total += _dscores(
                samples, active, grad_scores_ptr, grad_reduced_ptr, grad_std_ptr, scores_ptr,
                heads, lower, upper, std_coef, variance_coef,
                BLOCK_K, HAS_SCORES, HAS_REDUCED, HAS_STD,
            )  # fmt: skip
            step += 1
            active = active & (places + step < n_samples)
            following = tl.load(rows_ptr + places + step, mask=active, other=-1)
            active = active & (following == row)
            going = tl.max(active.to(tl.int32), 0) > 0
    else:
        total = _dscores(
            places, inside, grad_scores_ptr, grad_reduced_ptr, grad_std_ptr, scores_ptr,
            heads, lower, upper, std_coef, variance_coef,
            BLOCK_K, HAS_SCORES, HAS_REDUCED, HAS_STD,
        )  # fmt: skip
    columns = tl.arange(0, BLOCK_K)[None, :]
    at = places[:, None] * heads + columns
    tl.store(out_ptr + at, total, mask=inside[:, None] & (columns < heads))


def reduce_scores_fwd(
    scores: Tensor, statistic: tuple[int, int, float, float]
) -> tuple[Tensor, Tensor]:
    n, heads = scores.shape
    reduced = torch.empty(n, dtype=torch.float32, device=scores.device)
    std = torch.empty_like(reduced)
    if n > 0:
        with torch.cuda.device_of(scores):
            _reduce_scores_kernel[(triton.cdiv(n, _samples_block(heads)),)](
                scores.contiguous(),
                reduced,
                std,
                n,
                heads,
                *statistic,
                BLOCK_B=_samples_block(heads),
                BLOCK_K=heads_block(heads),
                num_warps=2,
            )
    return reduced, std


def dscores_fwd(
    grad_scores: Tensor | None,
    grad_reduced: Tensor | None,
    grad_std: Tensor | None,
    scores: Tensor,
    rows_and_order: tuple[Tensor, Tensor] | None,
    statistic: tuple[int, int, float, float],
) -> Tensor:
    """dL/dscores [B, K], float32. With (ascending rows, the samples in that order) in that order,
    and samples of one row are summed in its first place."""
    n, heads = scores.shape
    out = torch.empty(n, heads, dtype=torch.float32, device=scores.device)
    if n == 0:
        return out
    # Absent tensors need some pointer; the constexpr flags keep it from being read.
    gradients = [
        scores if x is None else x.contiguous() for x in (grad_scores, grad_reduced, grad_std)
    ]
    rows, order = (out, out) if rows_and_order is None else rows_and_order
    with torch.cuda.device_of(scores):
        _dscores_kernel[(triton.cdiv(n, _samples_block(heads)),)](
            *gradients,
            scores.contiguous(),
            rows,
            order,
            out,
            n,
            heads,
            *statistic,
            BLOCK_B=_samples_block(heads),
            BLOCK_K=heads_block(heads),
            HAS_SCORES=grad_scores is not None,
            HAS_REDUCED=grad_reduced is not None,
            HAS_STD=grad_std is not None,
            HAS_ORDER=rows_and_order is not None,
            num_warps=2,
        )
    return out
