"""Which implementation of an op runs: its reference (plain PyTorch), C++ kernel or Triton kernel.

By default the device decides: CUDA tensors take Triton, CPU tensors take C++ (or the reference when
the extension is not built, said once). float64 is always the reference's, because it is the truth
the kernels are judged by. ``with backend("..."):`` or the environment variable
``FASTALIGN_BACKEND`` decides instead; what was asked for and cannot run is an error, never
something else in silence.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

BACKENDS = ("reference", "cpp", "triton")
# What has memory of its own; other subclasses may not.
PLAIN = (Tensor, Parameter)

try:
    import fastalign._C  # noqa: F401

    CPP_BUILT = True
except ModuleNotFoundError:
    CPP_BUILT = False

_forced: list[str] = []
# Looked up in the dict below os.environ: a lookup there that fails raises first, for every call.
_VARIABLES, _VARIABLE = os.environ._data, os.environ.encodekey("FASTALIGN_BACKEND")  # type: ignore[attr-defined]
_said_unbuilt = False


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


class backend:  # noqa: N801 - used as a function: `with fastalign.backend("cpp"):`
    """Context manager: every op inside runs by the named implementation, in all threads.

    Args:
        name: "reference", "cpp" or "triton".

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "fastalign.backend")

    def __enter__(self) -> backend:
        _forced.append(self.name)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _forced.pop()


def triton_interpreted() -> bool:
    """Whether Triton's interpreter runs kernels (``TRITON_INTERPRET=1``): on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def plain(tensor: Tensor) -> bool:
    """Whether an op may run without the dispatcher, whose 0.1 to 0.2 ms for many arguments are more
    than a small op takes: not with tracers, and tensors that only stand for others."""
    if type(tensor) not in PLAIN or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None  # inside no torch.func transform


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """NotImplementedError where a tensor carries a tangent (``torch.func.jvp``, dual numbers).

    The ops have backward formulas only, and torch would take a missing forward one for 0.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"{op}: expected tensors without tangents (torch.func.jvp, dual numbers): there is a "
            "backward derivative only"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` of an op whose slopes are constants to autograd: a second derivative raises.

    torch's decorator of this name looks at the upstream gradients only. A loss has one that needs
    no gradient, and what is made of the loss's gradient, a penalty of its norm, would be a constant
    in silence.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        refuse: Any = torch._C._functions.DelayedError(
            b"trying to differentiate twice an op that is once_differentiable", len(found)
        )
        return refuse(*(None if x is None else x.detach().requires_grad_() for x in found))

    return wrapper


def choose(op: str, tensor: Tensor) -> str:
    """The backend that runs ``op`` on ``tensor``: "reference", "cpp" or "triton".

    Raises:
        RuntimeError: the backend asked for cannot run on this device, dtype or build.
    """
    global _said_unbuilt
    if _forced:
        asked = _forced[-1]
    else:
        asked = os.environ["FASTALIGN_BACKEND"] if _VARIABLE in _VARIABLES else ""
    if not asked:
        if tensor.dtype == torch.float64:
            return "reference"
        if tensor.is_cuda:
            return "triton"
        if tensor.device.type == "cpu" and CPP_BUILT:
            return "cpp"
        if tensor.device.type == "cpu" and not _said_unbuilt:
            _said_unbuilt = True
            warnings.warn(
                "fastalign: the C++ extension is not built; CPU tensors take the PyTorch reference "
                "(build it with: pip install --no-build-isolation -e .)",
                stacklevel=2,
            )
        return "reference"
    asked = _checked(asked, "FASTALIGN_BACKEND")
    if asked == "reference":
        return asked
    why = ""
    if tensor.dtype == torch.float64:
        why = "float64 has only the reference"
    elif asked == "cpp" and not CPP_BUILT:
        why = "the C++ extension is not built (pip install --no-build-isolation -e .)"
    elif asked == "cpp" and tensor.device.type != "cpu":
        why = f"the C++ kernels are for CPU tensors, got a tensor on {tensor.device}"
    elif asked == "triton" and not tensor.is_cuda and not triton_interpreted():
        why = (
            "Triton kernels need CUDA tensors, or TRITON_INTERPRET=1 set before Triton is "
            f"imported; got a tensor on {tensor.device}"
        )
    if why:
        raise RuntimeError(f"{op}: backend {asked!r} was asked for, but {why}")
    return asked
