"""Token-level rewards in one launch; formulas: fastalign/ops/token_rewards.py.

One program per sequence, or per chunk of one where there are few long ones. It walks from the end,
so that the first kept token it meets is the last one of the sequence, unless one is kept in a later
chunk. Each token is read and written once. ``_token_rewards_sum_kernel`` adds up the chunks' KL.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels._device import kl_k3
from fastalign.kernels.scan_inputs import sequence_of

BLOCK_T = 1024
CHUNK = 4096  # tokens of one program when sequences are split
SPLIT_BELOW = 128  # sequences; from here on they fill a large GPU on their own
# One compilation serves all sizes and alignments: sequences begin anywhere.
GENERIC = {
    "do_not_specialize": ["n_steps", "chunk_t", "n_chunks", "n_rows"],
    "do_not_specialize_on_alignment": [
        "logp_ptr",
        "ref_logp_ptr",
        "scores_ptr",
        "dpo_logp_ptr",
        "finished_ptr",
        "mask_ptr",
        "cu_seqlens_ptr",
        "rewards_ptr",
        "sums_ptr",
        "counts_ptr",
        "sequence_kl_ptr",
        "kl_ptr",
    ],
}


@triton.jit
def _kept(mask_ptr, t, inside, HAS_MASK: tl.constexpr):
    kept = inside
    if HAS_MASK:
        kept = inside & (tl.load(mask_ptr + t, mask=inside, other=0) != 0)
    return kept


@triton.jit
def _clamped(x, most):
    """NaN stays."""
    x = tl.where(x > most, most, x)
    return tl.where(x < -most, -most, x)


@triton.jit
def _any_kept_from(mask_ptr, t, length, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """1 if a token at or after t is kept, else 0."""
    found = (t < length).to(tl.int32)
    if HAS_MASK:
        found = found * 0
        while (t < length) & (found == 0):
            at = t + tl.arange(0, BLOCK)
            found = tl.max(_kept(mask_ptr, at, at < length, HAS_MASK).to(tl.int32), 0)
            t += BLOCK
    return found


@triton.jit(**GENERIC)
def _token_rewards_kernel(
    logp_ptr,  # [B, n_steps] or [n_steps], as ref_logp and dpo_logp
    ref_logp_ptr,
    scores_ptr,  # [rows] float32
    dpo_logp_ptr,  # read with HAS_DPO
    finished_ptr,  # [rows] bool, read with HAS_FINISHED
    mask_ptr,  # like logp, bool, read with HAS_MASK
    cu_seqlens_ptr,  # [rows + 1], read with PACKED
    rewards_ptr,  # like logp, float32
    sums_ptr,  # [rows, n_chunks] float32: of the estimates
    counts_ptr,  # [rows, n_chunks] float32: kept tokens
    n_steps,
    chunk_t,
    n_chunks,
    kl_coef,
    clip_score,
    dpo_coef,
    clip_dpo,
    missing_eos_penalty,
    KIND: tl.constexpr,
    HAS_DPO: tl.constexpr,
    HAS_FINISHED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    begin, length = sequence_of(cu_seqlens_ptr, n_steps, row, True, PACKED)
    length = length.to(tl.int32)
    logp_ptr += begin
    ref_logp_ptr += begin
    dpo_logp_ptr += begin
    mask_ptr += begin
    rewards_ptr += begin
    start = chunk * chunk_t
    end = tl.minimum(start + chunk_t, length)
    terminal = _clamped(tl.load(scores_ptr + row), clip_score)
    if HAS_FINISHED:
        unfinished = tl.load(finished_ptr + row) == 0
        terminal = tl.where(unfinished, terminal - missing_eos_penalty, terminal)

    kept_later = _any_kept_from(mask_ptr, end, length, HAS_MASK, BLOCK)
    kl_sum = 0.0
    count = 0.0
    n_blocks = tl.cdiv(tl.maximum(end - start, 0), BLOCK)
    for block in range(n_blocks):
        t = start + (n_blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        kept = _kept(mask_ptr, t, t < end, HAS_MASK)
        logp = tl.load(logp_ptr + t, mask=kept, other=0.0).to(tl.float32)
        ref_logp = tl.load(ref_logp_ptr + t, mask=kept, other=0.0).to(tl.float32)
        d = ref_logp - logp
        if KIND == 0:
            kl = -d
        elif KIND == 1:
            kl = 0.5 * d * d
        else:
            kl = kl_k3(d)
        # Without a coefficient an infinite estimate must not become NaN.
        reward = tl.where(kl_coef == 0.0, 0.0, -kl_coef * kl)
        if HAS_DPO:
            dpo_logp = tl.load(dpo_logp_ptr + t, mask=kept, other=0.0).to(tl.float32)
            reward += _clamped(dpo_coef * (dpo_logp - ref_logp), clip_dpo)
        last = tl.max(tl.where(kept, t, -1), 0)
        ends = kept & (t == last) & (kept_later == 0)
        reward = tl.where(ends, reward + terminal, reward)
        kept_later = tl.where(last >= 0, 1, kept_later)
        tl.store(rewards_ptr + t, tl.where(kept, reward, 0.0), mask=t < end)
        kl_sum += tl.sum(tl.where(kept, kl, 0.0), 0)
        count += tl.sum(kept.to(tl.float32), 0)
    tl.store(sums_ptr + row * n_chunks + chunk, kl_sum)
    tl.store(counts_ptr + row * n_chunks + chunk, count)


@triton.jit(**GENERIC)
def _token_rewards_sum_kernel(
    sums_ptr,  # [n_rows, n_chunks]
    counts_ptr,  # [n_rows, n_chunks]
    sequence_kl_ptr,  # [n_rows]
    kl_ptr,  # [1]
    n_rows,
    n_chunks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    kl_sum = 0.0
    count = 0.0
    for first_row in range(0, n_rows, BLOCK_ROWS):
        row = (first_row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        sums = tl.zeros([BLOCK_ROWS], tl.float32)
        counts = tl.zeros([BLOCK_ROWS], tl.float32)
        for first_chunk in range(0, n_chunks, BLOCK_CHUNKS):
            chunk = first_chunk + tl.arange(0, BLOCK_CHUNKS)
            inside = (row < n_rows)[:, None] & (chunk < n_chunks)[None, :]
            at = row[:, None] * n_chunks + chunk[None, :]
            sums += tl.sum(tl.load(sums_ptr + at, mask=inside, other=0.0), 1)
            counts += tl.sum(tl.load(counts_ptr + at, mask=inside, other=0.0), 1)
        tl.store(sequence_kl_ptr + row, sums, mask=row < n_rows)
        kl_sum += tl.sum(sums, 0)
        count += tl.sum(counts, 0)
    tl.store(kl_ptr, kl_sum / tl.where(count > 1.0, count, 1.0))


def token_rewards_fwd(
    logp: Tensor,
    ref_logp: Tensor,
    scores: Tensor,
    dpo_logp: Tensor | None,
    finished: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: int,
    kl_coef: float,
    clip_score: float,
    dpo_coef: float,
    clip_dpo: float,
    missing_eos_penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, KL of each sequence and mean KL, float32; arguments as in the op
    ``fastalign::token_rewards``, ``kind`` an index into KINDS."""
    logp = logp.contiguous()
    rewards = torch.empty_like(logp, dtype=torch.float32)
    n_rows, longest = scores.shape[0], logp.shape[-1]
    sequence_kl = torch.empty(n_rows, dtype=torch.float32, device=logp.device)
    kl = sequence_kl.new_empty(())
    # Without a look at the offsets, which would wait for the GPU, a packed sequence may be all.
    split = n_rows < SPLIT_BELOW and logp.numel() > n_rows * CHUNK
    n_chunks = triton.cdiv(longest, CHUNK) if split else 1
    sums, counts = sequence_kl.new_empty((2, n_rows, n_chunks)).unbind()

    # Absent tensors need some pointer; the constexpr flags keep it from being read.
    given = [ref_logp, scores, dpo_logp, finished, mask, cu_seqlens]
    pointers = [logp, *(logp if x is None else x.contiguous() for x in given)]
    with torch.cuda.device_of(logp):
        if n_rows > 0:
            _token_rewards_kernel[(n_rows, n_chunks)](
                *pointers,
                rewards,
                sums,
                counts,
                longest,
                CHUNK if split else longest,
                n_chunks,
                kl_coef,
                clip_score,
                dpo_coef,
                clip_dpo,
                missing_eos_penalty,
                KIND=kind,
                HAS_DPO=dpo_logp is not None,
                HAS_FINISHED=finished is not None,
                HAS_MASK=mask is not None,
                PACKED=cu_seqlens is not None,
                BLOCK=BLOCK_T,
                num_warps=4,
            )
        _token_rewards_sum_kernel[(1,)](
            sums, counts, sequence_kl, kl, n_rows, n_chunks, BLOCK_ROWS=128, BLOCK_CHUNKS=16
        )
    return rewards, sequence_kl, kl
