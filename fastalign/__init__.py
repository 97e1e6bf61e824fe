"""fastalign: fast alignment of language models on one machine.

``fastalign.ops`` holds the differentiable operations, ``fastalign.losses`` the loss objects they
take, ``fastalign.backend`` chooses between the reference, the C++ and the Triton implementation.
``fastalign.theory``, loaded when it is first used, tells how good a policy can be at a given KL.
"""

import gc
from typing import TYPE_CHECKING, Any

# While these modules are imported the collector would look through all of torch's objects, and find
# nothing: half of the time that the import takes.
_collecting = gc.isenabled()
gc.disable()
try:
    from fastalign import losses, ops
    from fastalign.backend import backend
finally:
    if _collecting:
        gc.enable()

if TYPE_CHECKING:
    from fastalign import theory

__version__ = "0.1.0"

__all__ = ["__version__", "backend", "losses", "ops", "theory"]


def __getattr__(name: str) -> Any:
    if name == "theory":
        import importlib

        return importlib.import_module("fastalign.theory")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
