"""fastalign: fast alignment of language models on one machine.

``fastalign.ops`` holds the differentiable operations, ``fastalign.losses`` the loss objects they
take, ``fastalign.backend`` chooses between the reference, the C++ and the Triton implementation.
``fastalign.theory``, loaded when it is first used, tells how good a policy can be at a given KL.
"""

from typing import TYPE_CHECKING, Any

from fastalign import losses, ops
from fastalign.backend import backend

if TYPE_CHECKING:
    from fastalign import theory

__version__ = "0.1.0"

__all__ = ["__version__", "backend", "losses", "ops", "theory"]


def __getattr__(name: str) -> Any:
    if name == "theory":
        import importlib

        return importlib.import_module("fastalign.theory")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
