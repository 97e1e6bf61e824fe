"""fastalign: fast alignment of language models on one machine.

``fastalign.ops`` holds the differentiable operations, ``fastalign.losses`` the loss objects they
take, ``fastalign.backend`` chooses between the reference, the C++ and the Triton implementation.
"""

from fastalign import losses, ops
from fastalign.backend import backend

__version__ = "0.1.0"

__all__ = ["__version__", "backend", "losses", "ops"]
