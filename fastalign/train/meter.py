"""What a run costs: tokens, model FLOPs, seconds, joules and memory, of each step and by phase.

    with run.meter.phase("update"):
        ...
        run.meter.count(tokens, trained=..., flops=...)
    metrics |= run.meter.metrics()

A phase within a phase belongs to the outer one, so that a held-out evaluation which generates and
scores is "evaluate" as a whole. On CUDA a phase waits for the device where it begins and where it
ends: its seconds and joules are those of its own kernels.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastalign.train import energy
from fastalign.train.distributed import world

log = logging.getLogger("fastalign")

OUTSIDE = ("evaluate", "checkpoint", "gold")
"""Phases that are no part of a step: a step's seconds and rates leave them out."""

# Dense peak FLOP/s without sparsity, from the makers' data sheets: bf16, fp32 (no TF32). The first
# name that a device's name contains counts.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250e12, 75e12),
    ("H200 NVL", 835e12, 60e12),
    ("H200", 989e12, 67e12),
    ("GH200", 989e12, 67e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
    ("L4", 121e12, 30.3e12),
    ("A40", 150e12, 37.4e12),
    ("RTX 4090", 165e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
)


@dataclass
class Cost:
    """What was spent on something."""

    seconds: float = 0.0
    joules: float = 0.0
    flops: float = 0.0
    """Model FLOPs of all passes."""
    tokens: int = 0
    """Each counted once by the method, however often the model reads it."""
    trained: int = 0
    """Tokens whose loss counted."""
    memory_gib: float = 0.0
    """Peak of the allocator on CUDA; 0 elsewhere."""

    def add(self, other: Cost) -> None:
        self.seconds += other.seconds
        self.joules += other.joules
        self.flops += other.flops
        self.tokens += other.tokens
        self.trained += other.trained
        self.memory_gib = max(self.memory_gib, other.memory_gib)


class Meter:
    """Counts for one process. What lies outside of every phase is "other".

    Args:
        device: where the model runs.
        dtype: of the forward passes; decides the peak that utilisation refers to.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.counter: energy.Counter | None = None
        self.totals: dict[str, Cost] = {}
        self.resumes = 0
        self._step: dict[str, Cost] = {}
        self._phase: str | None = None
        self._peak: tuple[float, str] | None = None
        self._mark = self._now()

    def start(self, *, say: bool = True) -> None:
        """Finds what measures energy, says so (unless another meter of the same run does), and sets
        the clocks to zero."""
        self.counter = energy.find(self.device)
        source = self.counter.source if self.counter else "nothing here measures it; not reported"
        if say:
            log.info("energy: %s", source)
        self._mark = self._now()

    def stop(self) -> None:
        self._spend(self._phase)
        if self.counter is not None:
            self.counter.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds, joules and peak memory of what runs inside are those of phase `name`."""
        if self._phase is not None:
            yield
            return
        self._spend(None)
        self._phase = name
        try:
            yield
        finally:
            self._spend(name)
            self._phase = None

    def count(self, tokens: int = 0, *, trained: int = 0, flops: float = 0.0) -> None:
        """Adds to the phase that is open: tokens of the method (each one once, in one phase), those
        of them whose loss counts, and the model FLOPs of the passes made."""
        self._add(self._phase, Cost(flops=flops, tokens=tokens, trained=trained))

    def metrics(self) -> dict[str, float]:
        """Of the step that ends here, by the names of metrics.jsonl; the next step begins."""
        self._spend(self._phase)
        parts = {name: cost for name, cost in self._step.items() if name not in OUTSIDE}
        step = Cost()
        for cost in parts.values():
            step.add(cost)
        self._step = {}
        found: dict[str, float] = {"tokens": step.tokens}
        if step.seconds > 0:
            found["tokens_per_s"] = step.tokens / step.seconds
            found["tokens_per_s/trained"] = step.trained / step.seconds
            found["flops"] = step.flops
            found["flops_per_s"] = step.flops / step.seconds
            devices = world().size if self.device.type == "cuda" else 1
            found["utilisation"] = step.flops / step.seconds / self.peak()[0] / devices
        for name, cost in parts.items():
            if name != "other":
                found[f"time/{name}"] = cost.seconds
        if self.counter is not None:
            found["joules"] = step.joules
            found |= {f"joules/{name}": parts[name].joules for name in parts if name != "other"}
        found["memory_gib"] = self.peak_memory_gib()
        return found

    def peak_memory_gib(self) -> float:
        """Of the run so far: of the allocator on CUDA, of the process elsewhere."""
        if self.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self.device) / 2**30
            return max([now, *(cost.memory_gib for cost in self.totals.values())])
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)

    def peak(self) -> tuple[float, str]:
        """The FLOP/s this device can reach, and where the number is from."""
        if self._peak is None:
            self._peak = known_peak(self.device, self.dtype) or measured_peak(
                self.device, self.dtype
            )
            log.info("utilisation: of %.4g FLOP/s, %s", *self._peak)
            self._mark = self._now()  # the measurement is no part of the run
        return self._peak

    def absorb(self, other: Meter) -> None:
        """Adds what another meter counted by phase, before the run began: labelling its data."""
        for name, cost in other.totals.items():
            if name != "other":
                self.totals.setdefault(name, Cost()).add(cost)

    def seconds(self) -> float:
        """Of the run so far, with those before it was resumed."""
        self._spend(self._phase)
        return sum(cost.seconds for cost in self.totals.values())

    def skip(self) -> None:
        """What passed since the last step is no step's: reading a checkpoint, filling a cache."""
        self._spend(self._phase)
        self._step = {}

    def summary(self) -> dict[str, Any]:
        """For accounting.json: costs by phase and in all. Joules are NaN where nothing measured
        them, FLOPs where the model's are not known."""
        total = Cost()
        for cost in self.totals.values():
            total.add(cost)
        total.memory_gib = max(total.memory_gib, self.peak_memory_gib())
        name = self.device.type
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        return {
            "device": name,
            "energy": self.counter.source if self.counter else None,
            "peak_flops": self._peak[0] if self._peak else None,
            "peak_source": self._peak[1] if self._peak else None,
            "resumes": self.resumes,
            "phases": {name: asdict(cost) for name, cost in self.totals.items()},
            "total": asdict(total),
        }

    def state_dict(self) -> dict[str, Any]:
        """Totals, and those of the step in progress, up to here: a resumed run adds to them."""
        self._spend(self._phase)
        return {
            "totals": {name: asdict(cost) for name, cost in self.totals.items()},
            "step": {name: asdict(cost) for name, cost in self._step.items()},
            "resumes": self.resumes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, cost in state["totals"].items():
            self.totals.setdefault(name, Cost()).add(Cost(**cost))
        self._step = {name: Cost(**cost) for name, cost in state["step"].items()}
        self.resumes = state["resumes"] + 1

    # --- clocks ----------------------------------------------------------------------------------

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        # Not a number where nothing counts, so that no sum over such a stretch is one.
        return time.perf_counter(), self.counter.joules() if self.counter else math.nan

    def _spend(self, phase: str | None) -> None:
        """What passed since the last call was spent on `phase`."""
        before, self._mark = self._mark, self._now()
        cost = Cost(self._mark[0] - before[0], self._mark[1] - before[1])
        if self.device.type == "cuda":
            cost.memory_gib = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
        self._add(phase, cost)

    def _add(self, phase: str | None, cost: Cost) -> None:
        for costs in (self._step, self.totals):
            costs.setdefault(phase or "other", Cost()).add(cost)


def known_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str] | None:
    """Of a GPU in the table of data sheets."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, low, full in PEAKS:
        if known in name and "MIG" not in name:
            peak = full if dtype == torch.float32 else low
            return peak, f"the data sheet of {known}, dense {str(dtype).removeprefix('torch.')}"
    return None


def measured_peak(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.1
) -> tuple[float, str]:
    """The fastest of the products of two square matrices made in `seconds`."""
    n = 4096 if device.type == "cuda" else 1024
    generator = torch.Generator().manual_seed(0)  # not the run's random state
    a = torch.randn(n, n, generator=generator).to(device, dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = max(best, 2 * n**3 / (now - began))
        del product
        if now >= end:
            break
    kind = str(dtype).removeprefix("torch.")
    return best, f"measured here: a product of two {n} x {n} {kind} matrices"
