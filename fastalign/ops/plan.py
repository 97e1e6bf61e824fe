"""How the loss head will cut its work: slab size, number of matrix products, bytes, and why.

The loss head works on slabs of C tokens times the whole vocabulary V. One workspace of C * V logits
is reused by every slab, so ``workspace`` (bytes) bounds the memory; this file turns that budget
into a slab size and a mode:

    forward only   no gradient is asked for: 1 product
    single pass    the gradient is formed while the slab's logits are at hand: 3 products, 2 with a
                   frozen head
    two stages     a group of tokens is larger than a slab: log-probs first, logits again for the
                   gradient: 4 products
    keep logits    linear_logprobs, all logits fit in the budget and wait for the backward pass: 3
    recompute      linear_logprobs, they do not fit and are computed again in the backward pass: 4

A reference model adds one product wherever logits are computed.

The default budget is 1 GiB, or a sixteenth of the memory of the device where that is less. It does
not follow the memory that happens to be free: the cut into slabs would change with it, and with the
cut the last bits of the weight's gradient. Where even that much is not free on a GPU, linear_loss
halves the slab until it fits.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

MOST_WORKSPACE = 1 << 30
SHARE_OF_MEMORY = 16
# A CPU's products rearrange the whole weight once per slab, and the weight's gradient is read and
# written once per slab: 12 % of the time with slabs of 256 float32 rows, 3 % with 1024. Narrow
# dtypes want one slab: over several, the weight's gradient is summed from widened operands, because
# CPU products of narrow operands cannot return float32.
CPU_SLAB = 1024


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
    """Matrix products of tokens x vocabulary x width, those of the reference included."""
    flops: int
    """Floating point operations of those products."""
    workspace: int
    """Bytes of logits held at any one time."""
    accumulator: int
    """Bytes of the weight gradient's accumulator beside the gradient itself (0 when it is the
    gradient, or the caller's own)."""
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
    reference_width: int | None = None,
    own_accumulator: bool = True,
    batch_invariant: bool = False,
    workspace: int | None = None,
) -> Plan:
    """The plan for ``tokens`` rows that count, ``width`` = H and ``vocab`` = V.

    Args:
        op: "linear_loss" or "linear_logprobs".
        dtype: of hidden states and weight (and of the reference's).
        longest_group: tokens of the longest group, for losses over groups.
        reference_width: H of the reference model, where there is one.
        own_accumulator: False when the weight's gradient is added to a buffer of the caller.
        batch_invariant: the slab does not shrink to the number of tokens.
        workspace: bytes of logits that may be held at once; default as above.

    Raises:
        ValueError: an unknown op, or a workspace that does not hold one row of logits.
    """
    if op not in ("linear_loss", "linear_logprobs"):
        raise ValueError(f"plan: expected op 'linear_loss' or 'linear_logprobs', got {op!r}")
    row = vocab * dtype.itemsize * (1 if reference_width is None else 2)
    budget = max(row, default_workspace(device)) if workspace is None else workspace
    if budget < row:
        raise ValueError(
            f"{op}: expected workspace >= {row} bytes (one row of {vocab} logits), got {budget}"
        )
    fits = budget // row
    on_cpu = torch.device(device).type == "cpu"
    own_dtype = dtype in (torch.float32, torch.float64)
    enough = on_cpu and own_dtype and fits >= CPU_SLAB
    slab = CPU_SLAB if enough else _round_down(fits, 16 if on_cpu else 128)
    why = f"{fits} rows of logits fit in the workspace of {budget / 2**20:.1f} MiB"
    if enough:
        why = f"more than {CPU_SLAB} rows at once gain nothing on a CPU"
    if not batch_invariant:
        slab = min(slab, tokens)
    slab = max(1, slab)
    need_grad = hidden_grad or weight_grad
    forward = tokens * vocab * (width + (reference_width or 0)) * 2
    gemms, flops = 1 if reference_width is None else 2, forward
    held = slab
    again = False
    if not need_grad:
        mode = "forward only"
    elif op == "linear_logprobs":
        held = tokens if tokens <= fits else slab
        again = tokens > fits
        mode = "recompute" if again else "keep logits"
    elif longest_group is not None and longest_group > fits:
        mode, again = "two stages", True
        why += f", the longest group has {longest_group}"
    else:
        mode = "single pass"
        if longest_group is not None and longest_group > slab:
            held = slab = fits if batch_invariant else longest_group
            why = f"the longest group has {longest_group} tokens"
    if again:
        gemms, flops = 2 * gemms, 2 * flops
    gemms += hidden_grad + weight_grad
    flops += (hidden_grad + weight_grad) * tokens * vocab * width * 2
    slabs = -(-tokens // slab)
    extra = own_accumulator and weight_grad and not own_dtype and slabs > 1
    return Plan(
        mode=mode,
        slab=slab,
        slabs=slabs,
        gemms=gemms,
        flops=flops,
        workspace=held * row,
        accumulator=4 * vocab * width if extra else 0,
        why=why,
    )


def _host_memory() -> int:
    """Bytes of main memory; 0 where the system does not say."""
    known = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in known or "SC_PAGE_SIZE" not in known:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


HOST_MEMORY = _host_memory()


def default_workspace(device: str | torch.device) -> int:
    """Bytes of logits that may be held at once when nothing is said."""
    device = torch.device(device)
    total = HOST_MEMORY if device.type == "cpu" else 0
    if device.type == "cuda" and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(device).total_memory
    return min(MOST_WORKSPACE, total // SHARE_OF_MEMORY) if total > 0 else MOST_WORKSPACE


def _round_down(rows: int, multiple: int) -> int:
    return rows - rows % multiple if rows > multiple else rows
