"""What computes the attention of a pack: FlashAttention on ragged rows, or SDPA on its sequences.

Sequences that share a prompt read its keys and values where they lie: a sequence's queries are of
the tokens it holds, its keys of these and of the prompt before them, the last query of the last
key ("bottom right" where it is causal).

    name     needs                                      runs on
    sdpa     nothing                                    everything; any dtype, dropout
    varlen   torch                                      CUDA, float16 and bfloat16
    flash2   flash-attn (2): flash_attn_varlen_func     CUDA, float16 and bfloat16
    flash4   flash-attn-4: flash_attn.cute              CUDA (Hopper, Blackwell), the same dtypes
    auto     varlen where it runs, sdpa elsewhere

A choice holds for the whole process. One made by name that cannot run is an error, never another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.data.packing import Shared
from fastalign.errors import UserError

PACKAGES = {"flash2": "flash-attn", "flash4": "flash-attn-4"}
TOGETHER = 128
"""Sequences of up to this many tokens share a call of SDPA with others as long as they are."""

_asked = "auto"


def use(name: str) -> None:
    """Chooses the kernel for this process.

    Raises:
        UserError: an unknown name, or one whose package is not installed.
    """
    global _asked
    check(name)
    _asked = name


def check(name: str) -> None:
    """`use`'s errors, without its effect."""
    if name not in ("auto", *KERNELS):
        raise UserError(f"unknown attention {name!r}: expected auto, {', '.join(KERNELS)}")
    if not installed(name):
        package = PACKAGES[name]
        raise UserError(
            f"attention {name} needs the package {package}, which is not installed; take auto"
        )


def installed(name: str) -> bool:
    """Whether the package behind a name is there."""
    if name == "flash2":
        return find_spec("flash_attn_2_cuda") is not None
    if name == "flash4":
        return find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None
    return True


@contextmanager
def using(name: str) -> Iterator[None]:
    """Inside, `name` is the choice."""
    before = _asked
    use(name)
    try:
        yield
    finally:
        use(before)


def chosen(query: Tensor, dropout: float) -> str:
    """Which of `KERNELS` computes this attention.

    Raises:
        UserError: one asked for by name does not run on such tensors.
    """
    fits = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0
    if _asked == "auto":
        return "varlen" if fits else "sdpa"
    if _asked != "sdpa" and not fits:
        raise UserError(
            f"attention {_asked}: expected CUDA tensors of float16 or bfloat16 and no dropout, got "
            f"{query.device.type}, {query.dtype} and dropout {dropout:g}; auto takes sdpa there"
        )
    return _asked


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    scale: float,
    causal: bool,
    shared: Shared | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Sequence by sequence, short ones of one length in one call; no padding, and a mask only where
    a prompt is read elsewhere: of what a sequence holds by what it reads.

    Args:
        query, key, value: [1, heads, N, d]; fewer heads of keys and values are allowed.
        cu_seqlens: int32 [S + 1]; lengths: the same as S lengths on the host.
        shared: which sequences read a prompt that another one holds.

    Returns:
        [1, N, heads, d].
    """
    spans = ((0, 0),) * len(lengths) if shared is None else shared.spans
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (length, (_, before)) in enumerate(zip(lengths, spans, strict=True)):
        together = length + before <= TOGETHER
        alike.setdefault((length, before) if together else (-1 - i, before), []).append(i)
    queries, keys, values = (t.split(list(lengths), dim=2) for t in (query, key, value))
    out: list[Tensor] = [query] * len(lengths)
    for (_, before), rows in alike.items():
        q = _joined([queries[i] for i in rows], 0)
        k, v = (
            _joined([_after_prompt(whole, parts[i], spans[i]) for i in rows], 0)
            for whole, parts in ((key, keys), (value, values))
        )
        mask = None
        if before and causal:
            mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(before)
        found = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        for i, one in zip(rows, found.transpose(1, 2).split(1), strict=True):
            out[i] = one
    return torch.cat(out, dim=1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _after_prompt(whole: Tensor, own: Tensor, span: tuple[int, int]) -> Tensor:
    """Keys or values that a sequence reads: [1, heads, before + length, d]."""
    begin, before = span
    return torch.cat([whole.narrow(2, begin, before), own], dim=2) if before else own


def _rows(tensor: Tensor) -> Tensor:
    """[1, heads, N, d] -> [N, heads, d], as the ragged kernels take it."""
    return tensor.squeeze(0).transpose(0, 1)


class _Ragged(NamedTuple):
    """Arguments of a ragged kernel, in their order."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def _ragged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    shared: Shared | None,
) -> _Ragged:
    """Keys and values as each sequence reads them."""
    q, k, v = _rows(query), _rows(key), _rows(value)
    longest = max(lengths)
    if shared is None:
        return _Ragged(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
    k, v = (t.index_select(0, shared.keys) for t in (k, v))
    read = max(n + before for n, (_, before) in zip(lengths, shared.spans, strict=True))
    return _Ragged(q, k, v, cu_seqlens, shared.cu_seqlens, longest, read)


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    scale: float,
    causal: bool,
    shared: Shared | None = None,
) -> Tensor:
    """torch's own; arguments and result as `sdpa`."""
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0) if causal else (-1, -1)}
        if "window_size" in takes
        else {"is_causal": causal}
    )
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:
            repeat = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if "scale" in takes:
        options["scale"] = scale
    else:  # older signature: 1/sqrt(d) is built in, so fold the rest into the query
        query = query * (scale * query.shape[-1] ** 0.5)
    ragged = _ragged(query, key, value, cu_seqlens, lengths, shared)
    out = varlen_attn(*ragged, **options)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def flash2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    scale: float,
    causal: bool,
    shared: Shared | None = None,
) -> Tensor:
    """flash-attn 2; arguments and result as `sdpa`."""
    from flash_attn import flash_attn_varlen_func

    return _flash(
        flash_attn_varlen_func, query, key, value, cu_seqlens, lengths, scale, causal, shared
    )


def flash4(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    scale: float,
    causal: bool,
    shared: Shared | None = None,
) -> Tensor:
    """flash-attn-4; arguments and result as `sdpa`."""
    from flash_attn.cute import flash_attn_varlen_func

    return _flash(
        flash_attn_varlen_func, query, key, value, cu_seqlens, lengths, scale, causal, shared
    )


def _flash(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    scale: float,
    causal: bool,
    shared: Shared | None,
) -> Tensor:
    ragged = _ragged(query, key, value, cu_seqlens, lengths, shared)
    where = dict(zip(ragged._fields[3:], ragged[3:], strict=True))
    out = function(*ragged[:3], **where, softmax_scale=scale, causal=causal)
    if isinstance(out, tuple):  # some versions of 4 give the log-sum-exp too
        out = out[0]
    found: Tensor = out.unsqueeze(0)
    return found


KERNELS: dict[str, Callable[..., Tensor]] = {
    "sdpa": sdpa,
    "varlen": varlen,
    "flash2": flash2,
    "flash4": flash4,
}
