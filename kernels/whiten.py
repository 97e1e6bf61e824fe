"""Masked whitening in two launches each way; formulas: fastalign/ops/whiten.py.

``_moments_kernel`` writes the count, mean and sum of squares of at most MOST_PARTS parts of the
cells. ``_whiten_kernel``, the same number of programs, has each of them merge all the parts in
float64, in the same order, and whiten its own part. The backward pass is made alike, of two sums.
Cells are read twice and written once; float32 inside a block, float64 across blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
MOST_PARTS = 512  # programs that fill a large GPU
# One compilation serves all sizes and alignments.
GENERIC = {
    "do_not_specialize": ["n_cells", "cells_per_part", "n_parts"],
    "do_not_specialize_on_alignment": [
        "x_ptr",
        "mask_ptr",
        "grad_ptr",
        "parts_ptr",
        "sums_ptr",
        "moments_ptr",
        "y_ptr",
        "dx_ptr",
    ],
}


@triton.jit
def _kept(mask_ptr, at, end, HAS_MASK: tl.constexpr):
    kept = at < end
    if HAS_MASK:
        kept = kept & (tl.load(mask_ptr + at, mask=kept, other=0) != 0)
    return kept


@triton.jit
def _merged(parts_ptr, n_parts, BLOCK_PARTS: tl.constexpr):
    """Count, mean and sum of squares of all parts, float64 (Chan et al.)."""
    part = tl.arange(0, BLOCK_PARTS)
    inside = part < n_parts
    counts = tl.load(parts_ptr + 3 * part, mask=inside, other=0.0)
    means = tl.load(parts_ptr + 3 * part + 1, mask=inside, other=0.0)
    squares = tl.load(parts_ptr + 3 * part + 2, mask=inside, other=0.0)
    count = tl.sum(counts, 0)
    at_least_one = tl.where(count > 1.0, count, 1.0)
    mean = tl.sum(counts * means, 0) / at_least_one
    # What the first mean has lost by rounding.
    apart = tl.where(counts > 0.0, means - mean, 0.0)
    mean += tl.sum(counts * apart, 0) / at_least_one
    apart = tl.where(counts > 0.0, means - mean, 0.0)
    return count, mean, tl.sum(squares + counts * apart * apart, 0)


@triton.jit
def _load_moments(moments_ptr):
    column = tl.arange(0, 4)
    numbers = tl.load(moments_ptr + column, mask=column < 3, other=0.0)
    count = tl.sum(tl.where(column == 0, numbers, 0.0), 0)
    mean = tl.sum(tl.where(column == 1, numbers, 0.0), 0)
    return count, mean, tl.sum(tl.where(column == 2, numbers, 0.0), 0)


@triton.jit
def _store_moments(moments_ptr, count, mean, squares):
    column = tl.arange(0, 4)
    numbers = tl.where(column == 0, count, tl.where(column == 1, mean, squares))
    tl.store(moments_ptr + column, numbers, mask=column < 3)


@triton.jit
def _whitening(count, mean, squares, eps):
    """What each cell needs: the mean as two floats (beside a large one, a single float would lose
    digits of a small deviation) and 1 / standard deviation."""
    variance = squares / tl.where(count > 2.0, count - 1.0, 1.0)
    scale = (1.0 / tl.sqrt(variance + eps)).to(tl.float32)
    first = mean.to(tl.float32)
    return first, (mean - first).to(tl.float32), scale


@triton.jit(**GENERIC)
def _moments_kernel(
    x_ptr,  # [n_cells]
    mask_ptr,  # [n_cells] bool, read with HAS_MASK
    parts_ptr,  # [programs, 3] float64: count, mean, sum of squared distances from it
    n_cells,
    cells_per_part,  # a multiple of BLOCK
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    start = part * cells_per_part
    end = tl.minimum(start + cells_per_part, n_cells)
    count = tl.zeros([], tl.float64)
    mean = tl.zeros([], tl.float64)
    squares = tl.zeros([], tl.float64)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        kept = _kept(mask_ptr, at, end, HAS_MASK)
        x = tl.load(x_ptr + at, mask=kept, other=0.0).to(tl.float32)
        own = tl.sum(kept.to(tl.float32), 0)
        at_least_one = tl.where(own > 1.0, own, 1.0)
        near = tl.sum(x, 0) / at_least_one
        distance = tl.where(kept, x - near, 0.0)
        off = tl.sum(distance, 0).to(tl.float64) / at_least_one
        around = tl.sum(distance * distance, 0).to(tl.float64) - own * off * off
        around = tl.where(around < 0.0, 0.0, around)  # by rounding; NaN stays
        both = tl.where(own > 0.0, count + own, 1.0)
        step = tl.where(own > 0.0, near + off - mean, 0.0)
        mean += step * (own / both)
        squares += around + step * step * (count * (own / both))
        count += own
    _store_moments(parts_ptr + 3 * part, count, mean, squares)


@triton.jit(**GENERIC)
def _merge_kernel(
    parts_ptr,  # [n_parts, 3] float64
    moments_ptr,  # [3] float64
    n_parts,
    BLOCK_PARTS: tl.constexpr,
):
    count, mean, squares = _merged(parts_ptr, n_parts, BLOCK_PARTS)
    _store_moments(moments_ptr, count, mean, squares)


@triton.jit(**GENERIC)
def _whiten_kernel(
    x_ptr,  # [n_cells]
    mask_ptr,  # [n_cells] bool, read with HAS_MASK
    parts_ptr,  # [n_parts, 3] float64
    moments_ptr,  # [3] float64, written by the first program
    y_ptr,  # [n_cells] float32
    n_cells,
    cells_per_part,
    n_parts,
    eps,
    keep_mean,  # 1.0 or 0.0
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    count, mean, squares = _merged(parts_ptr, n_parts, BLOCK_PARTS)
    first_mean, rest, scale = _whitening(count, mean, squares, eps)
    shift = keep_mean * first_mean
    part = tl.program_id(0).to(tl.int64)
    if part == 0:
        _store_moments(moments_ptr, count, mean, squares)
    start = part * cells_per_part
    end = tl.minimum(start + cells_per_part, n_cells)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        kept = _kept(mask_ptr, at, end, HAS_MASK)
        x = tl.load(x_ptr + at, mask=kept, other=0.0).to(tl.float32)
        y = ((x - first_mean) - rest) * scale + shift
        tl.store(y_ptr + at, tl.where(kept, y, 0.0), mask=at < end)


@triton.jit(**GENERIC)
def _whiten_sums_kernel(
    grad_ptr,  # [n_cells] float32
    x_ptr,  # [n_cells]
    mask_ptr,  # [n_cells] bool, read with HAS_MASK
    moments_ptr,  # [3] float64
    sums_ptr,  # [programs, 2] float64: of g, and of g times the whitened x
    n_cells,
    cells_per_part,
    eps,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count, mean, squares = _load_moments(moments_ptr)
    mean, rest, scale = _whitening(count, mean, squares, eps)
    part = tl.program_id(0).to(tl.int64)
    start = part * cells_per_part
    end = tl.minimum(start + cells_per_part, n_cells)
    plain = tl.zeros([], tl.float64)
    along = tl.zeros([], tl.float64)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        kept = _kept(mask_ptr, at, end, HAS_MASK)
        g = tl.load(grad_ptr + at, mask=kept, other=0.0)
        x = tl.load(x_ptr + at, mask=kept, other=0.0).to(tl.float32)
        z = ((x - mean) - rest) * scale
        plain += tl.sum(g, 0).to(tl.float64)
        along += tl.sum(tl.where(kept, g * z, 0.0), 0).to(tl.float64)
    tl.store(sums_ptr + 2 * part, plain)
    tl.store(sums_ptr + 2 * part + 1, along)


@triton.jit(**GENERIC)
def _whiten_bwd_kernel(
    grad_ptr,  # [n_cells] float32
    x_ptr,  # [n_cells]
    mask_ptr,  # [n_cells] bool, read with HAS_MASK
    moments_ptr,  # [3] float64
    sums_ptr,  # [n_parts, 2] float64
    dx_ptr,  # [n_cells], the dtype of x
    n_cells,
    cells_per_part,
    n_parts,
    eps,
    keep_mean,  # 1.0 or 0.0
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    count, mean, squares = _load_moments(moments_ptr)
    mean, rest, scale = _whitening(count, mean, squares, eps)
    parts = tl.arange(0, BLOCK_PARTS)
    plain = tl.sum(tl.load(sums_ptr + 2 * parts, mask=parts < n_parts, other=0.0), 0)
    along = tl.sum(tl.load(sums_ptr + 2 * parts + 1, mask=parts < n_parts, other=0.0), 0)
    plain = (plain / tl.where(count > 1.0, count, 1.0)).to(tl.float32)
    along = (along / tl.where(count > 2.0, count - 1.0, 1.0)).to(tl.float32)
    part = tl.program_id(0).to(tl.int64)
    start = part * cells_per_part
    end = tl.minimum(start + cells_per_part, n_cells)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        kept = _kept(mask_ptr, at, end, HAS_MASK)
        g = tl.load(grad_ptr + at, mask=kept, other=0.0)
        x = tl.load(x_ptr + at, mask=kept, other=0.0).to(tl.float32)
        z = ((x - mean) - rest) * scale
        dx = scale * (g - plain - along * z) + keep_mean * plain
        dx = tl.where(kept, dx, 0.0).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + at, dx, mask=at < end)


def _parts(n: int) -> tuple[int, int]:
    """(number of parts, cells of each)."""
    blocks = triton.cdiv(n, BLOCK)
    each = max(1, triton.cdiv(blocks, MOST_PARTS))
    return max(1, triton.cdiv(blocks, each)), each * BLOCK


def _features(mask: Tensor | None) -> dict[str, int]:
    return {"HAS_MASK": mask is not None, "BLOCK": BLOCK, "num_warps": 8}


def _parts_of(x: Tensor, mask: Tensor | None) -> Tensor:
    n_parts, each = _parts(x.numel())
    parts = torch.empty(n_parts, 3, dtype=torch.float64, device=x.device)
    # An absent mask needs some pointer; the constexpr flag keeps it from being read.
    given = x if mask is None else mask
    _moments_kernel[(n_parts,)](x, given, parts, x.numel(), each, **_features(mask))
    return parts


def _by_parts(
    x: Tensor, mask: Tensor | None, parts: Tensor, eps: float, shift_mean: bool
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, dtype=torch.float32)
    moments = torch.empty(3, dtype=torch.float64, device=x.device)
    programs, each = _parts(x.numel())
    given = x if mask is None else mask
    sizes = (x.numel(), each, parts.shape[0])
    _whiten_kernel[(programs,)](
        x,
        given,
        parts,
        moments,
        y,
        *sizes,
        eps,
        0.0 if shift_mean else 1.0,
        **_features(mask),
        BLOCK_PARTS=MOST_PARTS,
    )
    return y, moments


def moments_fwd(x: Tensor, mask: Tensor | None) -> Tensor:
    """float64 [3]: count, mean and sum of squared distances from it."""
    x, mask = x.contiguous(), None if mask is None else mask.contiguous()
    with torch.cuda.device_of(x):
        parts = _parts_of(x, mask)
        moments = torch.empty(3, dtype=torch.float64, device=x.device)
        _merge_kernel[(1,)](parts, moments, parts.shape[0], BLOCK_PARTS=MOST_PARTS, num_warps=8)
    return moments


def whiten_fwd(
    x: Tensor, mask: Tensor | None, eps: float, shift_mean: bool
) -> tuple[Tensor, Tensor]:
    """The whitened cells, float32 and contiguous, and their moments."""
    x, mask = x.contiguous(), None if mask is None else mask.contiguous()
    with torch.cuda.device_of(x):
        return _by_parts(x, mask, _parts_of(x, mask), eps, shift_mean)


def whiten_by_fwd(
    x: Tensor, mask: Tensor | None, moments: Tensor, eps: float, shift_mean: bool
) -> Tensor:
    """The cells whitened by given moments."""
    x, mask = x.contiguous(), None if mask is None else mask.contiguous()
    with torch.cuda.device_of(x):
        return _by_parts(x, mask, moments.reshape(1, 3).contiguous(), eps, shift_mean)[0]


def whiten_bwd(
    grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, eps: float, shift_mean: bool
) -> Tensor:
    """dx, in the dtype of ``x`` and contiguous."""
    grad, x = grad.contiguous(), x.contiguous()
    mask = None if mask is None else mask.contiguous()
    dx = torch.empty_like(x)
    n_parts, each = _parts(x.numel())
    sums = torch.empty(n_parts, 2, dtype=torch.float64, device=x.device)
    given = (grad, x, x if mask is None else mask, moments, sums)
    features = _features(mask)
    with torch.cuda.device_of(x):
        _whiten_sums_kernel[(n_parts,)](*given, x.numel(), each, eps, **features)
        _whiten_bwd_kernel[(n_parts,)](
            *given,
            dx,
            x.numel(),
            each,
            n_parts,
            eps,
            0.0 if shift_mean else 1.0,
            **features,
            BLOCK_PARTS=MOST_PARTS,
        )
    return dx
