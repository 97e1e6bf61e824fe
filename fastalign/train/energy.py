"""Joules: what the device has drawn since the counter was made.

CUDA: the energy counter of NVML, of the whole board (every process on it); where a GPU has none,
its power, sampled by a thread ten times a second and integrated by the trapezoid rule. CPU: RAPL's
package counters, where this user may read them. NVML's counter moves every 20 to 100 ms, so the
energy of a phase shorter than that is rounded to its steps; sums over a run are not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from fastalign.train.distributed import world

POWERCAP = Path("/sys/class/powercap")
SAMPLE_SECONDS = 0.1


class Counter(Protocol):
    """Counts joules; `source` says by what means."""

    source: str

    def joules(self) -> float:
        """Since the counter was made."""
        ...

    def stop(self) -> None: ...


class EnergyCounter:
    """NVML's counter: millijoules since the driver was loaded."""

    source = "NVML energy counter"

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._read: Callable[[], int] = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        self._first = self._read()

    def joules(self) -> float:
        return (self._read() - self._first) / 1e3

    def stop(self) -> None:
        pass


class IntegratedPower:
    """sum of (P_i + P_i+1) / 2 * dt over samples of NVML's power draw in milliwatts."""

    source = "NVML power, integrated"

    def __init__(self, nvml: Any, handle: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._read: Callable[[], int] = lambda: nvml.nvmlDeviceGetPowerUsage(handle)
        self._clock, self._lock, self._end = clock, threading.Lock(), threading.Event()
        self._sum, self._last = 0.0, (clock(), self._read() / 1e3)
        self._thread = threading.Thread(target=self._sample, name="power", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            self.joules()

    def joules(self) -> float:
        with self._lock:
            before, power = self._last
            self._last = self._clock(), self._read() / 1e3
            self._sum += (self._last[0] - before) * (power + self._last[1]) / 2
            return self._sum

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


class Together:
    """Several counters as one."""

    def __init__(self, counters: list[Counter]) -> None:
        self.counters = counters
        self.source = " + ".join(sorted({counter.source for counter in counters}))

    def joules(self) -> float:
        return sum(counter.joules() for counter in self.counters)

    def stop(self) -> None:
        for counter in self.counters:
            counter.stop()


class RAPL:
    """Microjoules of every CPU package; each counter wraps around at its own range."""

    source = "RAPL, CPU packages"

    def __init__(self, packages: list[Path]) -> None:
        self._files = [(path / "energy_uj", path / "max_energy_range_uj") for path in packages]
        self._last = [int(energy.read_text()) for energy, _ in self._files]
        self._sum = 0

    def joules(self) -> float:
        for i, (energy, span) in enumerate(self._files):
            now = int(energy.read_text())
            passed = now - self._last[i]
            self._sum += passed if passed >= 0 else passed + int(span.read_text())
            self._last[i] = now
        return self._sum / 1e6

    def stop(self) -> None:
        pass


def find(device: torch.device) -> Counter | None:
    """What counts the energy of `device`; None where nothing does."""
    if device.type == "cuda":
        import pynvml

        devices = [device]
        if world().size > 1:  # one process counts for all, a GPU each
            devices = [torch.device("cuda", i) for i in range(world().size)]
        uuids = [str(torch.cuda.get_device_properties(one).uuid) for one in devices]
        counters = [counter for uuid in uuids if (counter := find_nvml(pynvml, uuid))]
        return Together(counters) if len(counters) == len(uuids) else None
    packages = [
        path
        for path in sorted(POWERCAP.glob("intel-rapl:*"))
        if path.name.count(":") == 1 and _readable(path / "energy_uj")
    ]
    return RAPL(packages) if packages else None


def find_nvml(nvml: Any, uuid: str) -> Counter | None:
    """The counter of the GPU of this UUID, else its integrated power, else None."""
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if "-" in uuid[:4] else f"GPU-{uuid}")
    except nvml.NVMLError:
        return None
    for kind in (EnergyCounter, IntegratedPower):
        try:
            return kind(nvml, handle)
        except nvml.NVMLError:
            continue
    return None


def _readable(path: Path) -> bool:
    """Whether the counter can be read: root alone may, on many machines."""
    try:
        int(path.read_text())
    except (OSError, ValueError):
        return False
    return True
