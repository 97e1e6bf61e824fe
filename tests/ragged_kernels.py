"""Stand-ins of the ragged attention kernels, which need CUDA: their signatures, row by row."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.models import attention_kernels

Check = Callable[[Tensor, Tensor, int, int], None]
"""Of `cu_seqlens` of queries and keys and the longest sequence of each."""


def by_rows(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float
) -> Tensor:
    """What such a kernel computes: [N, heads, d], the last query at the last key."""
    out = []
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    bounds = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    for a, b, c, d in bounds:
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        if causal:
            seen = torch.ones(b - a, d - c).tril(d - c - (b - a)).bool()
            scores = scores.masked_fill(~seen, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d]))
    return torch.cat(out)


def varlen_now(check: Check) -> Callable[..., Any]:
    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
    ):
        assert enable_gqa is (query.shape[1] != key.shape[1])
        check(cu_seq_q, cu_seq_k, max_q, max_k)
        return by_rows(query, key, value, cu_seq_q, cu_seq_k, window_size == (-1, 0), scale)

    return varlen_attn


def varlen_before(check: Check) -> Callable[..., Any]:
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        assert query.shape[1:] == key.shape[1:]
        check(cu_seq_q, cu_seq_k, max_q, max_k)
        return by_rows(query, key, value, cu_seq_q, cu_seq_k, is_causal, query.shape[-1] ** -0.5)

    return varlen_attn


def flash(check: Check) -> Callable[..., Any]:
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        *,
        softmax_scale=None,
        causal=False,
    ):
        check(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return by_rows(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale)

    return flash_attn_varlen_func


def flash_with_lse(check: Check) -> Callable[..., Any]:
    plain = flash(check)
    return lambda *args, **options: (plain(*args, **options), torch.zeros(1))


STAND_INS: dict[str, tuple[str, Callable[[Check], Callable[..., Any]]]] = {
    "varlen": ("torch.nn.attention.varlen", varlen_now),
    "varlen before": ("torch.nn.attention.varlen", varlen_before),
    "flash2": ("flash_attn", flash),
    "flash4": ("flash_attn.cute", flash),
    "flash4 with lse": ("flash_attn.cute", flash_with_lse),
}
"""Where each is imported from, and its form: torch's signature has changed."""


def install(monkeypatch: pytest.MonkeyPatch, name: str, check: Check) -> None:
    """Lets one of STAND_INS be found, and chosen on a CPU."""
    module, stand_in = STAND_INS[name]
    name = name.split()[0]
    if name == "varlen":
        monkeypatch.setattr(f"{module}.varlen_attn", stand_in(check))
    else:
        for part in ("flash_attn", "flash_attn.cute"):
            made = types.ModuleType(part)
            if part == module:
                made.flash_attn_varlen_func = stand_in(check)  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, part, made)
    monkeypatch.setattr(attention_kernels, "chosen", lambda query, dropout: name)
