"""What is asked of the inputs of fastalign.theory, and the error that says what came instead."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def distribution(op: str, name: str, p: Tensor) -> Tensor:
    """``p`` [K] as it is: float64, no negative entry, a sum of 1 to 1e-9."""
    if not isinstance(p, Tensor) or p.dtype != torch.float64 or p.dim() != 1 or len(p) == 0:
        raise ValueError(
            f"{op}: expected {name} as a float64 tensor [K] with K >= 1, got {_seen(p)}"
        )
    wrong = ~(p >= 0) | p.isinf()
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(f"{op}: expected {name} >= 0, got {float(p[place])} at {place}")
    total = float(p.sum())
    if abs(total - 1.0) > 1e-9:
        raise ValueError(f"{op}: expected {name} to sum to 1, got a sum of {total!r}")
    return p


def on_support(op: str, name: str, reward: Tensor, base: Tensor) -> Tensor:
    """``reward`` [K] as float64; finite where ``base`` > 0, elsewhere it is never used."""
    if not isinstance(reward, Tensor) or reward.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: expected {name} as a float tensor, got {_seen(reward)}")
    if reward.shape != base.shape:
        raise ValueError(
            f"{op}: expected {name} of shape {tuple(base.shape)}, got {tuple(reward.shape)}"
        )
    reward = reward.double()
    wrong = (base > 0) & ~reward.isfinite()
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: expected {name} to be finite where the base has mass, "
            f"got {float(reward[place])} at {place}"
        )
    return reward


def same_length(op: str, name: str, p: Tensor, other: Tensor) -> None:
    if p.shape != other.shape:
        raise ValueError(
            f"{op}: expected {name} of shape {tuple(other.shape)}, got {tuple(p.shape)}"
        )


def samples(op: str, name: str, values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``values`` as float64: finite, of one of these numbers of dimensions, not empty."""
    if (
        not isinstance(values, Tensor)
        or values.dtype not in FLOAT_DTYPES
        or values.dim() not in dims
        or values.numel() == 0
    ):
        shapes = " or ".join({1: "[N]", 2: "[P, N]"}[d] for d in dims)
        raise ValueError(
            f"{op}: expected {name} as a float tensor {shapes}, not empty, got {_seen(values)}"
        )
    wrong = ~values.isfinite()
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: expected finite {name}, got {float(values[tuple(place)])} at {place}"
        )
    return values.double()


def number(op: str, name: str, value: float, least: float = -math.inf) -> float:
    """``value`` as a finite Python float, not under ``least``."""
    value = float(value)
    if not math.isfinite(value) or value < least:
        bound = "" if least == -math.inf else f" >= {least:g}"
        raise ValueError(f"{op}: expected a finite {name}{bound}, got {value}")
    return value


def _seen(value: object) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}, {value.dtype}"
    return type(value).__name__
