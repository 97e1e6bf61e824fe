"""Losses on log-probs and their slopes in one launch; formulas: fastalign/ops/policy_terms.py.

One program per block of tokens: it reads each input once, writes each gradient once, and either the
loss of every token or its block's sums. ``_policy_loss_sum_kernel`` adds the blocks' sums in a
fixed order (no atomics) and divides them by the number of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.losses.ratio import MAX_LOG_RATIO
from fastalign.ops.policy_terms import COLUMNS, KINDS, KLS, Form, Tokens

BLOCK = 1024
BLOCK_ROWS = 128  # blocks whose sums are added at once
N_STATISTICS = tl.constexpr(len(COLUMNS))
N_COLUMNS = tl.constexpr(16)  # N_STATISTICS, rounded up to a power of 2
(POLICY, VALUE, COUNT, RATIO, CLIPPED, WEIGHT, WEIGHT_SQUARED, ENTROPY) = (
    tl.constexpr(i) for i in range(8)
)
(REF_K1, REF_K2, REF_K3, OLD_K1, OLD_K2, OLD_K3, VALUE_CLIPPED) = (
    tl.constexpr(i) for i in range(8, 15)
)
FARTHEST = tl.constexpr(MAX_LOG_RATIO)
MLE, APA, AWR, CISPO = (tl.constexpr(KINDS.index(kind)) for kind in ("mle", "apa", "awr", "cispo"))
K1, K2 = (tl.constexpr(KLS.index(kind)) for kind in ("k1", "k2"))
INPUTS = [f"{name}_ptr" for name in Tokens._fields]
OUTPUTS = ["losses_ptr", "dlogp_ptr", "dentropy_ptr", "dvalues_ptr", "partials_ptr"]
# One compilation serves all sizes and alignments.
GENERIC = {
    "do_not_specialize": ["n_tokens", "tokens_per_scale"],
    "do_not_specialize_on_alignment": [*INPUTS, *OUTPUTS],
}


@triton.jit
def _capped(x, most):
    """min(x, most); NaN stays."""
    return tl.where(x > most, most, x)


@triton.jit
def _k3(d):
    """exp(d) - 1 - d for d <= FARTHEST: a series where the difference would lose its digits."""
    series = 1.0 / 720.0 + d * (1.0 / 5040.0 + d * (1.0 / 40320.0))
    series = 0.5 + d * (1.0 / 6.0 + d * (1.0 / 24.0 + d * (1.0 / 120.0 + d * series)))
    return tl.where(tl.abs(d) < 0.5, d * d * series, tl.exp(d) - 1.0 - d)


@triton.jit
def _total(x, kept):
    return tl.sum(tl.where(kept, x, 0.0), 0)


@triton.jit(**GENERIC)
def _policy_loss_kernel(
    logp_ptr,  # [N] float32, as all below but mask and scale
    entropy_ptr,
    advantages_ptr,
    old_logp_ptr,
    ref_logp_ptr,
    weights_ptr,
    log_ratio_ptr,
    values_ptr,
    returns_ptr,
    old_values_ptr,
    mask_ptr,  # [N] bool
    scale_ptr,  # [N / tokens_per_scale] float32
    losses_ptr,  # [N] float32, as the gradients
    dlogp_ptr,
    dentropy_ptr,
    dvalues_ptr,
    partials_ptr,  # [blocks, N_COLUMNS] float32
    n_tokens,
    tokens_per_scale,
    coef,
    lower,
    upper,
    most,
    kl_coef,
    entropy_coef,
    vf_coef,
    value_clip,
    KIND: tl.constexpr,
    KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_LOG_RATIO: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_VALUE_CLIP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_tokens
    kept = inside
    if HAS_MASK:
        kept = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr + at // tokens_per_scale, mask=kept, other=0.0)
    columns = tl.arange(0, N_COLUMNS)
    sums = tl.zeros([N_COLUMNS], tl.float32)
    if HAS_SUMS:
        sums = tl.where(columns == COUNT, tl.sum(kept.to(tl.float32), 0), sums)

    if KIND != 0:
        logp = tl.load(logp_ptr + at, mask=kept, other=0.0)
        log_ratio = tl.zeros([BLOCK], tl.float32)
        if HAS_OLD:
            log_ratio = logp - tl.load(old_logp_ptr + at, mask=kept, other=0.0)
            if HAS_SUMS:
                d = _capped(-log_ratio, FARTHEST)
                sums = tl.where(columns == OLD_K1, _total(log_ratio, kept), sums)
                sums = tl.where(columns == OLD_K2, _total(0.5 * log_ratio * log_ratio, kept), sums)
                sums = tl.where(columns == OLD_K3, _total(_k3(d), kept), sums)
        if HAS_LOG_RATIO:
            log_ratio = tl.load(log_ratio_ptr + at, mask=kept, other=0.0)
        ratio = tl.exp(_capped(log_ratio, FARTHEST))
        clipped = tl.zeros([BLOCK], tl.int1)
        if KIND == MLE:
            weight = tl.full([BLOCK], 1.0, tl.float32)
            if HAS_WEIGHTS:
                weight = tl.load(weights_ptr + at, mask=kept, other=0.0)
            policy = -weight * logp
            slope = -weight
        else:
            advantages = tl.load(advantages_ptr + at, mask=kept, other=0.0)
            if KIND == APA:
                target = coef * advantages + tl.load(ref_logp_ptr + at, mask=kept, other=0.0)
                weight = logp - target
                policy = weight * weight
                slope = 2.0 * weight
            elif KIND == AWR:
                scaled = coef * advantages
                clipped = scaled > upper
                weight = tl.exp(_capped(scaled, upper))
                policy = -weight * logp
                slope = -weight
            elif KIND == CISPO:
                clipped = (log_ratio > upper) | (log_ratio < lower)
                raised = tl.where(log_ratio < lower, lower, log_ratio)
                weight = tl.exp(_capped(raised, upper))
                policy = -weight * advantages * logp
                slope = -weight * advantages
            else:
                good = advantages >= 0.0
                raised = tl.where(log_ratio < lower, lower, log_ratio)
                bounded = tl.where(good, _capped(log_ratio, upper), _capped(raised, most))
                weight = tl.exp(bounded)
                policy = -weight * advantages
                held = bounded != log_ratio
                slope = tl.where(held, 0.0, policy)
                clipped = held & (advantages != 0.0)
        if HAS_REF:
            k1 = logp - tl.load(ref_logp_ptr + at, mask=kept, other=0.0)
            d = _capped(-k1, FARTHEST)
            k2 = 0.5 * k1 * k1
            k3 = _k3(d)
            if KL == K1:
                policy += kl_coef * k1
                slope += kl_coef
            elif KL == K2:
                policy += kl_coef * k2
                slope += kl_coef * k1
            elif KL != 0:
                policy += kl_coef * k3
                slope += tl.where(d == -k1, kl_coef * (1.0 - tl.exp(d)), 0.0)
            if HAS_SUMS:
                sums = tl.where(columns == REF_K1, _total(k1, kept), sums)
                sums = tl.where(columns == REF_K2, _total(k2, kept), sums)
                sums = tl.where(columns == REF_K3, _total(k3, kept), sums)
        if HAS_ENTROPY:
            entropy = tl.load(entropy_ptr + at, mask=kept, other=0.0)
            if HAS_DENTROPY:
                policy -= entropy_coef * entropy
                dentropy = tl.where(kept, -entropy_coef * scale, 0.0)
                tl.store(dentropy_ptr + at, dentropy, mask=inside)
            if HAS_SUMS:
                sums = tl.where(columns == ENTROPY, _total(entropy, kept), sums)
        tl.store(dlogp_ptr + at, tl.where(kept, slope * scale, 0.0), mask=inside)
        if HAS_SUMS:
            sums = tl.where(columns == POLICY, _total(policy * scale, kept), sums)
            sums = tl.where(columns == RATIO, _total(ratio, kept), sums)
            sums = tl.where(columns == CLIPPED, _total(clipped.to(tl.float32), kept), sums)
            sums = tl.where(columns == WEIGHT, _total(weight, kept), sums)
            sums = tl.where(columns == WEIGHT_SQUARED, _total(weight * weight, kept), sums)
        else:
            tl.store(losses_ptr + at, policy, mask=inside)

    if HAS_VALUES:
        values = tl.load(values_ptr + at, mask=kept, other=0.0)
        returns = tl.load(returns_ptr + at, mask=kept, other=0.0)
        error = values - returns
        worst = error
        slope = error
        if HAS_VALUE_CLIP:
            old_values = tl.load(old_values_ptr + at, mask=kept, other=0.0)
            low = old_values - value_clip
            in_band = _capped(tl.where(values < low, low, values), old_values + value_clip)
            in_band -= returns
            held = in_band * in_band > error * error
            worst = tl.where(held, in_band, error)
            slope = tl.where(held, 0.0, error)
            sums = tl.where(columns == VALUE_CLIPPED, _total(held.to(tl.float32), kept), sums)
        sums = tl.where(columns == VALUE, _total(0.5 * worst * worst * scale, kept), sums)
        tl.store(dvalues_ptr + at, tl.where(kept, vf_coef * slope * scale, 0.0), mask=inside)

    if HAS_SUMS:
        tl.store(partials_ptr + block * N_COLUMNS + columns, sums)


@triton.jit(**{"do_not_specialize": ["n_blocks"]})
def _policy_loss_sum_kernel(
    partials_ptr,  # [n_blocks, N_COLUMNS]
    total_ptr,  # [1]
    statistics_ptr,  # [N_STATISTICS]
    n_blocks,
    vf_coef,
    BLOCK_R: tl.constexpr,
):
    columns = tl.arange(0, N_COLUMNS)
    sums = tl.zeros([N_COLUMNS], tl.float32)
    for start in range(0, n_blocks, BLOCK_R):
        rows = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        at = rows[:, None] * N_COLUMNS + columns[None, :]
        sums += tl.sum(tl.load(partials_ptr + at, mask=rows[:, None] < n_blocks, other=0.0), 0)
    policy = tl.sum(tl.where(columns == POLICY, sums, 0.0), 0)
    value = tl.sum(tl.where(columns == VALUE, sums, 0.0), 0)
    count = tl.sum(tl.where(columns == COUNT, sums, 0.0), 0)
    tl.store(total_ptr, policy + vf_coef * value)
    means = tl.where(columns <= COUNT, sums, sums / tl.maximum(count, 1.0))
    tl.store(statistics_ptr + columns, means, mask=columns < N_STATISTICS)


def _launch(
    form: Form,
    x: Tokens,
    losses: Tensor | None,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    partials: Tensor | None,
) -> None:
    n = x.leading.numel()
    # Absent tensors need some pointer; the constexpr flags keep it from being read.
    given = [x.leading if t is None else t.contiguous() for t in x]
    written = [x.leading if t is None else t for t in (losses, *gradients, partials)]
    with torch.cuda.device_of(x.leading):
        _policy_loss_kernel[(triton.cdiv(n, BLOCK),)](
            *given,
            *written,
            n,
            1 if x.scale is None else n // x.scale.numel(),
            *form[2:],
            KIND=form.kind,
            KL=form.kl,
            HAS_ENTROPY=x.entropy is not None,
            HAS_DENTROPY=form.entropy_coef != 0.0,
            HAS_OLD=x.old_logp is not None,
            HAS_REF=x.ref_logp is not None,
            HAS_WEIGHTS=x.weights is not None,
            HAS_LOG_RATIO=x.log_ratio is not None,
            HAS_VALUES=x.values is not None,
            HAS_VALUE_CLIP=form.value_clip != 0.0,
            HAS_MASK=x.mask is not None,
            HAS_SCALE=x.scale is not None,
            HAS_SUMS=partials is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )


def policy_loss_fwd(form: Form, x: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total, statistics, and the gradients of logp, entropy and values; [0] where there is none."""
    n = x.leading.numel()

    def like(wanted: bool) -> Tensor:
        return x.leading.new_empty(n if wanted else 0)

    dlogp, dvalues = like(x.logp is not None), like(x.values is not None)
    dentropy = like(form.entropy_coef != 0.0)
    n_blocks = triton.cdiv(n, BLOCK)
    partials = x.leading.new_empty((n_blocks, N_COLUMNS.value))
    total, statistics = x.leading.new_empty(()), x.leading.new_empty(N_STATISTICS.value)
    if n > 0:
        _launch(form, x, None, (dlogp, dentropy, dvalues), partials)
    with torch.cuda.device_of(x.leading):
        _policy_loss_sum_kernel[(1,)](
            partials, total, statistics, n_blocks, form.vf_coef, BLOCK_R=BLOCK_ROWS, num_warps=4
        )
    return total, statistics, dlogp, dentropy, dvalues


def policy_loss_terms_fwd(form: Form, x: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
    """loss of every token, and its derivatives by logp and by the entropy (None: not used)."""
    losses, dlogp = torch.empty_like(x.leading), torch.empty_like(x.leading)
    dentropy = torch.empty_like(x.leading) if form.entropy_coef != 0.0 else None
    if x.leading.numel() > 0:
        _launch(form, x, losses, (dlogp, dentropy, None), None)
    return losses, dlogp, dentropy
