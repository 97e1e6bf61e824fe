"""What it takes to repeat a run, beside its configuration: command, machine, versions."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from typing import Any

import torch


def facts(device: torch.device) -> dict[str, Any]:
    """All three, for the files of a run."""
    return {"machine": machine(device), "versions": versions(), "command": command_line()}


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of everything that has a say in the numbers."""
    import transformers

    import fastalign

    return {
        "fastalign": fastalign.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def command_line() -> str:
    """The command that started this process, to repeat it."""
    return shlex.join(["fastalign", *sys.argv[1:]])
