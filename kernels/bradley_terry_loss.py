"""Bradley-Terry loss and gradient in one launch; formula: fastalign/ops/bradley_terry_loss.py.

One program per block of pairs, all heads in one tile. Each program adds up the head mask for
itself, because the gradient of a cell needs the sum over its whole column; where many programs
would, the mask is added up before. A single program writes the loss; several write parts of it, to
be added up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels._device import log1p_unit

BLOCK_CELLS = 2048  # pairs times heads of one program
MOST_READERS = 32  # programs that add up the whole head mask for themselves


@triton.jit(
    do_not_specialize=[
        "n_pairs",
        "heads",
        "stride_chosen_b",
        "stride_chosen_k",
        "stride_rejected_b",
        "stride_rejected_k",
        "stride_margin_b",
        "stride_margin_k",
        "stride_mask_b",
        "stride_mask_k",
    ]
)
def _bradley_terry_loss_kernel(
    chosen_ptr,  # [n_pairs, heads]
    rejected_ptr,  # [n_pairs, heads]
    margin_ptr,  # [n_pairs, heads or 1], read with HAS_MARGIN
    mask_ptr,  # [n_pairs, heads], read with HAS_MASK
    totals_ptr,  # [heads], read with HAS_TOTALS
    parts_ptr,  # [programs] float32
    dgap_ptr,  # [n_pairs, heads] float32
    n_pairs,
    heads,
    stride_chosen_b,
    stride_chosen_k,
    stride_rejected_b,
    stride_rejected_k,
    stride_margin_b,
    stride_margin_k,
    stride_mask_b,
    stride_mask_k,
    offset,
    label_smoothing,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TOTALS: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_K)
    totals = tl.zeros([BLOCK_K], tl.float32) + n_pairs
    if HAS_TOTALS:
        totals = tl.load(totals_ptr + columns, mask=columns < heads, other=1.0).to(tl.float32)
    elif HAS_MASK:
        counts = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
        for start in range(0, n_pairs, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            inside = (b < n_pairs)[:, None] & (columns < heads)[None, :]
            at = b.to(tl.int64)[:, None] * stride_mask_b + columns[None, :] * stride_mask_k
            times = tl.load(mask_ptr + at, mask=inside, other=0).to(tl.float32)
            counts += tl.where(times > 0.0, times, 0.0)
        totals = tl.sum(counts, 0)
    weight = 1.0 / (tl.where(totals > 1.0, totals, 1.0) * heads)

    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = (b < n_pairs)[:, None] & (columns < heads)[None, :]
    kept = inside
    times = tl.where(inside, 1.0, 0.0)
    if HAS_MASK:
        at = b[:, None] * stride_mask_b + columns[None, :] * stride_mask_k
        times = tl.load(mask_ptr + at, mask=inside, other=0).to(tl.float32)
        kept = times > 0.0
    at = b[:, None] * stride_chosen_b + columns[None, :] * stride_chosen_k
    gap = tl.load(chosen_ptr + at, mask=kept, other=0.0).to(tl.float32)
    at = b[:, None] * stride_rejected_b + columns[None, :] * stride_rejected_k
    gap = gap - tl.load(rejected_ptr + at, mask=kept, other=0.0).to(tl.float32) - offset
    if HAS_MARGIN:
        at = b[:, None] * stride_margin_b + columns[None, :] * stride_margin_k
        gap -= tl.load(margin_ptr + at, mask=kept, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(gap))
    loss = tl.where(gap < 0.0, -gap, 0.0) + log1p_unit(e)
    # Without smoothing an infinite gap must not become NaN.
    loss += tl.where(label_smoothing > 0.0, label_smoothing * gap, 0.0)
    slope = label_smoothing - tl.where(gap < 0.0, 1.0, e) / (1.0 + e)
    share = times * weight[None, :]
    tl.store(
        parts_ptr + tl.program_id(0).to(tl.int64),
        tl.sum(tl.sum(tl.where(kept, share * loss, 0.0), 1), 0),
    )
    at = b[:, None] * heads + columns[None, :]
    tl.store(dgap_ptr + at, tl.where(kept, share * slope, 0.0), mask=inside)


def bradley_terry_loss_fwd(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    offset: float,
    head_mask: Tensor | None,
    totals: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """(loss, dL/dgap); arguments as in the op ``fastalign::bradley_terry_loss``."""
    n, heads = chosen.shape
    dgap = torch.empty(n, heads, dtype=torch.float32, device=chosen.device)
    if n == 0:
        return dgap.new_zeros(()), dgap
    block_k = triton.next_power_of_2(heads)
    block_b = max(1, BLOCK_CELLS // block_k)
    programs = triton.cdiv(n, block_b)
    if totals is None and head_mask is not None and programs > MOST_READERS:
        counts = head_mask if head_mask.dtype == torch.bool else head_mask.clamp(min=0)
        totals = counts.sum(0)
    parts = torch.empty(programs, dtype=torch.float32, device=chosen.device)
    strides = list(chosen.stride()) + list(rejected.stride())
    strides += [0, 0] if margin is None else list(margin.expand(n, heads).stride())
    strides += [0, 0] if head_mask is None else list(head_mask.stride())
    # Absent tensors need some pointer; the constexpr flags keep it from being read.
    optional = [dgap if x is None else x for x in (margin, head_mask)]
    with torch.cuda.device_of(chosen):
        _bradley_terry_loss_kernel[(programs,)](
            chosen,
            rejected,
            *optional,
            dgap if totals is None else totals.contiguous(),
            parts,
            dgap,
            n,
            heads,
            *strides,
            offset,
            label_smoothing,
            BLOCK_B=block_b,
            BLOCK_K=block_k,
            HAS_MARGIN=margin is not None,
            HAS_MASK=head_mask is not None,
            HAS_TOTALS=totals is not None,
            num_warps=8,
        )
    return (parts[0].clone() if programs == 1 else parts.sum()), dgap
