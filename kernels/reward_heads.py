"""K reward heads on rows of hidden states found by index; formulas: fastalign/ops/reward_heads.py.

``_reward_heads_kernel``: one program per block of samples, one read of their rows, scores and
statistics in one write.
``_reward_heads_bwd_kernel``: one program per block of columns and group of samples, one read of the
rows; it writes its columns of dhidden and a partial dweight, whose groups ``_fold_kernel`` adds up.
Samples of the same row are brought together first (a sort), so each row is written by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.backend import triton_interpreted
from fastalign.kernels.reduce_scores import dscores_fwd, heads_block, reduced_and_std

PROGRAMS = 256  # of the backward pass: what it takes to fill a large GPU
FOLD_BLOCK = 1024
INTERPRETED = tl.constexpr(triton_interpreted())


@triton.jit
def _tensor_cores(a, b, total):
    """total + a @ b of narrow numbers. The interpreter multiplies the bits of bfloat16; in float32
    the same products are exact."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total)


@triton.jit
def _dot(a, b, total):
    """total + a @ b: tensor cores when both are narrow, else float32 products."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return _tensor_cores(a, b, total)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


@triton.jit
def _dot_wide(a, b, total, SPLIT: tl.constexpr):
    """total + a @ b for float32 a. SPLIT: b is bfloat16, and 16 bits of a will do."""
    if SPLIT:
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        return _tensor_cores(low, b, _tensor_cores(high, b, total))
    return tl.dot(a, b.to(tl.float32), total, input_precision="ieee")


@triton.jit(do_not_specialize=["n_samples", "n_rows", "heads", "stride_hidden_n", "lower", "upper"])
def _reward_heads_kernel(
    hidden_ptr,  # [n_rows, width]
    weight_ptr,  # [heads, width]
    bias_ptr,  # [heads], read with HAS_BIAS
    index_ptr,  # [n_samples], read with HAS_INDEX
    scores_ptr,  # [n_samples, heads] float32
    reduced_ptr,  # [n_samples] float32, as std
    std_ptr,
    n_samples,
    n_rows,
    width,
    heads,
    stride_hidden_n,
    lower,
    upper,
    std_coef,
    variance_coef,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
):
    samples = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = samples < n_samples
    rows = samples
    if HAS_INDEX:
        rows = tl.load(index_ptr + samples, mask=inside, other=0).to(tl.int64)
    known = inside & (rows >= 0) & (rows < n_rows)
    columns = tl.arange(0, BLOCK_K)
    x_ptr = hidden_ptr + rows[:, None] * stride_hidden_n
    w_ptr = weight_ptr + columns[None, :] * width
    total = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    for start in range(0, width, 2 * BLOCK_D):
        # Tensor cores cut off what does not fit their sums, which adds up over thousands of
        # columns: these are summed in blocks. A block of two products is one that the compiler
        # does not merge with the total.
        part = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
        for half in tl.static_range(2):
            d = start + half * BLOCK_D + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + d[None, :], mask=known[:, None] & (d < width)[None, :], other=0.0)
            w_mask = (d < width)[:, None] & (columns < heads)[None, :]
            part = _dot(x, tl.load(w_ptr + d[:, None], mask=w_mask, other=0.0), part)
        total += part
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=columns < heads, other=0.0).to(tl.float32)[None]
    # An index outside the rows reads nothing and gives NaN: wrong input must not look like a
    # number.
    total = tl.where(known[:, None], total, float("nan"))
    real = inside[:, None] & (columns < heads)[None, :]
    tl.store(scores_ptr + samples[:, None] * heads + columns[None, :], total, mask=real)
    reduced, std = reduced_and_std(
        total, real, columns[None, :], heads, lower, upper, std_coef, variance_coef
    )
    tl.store(reduced_ptr + samples, reduced, mask=inside)
    tl.store(std_ptr + samples, std, mask=inside)


@triton.jit(do_not_specialize=["n_samples", "n_rows", "heads", "stride_hidden_n", "per_group"])
def _reward_heads_bwd_kernel(
    dscores_ptr,  # [n_samples, heads] float32, 0 where a row comes again
    rows_ptr,  # [n_samples] ascending, read with HAS_INDEX
    hidden_ptr,  # [n_rows, width]
    weight_ptr,  # [heads, width]
    dhidden_ptr,  # [n_rows, width], written with HAS_DHIDDEN
    dweights_ptr,  # [groups, heads, width] float32, written with HAS_DWEIGHT, as dbiases
    dbiases_ptr,  # [groups, heads] float32
    n_samples,
    n_rows,
    width,
    heads,
    stride_hidden_n,
    per_group,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_DHIDDEN: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
):
    # Gradients that are stored as bfloat16 need no more than 16 bits of each factor.
    SPLIT: tl.constexpr = (hidden_ptr.dtype.element_ty == tl.bfloat16) and (
        weight_ptr.dtype.element_ty == tl.bfloat16
    )
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    group = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    dweight = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, per_group, BLOCK_B):
        places = group * per_group + start + tl.arange(0, BLOCK_B)
        mine = places < n_samples
        rows = places
        if HAS_INDEX:
            rows = tl.load(rows_ptr + places, mask=mine, other=-1).to(tl.int64)
            before = tl.load(rows_ptr + places - 1, mask=mine & (places > 0), other=-1)
            mine = mine & ((places == 0) | (rows != before))
        known = mine & (rows >= 0) & (rows < n_rows)
        g_ptr = dscores_ptr + places[:, None] * heads
        mask = known[:, None] & (d < width)[None, :]
        if HAS_DWEIGHT:
            g_mask = known[:, None] & (columns < heads)[None, :]
            g = tl.load(g_ptr + columns[None, :], mask=g_mask, other=0.0)
            x = tl.load(
                hidden_ptr + rows[:, None] * stride_hidden_n + d[None, :], mask=mask, other=0.0
            )
            dweight = _dot_wide(tl.trans(g), x, dweight, SPLIT)
            dbias += tl.sum(g, 0)
        if HAS_DHIDDEN:
            dx = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
            for first in tl.static_range(0, BLOCK_K, 16):  # more heads at once would not fit
                k = first + tl.arange(0, 16)
                some = tl.load(
                    g_ptr + k[None, :], mask=mine[:, None] & (k < heads)[None, :], other=0.0
                )
                w = tl.load(
                    weight_ptr + k[:, None] * width + d[None, :],
                    mask=(k < heads)[:, None] & (d < width)[None, :],
                    other=0.0,
                )
                dx = _dot_wide(some, w, dx, SPLIT)
            out = dhidden_ptr + rows[:, None] * width + d[None, :]
            tl.store(out, dx.to(dhidden_ptr.dtype.element_ty), mask=mask)
    if HAS_DWEIGHT:
        out = dweights_ptr + (group * heads + columns)[:, None] * width + d[None, :]
        tl.store(out, dweight, mask=(columns < heads)[:, None] & (d < width)[None, :])
        if tl.program_id(0) == 0:
            tl.store(dbiases_ptr + group * heads + columns, dbias, mask=columns < heads)


@triton.jit(do_not_specialize=["size", "groups"])
def _fold_kernel(
    parts_ptr,  # [groups, size] float32
    out_ptr,  # [size]
    size,
    groups,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(groups):
        total += tl.load(parts_ptr + at, mask=at < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


def _forward_blocks(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile: what fits the registers, more of them for float32 products."""
    narrow = hidden.dtype == weight.dtype != torch.float32
    return 16 if weight.shape[0] > 32 else 32, 64 if narrow else 32


def _backward_blocks(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    block_k = heads_block(weight.shape[0])
    if hidden.dtype == weight.dtype == torch.bfloat16:
        return 32, 2048 // block_k
    if torch.float16 in (hidden.dtype, weight.dtype):
        return 16, max(16, 512 // block_k)
    return 32 if block_k == 16 else 16, max(16, 512 // block_k)


def _dense_rows(hidden: Tensor) -> Tensor:
    return hidden if hidden.stride(1) == 1 or hidden.shape[1] == 1 else hidden.contiguous()


def reward_heads_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    statistic: tuple[int, int, float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = _dense_rows(hidden), weight.contiguous()
    n = hidden.shape[0] if index is None else index.shape[0]
    heads, width = weight.shape
    scores = torch.empty(n, heads, dtype=torch.float32, device=hidden.device)
    reduced = torch.empty(n, dtype=torch.float32, device=hidden.device)
    std = torch.empty_like(reduced)
    if n > 0:
        block_b, block_d = _forward_blocks(hidden, weight)
        with torch.cuda.device_of(hidden):
            # Absent tensors need some pointer; the constexpr flags keep it from being read.
            _reward_heads_kernel[(triton.cdiv(n, block_b),)](
                hidden,
                weight,
                weight if bias is None else bias.contiguous(),
                reduced if index is None else index.contiguous(),
                scores,
                reduced,
                std,
                n,
                hidden.shape[0],
                width,
                heads,
                hidden.stride(0),
                *statistic,
                BLOCK_B=block_b,
                BLOCK_K=heads_block(heads),
                BLOCK_D=block_d,
                HAS_BIAS=bias is not None,
                HAS_INDEX=index is not None,
                num_warps=4,
            )
    return scores, reduced, std


def reward_heads_bwd(
    dhidden: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    grad_scores: Tensor | None,
    grad_reduced: Tensor | None,
    grad_std: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    index: Tensor | None,
    scores: Tensor,
    statistic: tuple[int, int, float, float],
) -> None:
    """Fills dhidden, dweight and dbias, contiguous; those without elements are left alone."""
    hidden, weight = _dense_rows(hidden), weight.contiguous()
    n = scores.shape[0]
    heads, width = weight.shape
    if index is not None or n == 0:
        dhidden.zero_()
    if n == 0:
        dweight.zero_()
        dbias.zero_()
        return
    order = None if index is None else torch.sort(index, stable=True)
    dscores = dscores_fwd(grad_scores, grad_reduced, grad_std, scores, order, statistic)
    block_b, block_d = _backward_blocks(hidden, weight)
    blocks, blocks_d = triton.cdiv(n, block_b), triton.cdiv(width, block_d)
    # A number that depends on nothing but the shapes: the order of the sums is fixed.
    groups = min(blocks, max(1, PROGRAMS // blocks_d))
    per_group = triton.cdiv(blocks, groups) * block_b
    groups = triton.cdiv(n, per_group)
    with_heads = dweight.numel() > 0
    shape = (groups, heads) if with_heads else (0, 0)
    dweights = torch.empty((*shape, width), dtype=torch.float32, device=hidden.device)
    dbiases = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        _reward_heads_bwd_kernel[(blocks_d, groups)](
            dscores,
            dscores if order is None else order.values,
            hidden,
            weight,
            dhidden,
            dweights,
            dbiases,
            n,
            hidden.shape[0],
            width,
            heads,
            hidden.stride(0),
            per_group,
            BLOCK_B=block_b,
            BLOCK_K=heads_block(heads),
            BLOCK_D=block_d,
            HAS_INDEX=index is not None,
            HAS_DHIDDEN=dhidden.numel() > 0,
            HAS_DWEIGHT=with_heads,
            num_warps=4,
        )
        if with_heads:
            for parts, out in ((dweights, dweight), (dbiases, dbias)):
                _fold_kernel[(triton.cdiv(out.numel(), FOLD_BLOCK),)](
                    parts, out, out.numel(), groups, BLOCK=FOLD_BLOCK, num_warps=4
                )
