"""How the loss head will cut its work: slab size, number of matrix products, bytes, and why.

The loss head works on slabs of C tokens times the whole vocabulary V. One workspace of C * V logits
is reused by every slab, so ``workspace`` (bytes) bounds the memory; this file turns that budget
into a slab size and a mode:

    forward only   no gradient is asked for: 1 product
    single pass    the gradient is formed while the slab's logits are at hand: 3 products (2 with a
    frozen head) two stages     a group of tokens is larger than a slab: log-probs first, logits
    again for the gradient: 4 keep logits    linear_logprobs, all logits fit in the budget and wait
        for the backward pass: 3
    recompute      linear_logprobs, they do not fit and are computed again in the backward pass: 4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DEFAULT_WORKSPACE = 1 << 30
# On a CPU a slab of 256 float32 rows already runs the products at full speed, and stays near the
# caches. Narrow dtypes want one slab: over several, the weight's gradient is summed from widened
# operands, because CPU products of narrow operands cannot return float32.
CPU_SLAB = 256


@dataclass(frozen=True)
class Plan:
    """What ``linear_loss`` or ``linear_logprobs`` does for given sizes. ``print(plan)`` is one
    readable line."""

    mode: str
    """"forward only", "single pass", "two stages", "keep logits" or "recompute"."""
    slab: int
    """Tokens per slab."""
    slabs: int
    """Number of slabs (with groups: at least this many)."""
    gemms: int
    """Matrix products of tokens x vocabulary x width."""
    flops: int
    """Floating point operations of those products."""
    workspace: int
    """Bytes of logits held at any one time."""
    accumulator: int
    """Bytes of the weight gradient's accumulator beside the gradient itself (0 when it is the
    gradient)."""
    why: str
    """The reason for the mode and the slab size."""

    def __str__(self) -> str:
        return (
            f"{self.mode}: {self.slabs} slab(s) of {self.slab} tokens, {self.gemms} GEMMs, "
            f"{self.flops / 1e12:.3g} TFLOP, {self.workspace / 2**20:.1f} MiB of logits"
            f" + {self.accumulator / 2**20:.1f} MiB of accumulator; {self.why}"
        )


def plan(
    tokens: int,
    width: int,
    vocab: int,
    *,
    op: str = "linear_loss",
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    hidden_grad: bool = True,
    weight_grad: bool = True,
    longest_group: int | None = None,
    workspace: int | None = None,
) -> Plan:
    """The plan for ``tokens`` rows that count, ``width`` = H and ``vocab`` = V.

    Args:
        op: "linear_loss" or "linear_logprobs".
        longest_group: tokens of the longest group, for losses over groups.
        workspace: bytes of logits that may be held at once; default 1 GiB.

    Raises:
        ValueError: an unknown op, or a workspace that does not hold one row of logits.
    """
    if op not in ("linear_loss", "linear_logprobs"):
        raise ValueError(f"plan: expected op 'linear_loss' or 'linear_logprobs', got {op!r}")
    row = vocab * dtype.itemsize
    budget = DEFAULT_WORKSPACE if workspace is None else workspace
    if budget < row:
        raise ValueError(
            f"{op}: expected workspace >= {row} bytes (one row of {vocab} logits), got {budget}"
        )
    fits = budget // row
    on_cpu = torch.device(device).type == "cpu"
    own_dtype = dtype in (torch.float32, torch.float64)
    near_caches = on_cpu and own_dtype and fits >= CPU_SLAB
    slab = CPU_SLAB if near_caches else _round_down(fits, 16 if on_cpu else 128)
    why = f"{fits} rows of logits fit in the workspace of {budget / 2**20:.1f} MiB"
    if near_caches:
        why = f"{CPU_SLAB} rows keep a CPU busy"
    slab = max(1, min(slab, tokens))
    need_grad = hidden_grad or weight_grad
    gemms = 1 + hidden_grad + weight_grad
    held = slab
    if not need_grad:
        mode = "forward only"
    elif op == "linear_logprobs":
        held = tokens if tokens <= fits else slab
        mode = "keep logits" if tokens <= fits else "recompute"
        gemms += mode == "recompute"
    elif longest_group is not None and longest_group > fits:
        mode = "two stages"
        gemms += 1
        why += f", the longest group has {longest_group}"
    else:
        mode = "single pass"
        if longest_group is not None and longest_group > slab:
            held = slab = longest_group
            why = f"the longest group has {longest_group} tokens"
    slabs = -(-tokens // slab)
    accumulator = 0 if own_dtype or not weight_grad or slabs <= 1 else 4 * vocab * width
    return Plan(
        mode=mode,
        slab=slab,
        slabs=slabs,
        gemms=gemms,
        flops=gemms * 2 * tokens * width * vocab,
        workspace=held * row,
        accumulator=accumulator,
        why=why,
    )


def _round_down(rows: int, multiple: int) -> int:
    return rows - rows % multiple if rows > multiple else rows
