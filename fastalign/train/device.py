"""Where a command computes and in which precision, as --device and --dtype say."""

from __future__ import annotations

import torch

from fastalign.train.folder import RunError


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        RunError: an unknown or absent device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"device {name!r} is not supported: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(
            f"device {name!r} was asked for, but {torch.cuda.device_count()} CUDA devices are here"
        )
    return device


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The forward pass's precision: weights stay fp32 (fp32 means no autocast).

    Raises:
        RunError: an unknown dtype.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise RunError(f"unknown dtype {dtype!r}: expected auto, float32 or bfloat16")
    low = forward_dtype(device, dtype) == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low)


def forward_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """What `dtype` means on a device: auto is bfloat16 on CUDA, float32 elsewhere."""
    low = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if low else torch.float32
