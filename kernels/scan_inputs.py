"""What the kernels of gae.py read: where sequences and their chunks are (token_rewards.py asks it,
too), their rates, and tokens as the affine maps A -> scale * A + shift that compose from the end to
the start."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compose(scale_late, shift_late, scale_early, shift_early):
    return scale_early * scale_late, scale_early * shift_late + shift_early


@triton.jit
def compose_with_rest(
    scale_late, shift_late, rest_scale_late, rest_shift_late,
    scale_early, shift_early, rest_scale_early, rest_shift_early,
):  # fmt: skip
    """Maps of a range of tokens, and of the same range without its earliest token."""
    scale, shift = compose(scale_late, shift_late, scale_early, shift_early)
    rest_scale, rest_shift = compose(scale_late, shift_late, rest_scale_early, rest_shift_early)
    return scale, shift, rest_scale, rest_shift


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def first_column(x, columns):
    """The first column of a tile, [rows, 1]."""
    return tl.sum(tl.where(columns == 0, x, 0.0), 1, keep_dims=True)


@triton.jit
def sequence_of(cu_seqlens_ptr, n_steps, row, real, PACKED: tl.constexpr):
    """Where sequences begin and how long they are; n_steps is the number of tokens if packed.

    Offsets that mark no tokens of the tensors, which nobody has looked at on a GPU, are cut off.
    """
    if PACKED:
        begin = tl.load(cu_seqlens_ptr + row, mask=real, other=0)
        end = tl.load(cu_seqlens_ptr + row + 1, mask=real, other=0)
        begin = tl.minimum(tl.maximum(begin, 0), n_steps)
        length = tl.minimum(tl.maximum(end, begin), n_steps) - begin
        begin = begin.to(tl.int64)
    else:
        begin = row * n_steps
        length = tl.where(real, n_steps, 0)
    return begin, length


@triton.jit
def chunk_of(
    cu_seqlens_ptr, n_rows, n_steps, n_chunks, PACKED: tl.constexpr, CHUNK_T: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
):  # fmt: skip
    """The sequence of this program and its chunk of it.

    Packed sequence s has the programs from cu_seqlens[s] // CHUNK_T + s on: at least as many as it
    has chunks, and no more of them in total than chunks of all tokens and sequences.
    """
    program = tl.program_id(0)
    if PACKED:
        s = tl.arange(0, BLOCK_SEQUENCES)
        begins = tl.load(cu_seqlens_ptr + s, mask=s < n_rows, other=0)
        begins = tl.minimum(tl.maximum(begins, 0), n_steps)
        programs = begins // CHUNK_T + s
        mine = (s < n_rows) & (programs <= program)
        row = tl.max(tl.where(mine, s, 0), 0)
        chunk = program - tl.max(tl.where(mine, programs, 0), 0)
    else:
        row = program // n_chunks
        chunk = program % n_chunks
    return row.to(tl.int64), chunk


@triton.jit
def rates_and_end(
    rates_ptr, bootstrap_ptr, row, real, gamma, lam, PER_ROW: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
):  # fmt: skip
    """gamma, lam and the value after the last token of sequences."""
    if PER_ROW:
        gamma = tl.load(rates_ptr + 2 * row, mask=real, other=0.0)
        lam = tl.load(rates_ptr + 2 * row + 1, mask=real, other=0.0)
    last = 0.0
    if HAS_BOOTSTRAP:
        last = tl.load(bootstrap_ptr + row, mask=real, other=0.0)
    return gamma, lam, last


@triton.jit
def _is_kept(mask_ptr, at, inside, HAS_MASK: tl.constexpr):
    kept = inside
    if HAS_MASK:
        kept = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    return kept


@triton.jit
def value_from(
    values_ptr, mask_ptr, begin, t, length, last, HAS_VALUES: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The value of the first kept token at or after t of one sequence, `last` if there is none."""
    value = last
    if HAS_MASK and HAS_VALUES:
        searching = t < length
        while searching:
            at = t + tl.arange(0, BLOCK)
            kept = _is_kept(mask_ptr, begin + at, at < length, HAS_MASK)
            first = tl.min(tl.where(kept, at, length), 0)
            value = tl.load(values_ptr + begin + first, mask=first < length, other=0.0)
            value = tl.where(first < length, value.to(tl.float32), last)
            t += BLOCK
            searching = (first == length) & (t < length)
    return value


@triton.jit
def maps_of(
    rewards_ptr, values_ptr, log_ratio_ptr, mask_ptr, begin, t, columns, end, length, next_value,
    last, gamma, lam, rho_bar, c_bar,
    HAS_VALUES: tl.constexpr, HAS_RATIO: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a tile of tokens t < end: (kept, value, delta, weight, scale, shift, value of the first
    kept one or after)."""
    kept = _is_kept(mask_ptr, begin + t, t < end, HAS_MASK)
    delta = tl.load(rewards_ptr + begin + t, mask=kept, other=0.0).to(tl.float32)
    value = tl.zeros_like(delta)
    if HAS_VALUES:
        value = tl.load(values_ptr + begin + t, mask=kept, other=0.0).to(tl.float32)
        if HAS_MASK:
            # Column t looks at token t + 1: the scan ends in the next kept token, with no shift.
            following = _is_kept(mask_ptr, begin + t + 1, t + 1 < end, HAS_MASK)
            following = following & (columns < BLOCK - 1)
            at = tl.associative_scan(tl.where(following, t + 1, end), 1, _smaller, reverse=True)
            after = tl.load(values_ptr + begin + at, mask=at < end, other=0.0).to(tl.float32)
            after = tl.where(at < end, after, next_value)
            next_value = first_column(tl.where(kept, value, after), columns)
        else:
            inside = t + 1 < length
            after = tl.load(values_ptr + begin + t + 1, mask=inside, other=0.0).to(tl.float32)
            after = tl.where(inside, after, last)
        delta = delta + gamma * after - value
    weight = tl.zeros_like(delta) + 1.0
    scale = gamma * lam * weight
    shift = delta
    if HAS_RATIO:
        weight = tl.exp(tl.load(log_ratio_ptr + begin + t, mask=kept, other=0.0))
        # Not tl.minimum, which drops NaN.
        scale = gamma * lam * tl.where(weight > c_bar, c_bar, weight)
        shift = tl.where(weight > rho_bar, rho_bar, weight) * delta
    scale = tl.where(kept, scale, 1.0)
    shift = tl.where(kept, shift, 0.0)
    return kept, value, delta, weight, scale, shift, next_value
