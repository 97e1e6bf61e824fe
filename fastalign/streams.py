"""Random streams that do not meet: one for each use of a seed, told apart by name.

Seeds made by arithmetic collide (``seed * 1000 + k`` for heads and again for epochs: head 1 and
epoch 1 draw the same numbers, and epoch 1000 of seed 0 is epoch 0 of seed 1). A hash of the names
does not.
"""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator seeded with the first 63 bits of SHA-256 of "seed/name/name/...".

    The same seed and names give the same numbers on every machine and in every process, so nothing
    of it needs to be kept in a checkpoint: ``stream(seed, "order", epoch)`` is the order of that
    epoch whether the run was resumed or not. ``.initial_seed()`` seeds what takes a number.
    """
    text = "/".join(str(part) for part in (seed, *names))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
