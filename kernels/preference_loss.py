"""Preference losses of packed sequences; formula: fastalign/losses/preference_terms.py.

Forward: one program per pair (KTO: per sequence) adds up the log-probs of its sequences and writes
its loss, its slopes and what people log; each log-prob is read once. Backward: each token gets its
sequence's slope times its pair's upstream gradient; a sequence's tokens may be cut among programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels._device import log1p_unit
from fastalign.losses.preference_terms import (
    KTO_STATISTICS,
    PAIR_STATISTICS,
    PREFERENCE_KINDS,
    PreferenceForm,
)

BLOCK = 1024
BLOCKS_PER_PROGRAM = 4  # of an average sequence, before a second program helps to write it
MOST_PROGRAMS = 64
SIGMOID, HINGE, KTO = (tl.constexpr(PREFERENCE_KINDS.index(k)) for k in ("sigmoid", "hinge", "kto"))
NAN = tl.constexpr(float("nan"))
# One compilation serves all sizes and alignments.
GENERIC_FWD = {
    "do_not_specialize": ["n_tokens", "n_values"],
    "do_not_specialize_on_alignment": [
        f"{name}_ptr"
        for name in ("logp", "ref_logp", "cu", "mask", "flags", "z0", "losses", "slopes", "stats")
    ],
}
GENERIC_BWD = {
    "do_not_specialize": ["n_tokens", "per_value", "stride_grad"],
    "do_not_specialize_on_alignment": [
        "grad_ptr", "slopes_ptr", "cu_ptr", "mask_ptr", "dlogp_ptr"
    ],
}  # fmt: skip


@triton.jit
def _sums(
    logp_ptr,
    ref_logp_ptr,
    mask_ptr,
    begin,
    end,
    HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the tokens begin..end that count: sum of logp - ref_logp, sum of logp, their number."""
    gaps = tl.zeros([BLOCK], tl.float32)
    logps = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        kept = at < end
        if HAS_MASK:
            kept = kept & (tl.load(mask_ptr + at, mask=kept, other=0) != 0)
        logp = tl.load(logp_ptr + at, mask=kept, other=0.0).to(tl.float32)
        logps += logp
        if HAS_REF:
            gaps += logp - tl.load(ref_logp_ptr + at, mask=kept, other=0.0).to(tl.float32)
        count += kept.to(tl.float32)
    total = tl.sum(logps, 0)
    gap = total
    if HAS_REF:
        gap = tl.sum(gaps, 0)
    return gap, total, tl.sum(count, 0)


@triton.jit
def _reward(gap_sum, total, count, average, gap, extra, length):
    """The implicit reward, the log-prob that is logged, and what both are divided by."""
    n = tl.where(average > 0.0, tl.maximum(count, 1.0), 1.0)
    # A coefficient of 0 must not turn an infinite sum into NaN.
    reward = gap * gap_sum + tl.where(extra != 0.0, extra * total, 0.0)
    return reward / n + length * count, total / n, n


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _softplus(x):
    """log(1 + exp(x))"""
    return tl.where(x > 0.0, x, 0.0) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit(**GENERIC_FWD)
def _preference_loss_kernel(
    logp_ptr,  # [n_tokens]
    ref_logp_ptr,  # [n_tokens], read with HAS_REF
    cu_ptr,  # [S + 1] int64
    mask_ptr,  # [n_tokens] bool, read with HAS_MASK
    flags_ptr,  # [n_values] bool, read with HAS_FLAGS
    z0_ptr,  # [1] float32, read by KTO
    losses_ptr,  # [n_values] float32, as all below
    slopes_ptr,  # [S]
    stats_ptr,  # [statistics, n_values]
    n_tokens,
    n_values,
    average,
    gap,
    extra,
    length,
    margin,
    right,
    wrong,
    nll_sum,
    nll_mean,
    optimism,
    KIND: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    value = tl.program_id(0).to(tl.int64)
    last = value == n_values - 1
    flag = value < 0
    if HAS_FLAGS:
        flag = tl.load(flags_ptr + value) != 0
    if KIND == KTO:
        begin = tl.load(cu_ptr + value)
        end = tl.load(cu_ptr + value + 1)
        fits = (begin <= end) & ((value > 0) | (begin == 0))
        fits = fits & (begin >= 0) & (end <= n_tokens) & ((end == n_tokens) | (not last))
        end = tl.where(fits, end, begin)
        gap_sum, total, count = _sums(
            logp_ptr, ref_logp_ptr, mask_ptr, begin, end, HAS_REF, HAS_MASK, BLOCK
        )
        reward, logp, n = _reward(gap_sum, total, count, average, gap, extra, length)
        x = reward - gap * tl.load(z0_ptr)
        up = _sigmoid(x)
        down = _sigmoid(-x)
        loss = tl.where(flag, right * down, wrong * up)
        slope = tl.where(flag, -right, wrong) * up * down * ((gap + extra) / n)
        some = count > 0.0
        loss = tl.where(fits, tl.where(some, loss, 0.0), NAN)
        tl.store(losses_ptr + value, loss)
        tl.store(slopes_ptr + value, tl.where(fits, slope, NAN))
        row = n_values.to(tl.int64)
        tl.store(stats_ptr + value, tl.where(some & flag, reward, NAN))
        tl.store(stats_ptr + row + value, tl.where(some & (flag == 0), reward, NAN))
        tl.store(stats_ptr + 2 * row + value, tl.where(some & flag, logp, NAN))
        tl.store(stats_ptr + 3 * row + value, tl.where(some & (flag == 0), logp, NAN))
    else:
        begin = tl.load(cu_ptr + 2 * value)
        middle = tl.load(cu_ptr + 2 * value + 1)
        end = tl.load(cu_ptr + 2 * value + 2)
        fits = (begin <= middle) & (middle <= end) & ((value > 0) | (begin == 0))
        fits = fits & (begin >= 0) & (end <= n_tokens) & ((end == n_tokens) | (not last))
        middle = tl.where(fits, middle, begin)
        end = tl.where(fits, end, begin)
        gap_sum, total_w, count_w = _sums(
            logp_ptr, ref_logp_ptr, mask_ptr, begin, middle, HAS_REF, HAS_MASK, BLOCK
        )
        reward_w, logp_w, n_w = _reward(gap_sum, total_w, count_w, average, gap, extra, length)
        gap_sum, total_l, count_l = _sums(
            logp_ptr, ref_logp_ptr, mask_ptr, middle, end, HAS_REF, HAS_MASK, BLOCK
        )
        reward_l, logp_l, n_l = _reward(gap_sum, total_l, count_l, average, gap, extra, length)
        h = reward_w - reward_l - margin
        if KIND == SIGMOID:
            loss = right * _softplus(-h) + tl.where(wrong != 0.0, wrong * _softplus(h), 0.0)
            slope = wrong * _sigmoid(h) - right * _sigmoid(-h)
        elif KIND == HINGE:
            loss = tl.where(h >= 1.0, 0.0, 1.0 - h)
            slope = tl.where(h >= 1.0, 0.0, -1.0)
        else:
            loss = right * (h - 0.5) * (h - 0.5)
            slope = 2.0 * right * (h - 0.5)
        slope *= gap + extra
        many_w = tl.maximum(count_w, 1.0)
        loss -= tl.where(nll_sum != 0.0, nll_sum * total_w, 0.0)
        loss -= tl.where(nll_mean != 0.0, nll_mean * total_w / many_w, 0.0)
        slope_w = slope / n_w - nll_sum - nll_mean / many_w
        slope_l = -slope / n_l
        if HAS_FLAGS:
            loss += tl.where(optimism != 0.0, optimism * tl.where(flag, total_w, total_l), 0.0)
            slope_w += tl.where(flag, optimism, 0.0)
            slope_l += tl.where(flag, 0.0, optimism)
        some = count_w + count_l > 0.0
        loss = tl.where(fits, tl.where(some, loss, 0.0), NAN)
        tl.store(losses_ptr + value, loss)
        tl.store(slopes_ptr + 2 * value, tl.where(fits, slope_w, NAN))
        tl.store(slopes_ptr + 2 * value + 1, tl.where(fits, slope_l, NAN))
        row = n_values.to(tl.int64)
        gain = reward_w - reward_l
        tl.store(stats_ptr + value, tl.where(some, reward_w, NAN))
        tl.store(stats_ptr + row + value, tl.where(some, reward_l, NAN))
        tl.store(stats_ptr + 2 * row + value, tl.where(some, gain, NAN))
        tl.store(stats_ptr + 3 * row + value, tl.where(some, tl.where(gain > 0.0, 1.0, 0.0), NAN))
        tl.store(stats_ptr + 4 * row + value, tl.where(some, logp_w, NAN))
        tl.store(stats_ptr + 5 * row + value, tl.where(some, logp_l, NAN))


@triton.jit(**GENERIC_BWD)
def _preference_loss_backward_kernel(
    grad_ptr,  # [n_values]
    slopes_ptr,  # [S] float32
    cu_ptr,  # [S + 1] int64
    mask_ptr,  # [n_tokens] bool, read with HAS_MASK
    dlogp_ptr,  # [n_tokens] float32
    n_tokens,
    per_value,
    stride_grad,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_ptr + sequence)
    end = tl.load(cu_ptr + sequence + 1)
    # Bounds that make no sense have a NaN slope; they must not write elsewhere either.
    begin = tl.where(begin < 0, 0, begin)
    end = tl.where(end > n_tokens, n_tokens, end)
    slope = tl.load(slopes_ptr + sequence)
    slope *= tl.load(grad_ptr + sequence // per_value * stride_grad)
    step = tl.num_programs(1).to(tl.int64) * BLOCK
    for start in range(begin + tl.program_id(1) * BLOCK, end, step):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = at < end
        dlogp = tl.zeros([BLOCK], tl.float32) + slope
        if HAS_MASK:
            kept = tl.load(mask_ptr + at, mask=inside, other=0) != 0
            dlogp = tl.where(kept, dlogp, 0.0)
        tl.store(dlogp_ptr + at, dlogp, mask=inside)


def preference_loss_fwd(
    form: PreferenceForm,
    logp: Tensor,
    ref_logp: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    flags: Tensor | None,
    z0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """losses [G], slopes [S], statistics [n, G]; arguments as in ``preference_loss_reference``."""
    sequences = cu_seqlens.shape[0] - 1
    values = sequences // 2 if form.paired else sequences
    names = PAIR_STATISTICS if form.paired else KTO_STATISTICS

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logp.device)

    losses, slopes, statistics = make(values), make(sequences), make(len(names), values)
    if values == 0:
        return losses, slopes, statistics
    # Absent tensors need some pointer; the constexpr flags keep it from being read.
    optional = [slopes if x is None else x.contiguous() for x in (ref_logp, mask, flags, z0)]
    with torch.cuda.device_of(logp):
        _preference_loss_kernel[(values,)](
            logp.contiguous(),
            optional[0],
            cu_seqlens.contiguous(),
            *optional[1:],
            losses,
            slopes,
            statistics,
            logp.shape[0],
            values,
            float(form.average),
            *form[2:],
            KIND=form.kind,
            HAS_REF=ref_logp is not None,
            HAS_MASK=mask is not None,
            HAS_FLAGS=flags is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return losses, slopes, statistics


def preference_loss_bwd(
    grad: Tensor, slopes: Tensor, cu_seqlens: Tensor, mask: Tensor | None, n_tokens: int
) -> Tensor:
    """dlogp [n_tokens] float32."""
    dlogp = torch.empty(n_tokens, dtype=torch.float32, device=slopes.device)
    sequences = slopes.shape[0]
    if n_tokens == 0:
        return dlogp
    each = n_tokens // (sequences * BLOCKS_PER_PROGRAM * BLOCK)
    with torch.cuda.device_of(slopes):
        _preference_loss_backward_kernel[(sequences, max(1, min(each, MOST_PROGRAMS)))](
            grad,
            slopes,
            cu_seqlens.contiguous(),
            slopes if mask is None else mask.contiguous(),
            dlogp,
            n_tokens,
            sequences // grad.shape[0],
            grad.stride(0),
            HAS_MASK=mask is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return dlogp
