"""What the loss objects ask of their inputs: names, shapes, precision, bounds of sequences. They
are constants, but for ``kl``, which is a function of the policy as logp is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastalign.backend import PLAIN

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


def sequence_offsets(op: str, cu_seqlens: Tensor, x: Tensor) -> Tensor:
    """``cu_seqlens`` as int64; ValueError where they are not the bounds of sequences of ``x`` [N].

    Their content is looked at on CPU only (elsewhere the host would wait); of a compiled graph when
    it runs.
    """
    if (
        cu_seqlens.dim() != 1
        or cu_seqlens.shape[0] < 1
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.device != x.device
    ):
        raise ValueError(
            f"{op}: expected cu_seqlens [S + 1] of int32 or int64 on {x.device}, "
            f"got shape {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype} on {cu_seqlens.device}"
        )
    if cu_seqlens.device.type != "cpu":
        return cu_seqlens.to(torch.int64)
    if torch.compiler.is_compiling() or not _at_hand(cu_seqlens):
        return _rising(op, cu_seqlens, x.shape[0])
    _check_rising(op, cu_seqlens, x.shape[0])
    return cu_seqlens.to(torch.int64)


def _at_hand(x: Tensor) -> bool:
    """Whether its content may be read: no tracer, and nothing that only stands for a tensor."""
    return type(x) in PLAIN and torch._C._len_torch_dispatch_stack() == 0


def _check_rising(op: str, cu_seqlens: Tensor, n: int) -> None:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != n or bounds != sorted(bounds):
        raise ValueError(
            f"{op}: expected cu_seqlens to rise from 0 to N = {n}, got {bounds[:3]}..{bounds[-1]}"
        )


@torch.library.custom_op("fastalign::rising_offsets", mutates_args=())
def _rising(op: str, cu_seqlens: Tensor, n: int) -> Tensor:
    """What takes the result runs after the check."""
    _check_rising(op, cu_seqlens, n)
    return cu_seqlens.to(torch.int64, copy=True)


@_rising.register_fake
def _(op: str, cu_seqlens: Tensor, n: int) -> Tensor:
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64)


def _name(loss: object) -> str:
    return type(loss).__name__


def require(condition: bool, loss: object, expected: str) -> None:
    """ValueError about a parameter of ``loss`` unless ``condition``."""
    if not condition:
        raise ValueError(f"{type(loss).__name__}: expected {expected}, got {loss}")
