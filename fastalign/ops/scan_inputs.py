"""What the scans over time share: the checks of their inputs, dtypes, rows from packed tokens.

Used by gae, lambda_returns and vtrace. A sequence is a row of [B, T], or one of the S parts of a
packed [N] that ``cu_seqlens`` marks.

What the Triton kernels of the scans share: kernels/scan_inputs.py.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.backend import CPP_BUILT

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MOST_PACKED = 2**31 - 1


class ScanInputs(NamedTuple):
    """Checked inputs, detached and of the dtypes that the kernels take."""

    rewards: Tensor
    values: Tensor | None
    gamma: float
    lam: float
    mask: Tensor | None
    cu_seqlens: Tensor | None
    bootstrap: Tensor | None
    rates: Tensor | None
    """[S, 2], gamma and lam of each sequence, or None where all share them."""


def carry_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rates_of(like: Tensor, gamma: float, lam: float, rates: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gamma, lam), [B] each, of the rows of ``like``."""
    if rates is None:
        return like.new_full(like.shape[:1], gamma), like.new_full(like.shape[:1], lam)
    return rates[:, 0].to(like.dtype), rates[:, 1].to(like.dtype)


def inside_rows(cu_seqlens: Tensor) -> Tensor:
    """[S, longest] bool: ``rows[inside] = packed`` pads, ``rows[inside]`` packs again."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int64)
    longest = int(lengths.max()) if lengths.numel() else 0
    return torch.arange(longest, device=cu_seqlens.device) < lengths[:, None]


def padded(packed: Tensor, inside: Tensor) -> Tensor:
    rows = packed.new_zeros(inside.shape)
    rows[inside] = packed
    return rows


def check_scan(
    op: str,
    rewards: Tensor,
    values: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
) -> ScanInputs:
    """ValueError naming ``op`` where a shape, dtype, device, rate or offset does not fit."""
    packed = cu_seqlens is not None
    if rewards.dim() != (1 if packed else 2):
        want = "[N] with cu_seqlens" if packed else "[B, T] without cu_seqlens"
        raise ValueError(f"{op}: expected rewards {want}, got shape {tuple(rewards.shape)}")
    check_like(op, "rewards", rewards, rewards)
    if values is not None:
        check_like(op, "values", values, rewards)
    if mask is not None:
        check_like(op, "mask", mask, rewards)
    n_rows = rewards.shape[0]
    if cu_seqlens is not None:
        check_device(op, "cu_seqlens", cu_seqlens, rewards)
        n_rows = _check_offsets(op, cu_seqlens, rewards.shape[0])
    for name, row in (("bootstrap", bootstrap), ("gamma", gamma), ("lam", lam)):
        if isinstance(row, Tensor):
            check_device(op, name, row, rewards)
            if row.shape != (n_rows,):
                raise ValueError(
                    f"{op}: expected {name} of shape ({n_rows},), one per sequence, "
                    f"got {tuple(row.shape)}"
                )
    for name, rate in (("gamma", gamma), ("lam", lam)):
        if not isinstance(rate, Tensor) and not 0.0 <= rate <= 1.0:
            raise ValueError(f"{op}: expected {name} in [0, 1], got {rate}")
    dtype = rewards.dtype
    if values is not None:
        dtype = torch.promote_types(dtype, values.dtype)
    carry = carry_dtype(dtype)
    rates = None
    if isinstance(gamma, Tensor) or isinstance(lam, Tensor):
        one = torch.ones(n_rows, dtype=carry, device=rewards.device)
        rates = torch.stack([(one * rate).to(carry) for rate in (gamma, lam)], dim=1).detach()
        gamma = lam = 1.0
    return ScanInputs(
        rewards.detach().to(dtype),
        None if values is None else values.detach().to(dtype),
        float(gamma),
        float(lam),
        None if mask is None else mask.to(torch.bool),
        cu_seqlens,
        None if bootstrap is None else bootstrap.detach().to(carry),
        rates,
    )


def check_like(op: str, name: str, x: Tensor, rewards: Tensor) -> None:
    """A tensor of one number per token: a mask has whole numbers, the others floating ones."""
    if name == "mask" and x.is_floating_point():
        raise ValueError(f"{op}: expected a bool or integer mask, got {x.dtype}")
    if name != "mask" and x.dtype not in DTYPES:
        raise ValueError(f"{op}: expected {name} of a floating dtype, got {x.dtype}")
    if x.shape != rewards.shape:
        raise ValueError(
            f"{op}: expected {name} of the shape of rewards, {tuple(rewards.shape)}, "
            f"got {tuple(x.shape)}"
        )
    check_device(op, name, x, rewards)


def check_device(op: str, name: str, x: Tensor, rewards: Tensor) -> None:
    if x.device != rewards.device:
        raise ValueError(
            f"{op}: expected {name} on the device of rewards, {rewards.device}, got {x.device}"
        )


def _check_offsets(op: str, cu_seqlens: Tensor, n_tokens: int) -> int:
    """The number of sequences that offsets of this shape and dtype mark."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: expected cu_seqlens [S + 1], got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: expected int32 or int64 cu_seqlens, got {cu_seqlens.dtype}")
    if n_tokens > MOST_PACKED:
        raise ValueError(f"{op}: expected at most {MOST_PACKED} packed tokens, got {n_tokens}")
    return cu_seqlens.shape[0] - 1


def checked_offsets(op: str, cu_seqlens: Tensor | None, n_tokens: int) -> Tensor | None:
    """The offsets as int32; ValueError when they do not mark all ``n_tokens`` tokens in order.

    To be called where an op runs, so that a compiled graph is checked too. Offsets on a GPU are
    looked at only with FASTALIGN_DEBUG=1, because that makes the host wait.
    """
    if cu_seqlens is None:
        return None
    on_cpu = cu_seqlens.device.type == "cpu"
    if on_cpu and CPP_BUILT and torch.ops.fastalign_cpp.offsets_fit(cu_seqlens, n_tokens):
        return cu_seqlens.to(torch.int32)
    if on_cpu or os.environ.get("FASTALIGN_DEBUG") == "1":
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        falls = bool((cu_seqlens[1:] < cu_seqlens[:-1]).any())
        if first != 0 or last != n_tokens or falls:
            raise ValueError(
                f"{op}: expected cu_seqlens to rise from 0 to N = {n_tokens}, "
                f"got {first} to {last}{', falling in between' if falls else ''}"
            )
    return cu_seqlens.to(torch.int32)
