"""What the loss objects ask of their inputs: names, shapes, precision; they are constants."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def constants(
    loss: object,
    logp: Tensor,
    inputs: Mapping[str, Tensor | None],
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    sequences: int | None = None,
) -> dict[str, Tensor]:
    """The inputs that were given, detached and wide; ValueError where they do not fit.

    ``sequences``: their number, where advantages may also be one for each sequence.
    """
    name = type(loss).__name__
    missing = [key for key in required if inputs.get(key) is None]
    if missing:
        raise ValueError(f"{name}: missing inputs: {', '.join(missing)}")
    unknown = [key for key in inputs if key not in required + optional]
    if unknown:
        raise ValueError(
            f"{name}: unknown inputs: {', '.join(unknown)}; "
            f"it takes {', '.join(required + optional)}"
        )
    found = {}
    for key, tensor in inputs.items():
        if tensor is None:
            continue
        shared = key == "advantages" and tensor.shape == (sequences,)
        if tensor.shape != logp.shape and not shared:
            raise ValueError(
                f"{name}: expected {key} of the shape of logp, {tuple(logp.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        found[key] = wide(tensor.detach())
    return found


def require(condition: bool, loss: object, expected: str) -> None:
    """ValueError about a parameter of ``loss`` unless ``condition``."""
    if not condition:
        raise ValueError(f"{type(loss).__name__}: expected {expected}, got {loss}")
