"""Tensors in the files of a checkpoint, of each process its own part.

torch's distributed checkpoint (`torch.distributed.checkpoint`) in its safetensors form, without a
pickle: every process writes the parts it holds into a file of its own, and of what all processes
hold alike one of them writes each tensor. Nothing is gathered. Whoever reads, in any number of
processes, takes the parts it needs from whichever files they are in.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalign.train import distributed
from fastalign.train.whole import failed_writes

if TYPE_CHECKING:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

PATTERN = "shard-*.safetensors"
OFFSETS = "DCP_SHARDING_INFO"
"""In a file's header: where in the whole tensor each part begins. The name is torch's."""


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes sharded and plain tensors into `folder`, which is there; all processes call.

    Raises:
        OSError: in every process, where one could not write (a full disk).
    """
    import torch.distributed.checkpoint as dcp

    with _alone_or_together() as options:
        dcp.save(dict(tensors), storage_writer=_writer(folder), **options)


def read(folder: Path, into: dict[str, Tensor]) -> None:
    """Fills sharded and plain tensors, of the shapes `shapes` tells; all processes call."""
    import torch.distributed.checkpoint as dcp

    with _alone_or_together() as options:
        dcp.load(dict(into), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), **options)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the whole tensors, by their names."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    found: Any = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {name: tuple(tensor.size) for name, tensor in found.state_dict_metadata.items()}


def _writer(folder: Path) -> HuggingFaceStorageWriter:
    """torch's, which would make bytes of all a process holds before it writes them."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.futures import Future

    class Writer(HuggingFaceStorageWriter):
        def write_data(self, plan: Any, planner: Any) -> Future[Any]:
            from safetensors.torch import save_file

            # A process may hold no row of a small tensor.
            items = [i for i in plan.items if 0 not in i.tensor_data.chunk.sizes]
            parts = {item.index.fqn: planner.resolve_data(item) for item in items}
            offsets = {
                item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)}
                for item in items
            }
            if parts:
                path = folder / f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
                with failed_writes():
                    save_file(apart(parts), path, metadata={OFFSETS: json.dumps(offsets)})
            done: Future[Any] = Future()
            done.set_result([])
            return done

    return Writer(str(folder), save_distributed=True)


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two of them in the same memory, which safetensors
    refuses: of tied weights each name but the first gets a copy."""
    held: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        if place in held:
            own = own.clone()
        held.add(place)
        found[name] = own
    return found


@contextmanager
def _alone_or_together() -> Iterator[dict[str, bool]]:
    """Options of torch's functions; and what they raise, instead of what they wrap it in."""
    from torch.distributed.checkpoint import CheckpointException

    alone = distributed.world().size == 1
    with warnings.catch_warnings(), torch.no_grad():
        # One process is meant, not what became of several.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield {"no_dist": alone}
        except CheckpointException as failed:
            raise next(iter(failed.failures.values()))[0] from failed
