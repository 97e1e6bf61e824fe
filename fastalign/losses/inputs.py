"""What the loss objects ask of their inputs: names, shapes, precision; they are constants, but for
``kl``, which is a function of the policy as logp is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)


def wide(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype in WIDE else x.float()


def constants(
    loss: object,
    logp: Tensor,
    inputs: Mapping[str, Tensor | None],
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
    sequences: int | None = None,
) -> dict[str, Tensor]:
    """The inputs that were given, detached (not kl) and wide; ValueError where they do not fit.

    ``sequences``: their number, where advantages may also be one for each sequence.
    """
    missing = [key for key in required if inputs.get(key) is None]
    if missing:
        hint = "; linear_loss makes it, given ref_hidden and ref_weight" if "kl" in missing else ""
        raise ValueError(f"{_name(loss)}: missing inputs: {', '.join(missing)}{hint}")
    found, shape = {}, logp.shape
    for key, tensor in inputs.items():
        if key not in required and key not in optional:
            raise ValueError(
                f"{_name(loss)}: unknown inputs: {key}; it takes {', '.join(required + optional)}"
            )
        if tensor is None:
            continue
        if tensor.shape != shape and not (key == "advantages" and tensor.shape == (sequences,)):
            raise ValueError(
                f"{_name(loss)}: expected {key} of the shape of logp, {tuple(shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        constant = key == "kl" or not tensor.requires_grad
        found[key] = wide(tensor if constant else tensor.detach())
    return found


def _name(loss: object) -> str:
    return type(loss).__name__


def require(condition: bool, loss: object, expected: str) -> None:
    """ValueError about a parameter of ``loss`` unless ``condition``."""
    if not condition:
        raise ValueError(f"{type(loss).__name__}: expected {expected}, got {loss}")
