"""How the loss head will cut its work: slab size, number of matrix products, bytes, and why.

The loss head works on slabs of C tokens times the whole vocabulary V. One workspace of C * V logits
is reused by every slab, so ``workspace`` (bytes) bounds the memory; this file turns that budget
into a slab size and a mode:

    forward only   no gradient is asked for: 1 product
    single pass    the gradient is formed while the slab's logits are at hand: 3 products, 2 with a
                   frozen head
    two stages     a group of tokens is larger than a slab: log-probs first, logits again for the
                   gradient: 4 products
    keep logits    linear_logprobs and linear_kl: all logits, which wait for the backward pass, fit
                   in the budget together with a slab of their gradient: 3 products
    recompute      linear_logprobs and linear_kl: they do not, and are computed again in the
                   backward pass: 4

A reference model adds one product wherever logits are computed.

The default budget is 1 GiB, or a sixteenth of the memory of the device where that is less. It does
not follow the memory that happens to be free: the cut into slabs would change with it, and with the
cut the last bits of the weight's gradient. Where a GPU has less left than was planned, no logits
are kept and the slab is halved until it fits (``slab.reserve``).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch

OPS = ("linear_loss", "linear_logprobs", "linear_kl")
MOST_WORKSPACE = 1 << 30
SHARE_OF_MEMORY = 16
# A CPU's products rearrange the whole weight once per slab, and the weight's gradient is read and
# written once per slab: 12 % of the time with slabs of 256 float32 rows, 3 % with 1024. Narrow
# dtypes want one slab: over several, the weight's gradient is summed from widened operands, because
# CPU products of narrow operands cannot return float32.
CPU_SLAB = 1024
# Rows of gradients that must fit beside kept logits. With fewer in a slab, reading and writing the
# weight's gradient once per slab costs more than computing the logits again.
CPU_BESIDE, GPU_BESIDE = 256, 1024


@dataclass(frozen=True)
class Plan:
    """What ``linear_loss``, ``linear_logprobs`` or ``linear_kl`` does for given sizes.
    ``print(plan)`` is one readable line."""

    mode: str
    """"forward only", "single pass", "two stages", "keep logits" or "recompute"."""
    slab: int
    """Tokens per slab."""
    slabs: int
    """Number of slabs (with groups: at least this many); of gradients, where logits are kept."""
    gemms: int
    """Matrix products of tokens x vocabulary x width, those of the reference included."""
    flops: int
    """Floating point operations of those products."""
    workspace: int
    """Bytes of logits, and of gradients beside kept ones, held at any one time."""
    kept: int
    """Rows of logits that wait for the backward pass."""
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
    bias_grad: bool = False,
    longest_group: int | None = None,
    reference_width: int | None = None,
    reference_dtype: torch.dtype | None = None,
    own_accumulator: bool = True,
    batch_invariant: bool = False,
    workspace: int | None = None,
) -> Plan:
    """The plan for ``tokens`` rows that count, ``width`` = H and ``vocab`` = V.

    Args:
        op: "linear_loss", "linear_logprobs" or "linear_kl".
        dtype: of hidden states and weight.
        bias_grad: a gradient without a product of its own.
        longest_group: tokens of the longest group, for losses over groups.
        reference_width: H of the reference model, where there is one.
        reference_dtype: of the reference model, where it is another one.
        own_accumulator: False when the weight's gradient is added to a buffer of the caller.
        batch_invariant: the slab follows neither the number of tokens nor the longest group.
        workspace: bytes of logits that may be held at once; default as above.

    Raises:
        ValueError: an unknown op, linear_kl without ``reference_width``, or a workspace that does
            not hold one row of logits.
    """
    if op not in OPS:
        raise ValueError(f"plan: expected op to be one of {', '.join(OPS)}, got {op!r}")
    if op == "linear_kl" and reference_width is None:
        raise ValueError("plan: expected reference_width with linear_kl, got None")
    reference = reference_width is not None
    own_row = vocab * dtype.itemsize
    row = own_row + (vocab * (reference_dtype or dtype).itemsize if reference else 0)
    budget = max(row, default_workspace(device)) if workspace is None else workspace
    if budget < row:
        both = " of both models" if reference else ""
        raise ValueError(
            f"{op}: expected workspace >= {row} bytes (one row of {vocab} logits{both}), "
            f"got {budget}"
        )
    fits = budget // row
    room = f"the workspace of {budget / 2**20:.1f} MiB"
    on_cpu = torch.device(device).type == "cpu"
    own_dtype = dtype in (torch.float32, torch.float64)
    multiple = 16 if on_cpu else 128
    wanted = sys.maxsize if batch_invariant else max(1, tokens)
    why = f"{fits} rows of logits fit in {room}"
    if on_cpu and own_dtype:
        wanted = min(wanted, CPU_SLAB)
        if fits >= CPU_SLAB:
            why = f"more than {CPU_SLAB} rows at once gain nothing on a CPU"
    slab = _at_most(wanted, fits, multiple)
    forward = tokens * vocab * (width + (reference_width or 0)) * 2
    gemms, flops = 2 if reference else 1, forward
    kept = 0
    again = False
    if not (hidden_grad or weight_grad or bias_grad):
        mode = "forward only"
    elif op != "linear_loss":
        kept = -(-tokens // slab) * slab if batch_invariant else tokens
        beside = _at_most(slab, (budget - kept * row) // own_row, multiple)
        least = CPU_BESIDE if on_cpu else GPU_BESIDE
        if batch_invariant or (on_cpu and not own_dtype):
            least = slab
        if beside >= min(slab, least):
            mode, slab = "keep logits", beside
            why = f"all rows and a slab of their gradient fit in {room}"
        else:
            mode, again, kept = "recompute", True, 0
            why += "; all logits and a slab of their gradient do not fit"
    elif longest_group is not None and longest_group > (slab if batch_invariant else fits):
        mode, again = "two stages", True
        why += f", the longest group has {longest_group}"
    else:
        mode = "single pass"
        if longest_group is not None and longest_group > slab:
            slab = longest_group
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
        workspace=kept * row + slab * own_row if kept else slab * row,
        kept=kept,
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


def _at_most(wanted: int, fits: int, multiple: int) -> int:
    """``wanted`` rows, or as many as fit, if possible a whole ``multiple``."""
    if wanted <= fits:
        return wanted
    return fits - fits % multiple if fits > multiple else fits
