"""What a run computes once of given data and frozen models: kept in its folder for --resume.

    OUTPUT/computed/NAME.safetensors      tensors, and a key of all they were computed from

A file of another key is of other data, models or precision: it is computed anew. Nothing is written
before the run has begun, so that a run which cannot start leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastalign.data.tokens import TokenizedCompletion
from fastalign.train.meter import Meter

log = logging.getLogger("fastalign")

FOLDER = "computed"


class Kept:
    """What was computed, or read back, in this process; `folder` is the run's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self.found: dict[str, tuple[str, dict[str, Tensor]]] = {}

    def get(
        self, name: str, key: str, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors `name`, from the folder where its key is the same, else computed now."""
        tensors = self._read(name, key)
        self.found[name] = key, compute() if tensors is None else tensors
        return self.found[name][1]

    def _read(self, name: str, key: str) -> dict[str, Tensor] | None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != key:
                    log.info("%s is of other data, models or precision: computed anew", path)
                    return None
                return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            log.warning("%s is damaged (%s): computed anew", path, error)
            return None

    def write(self) -> None:
        """All that was found, each file whole or not at all; the run's folder must be claimed."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        for name, (key, tensors) in self.found.items():
            partial = self.folder / f".{name}.partial"
            save_file({k: t.contiguous() for k, t in tensors.items()}, partial, {"key": key})
            os.replace(partial, self.folder / f"{name}.safetensors")


def key_of(examples: Sequence[TokenizedCompletion], meter: Meter, **facts: Any) -> str:
    """SHA-256 of the token ids of all examples, in order, of the device and the precision that the
    run computes in, as its meter knows them, and of what else decides."""
    facts |= {"device": meter.device.type, "dtype": str(meter.dtype)}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for e in examples:
        digest.update(f"{e.prompt}{e.completion}".encode())
    return digest.hexdigest()
