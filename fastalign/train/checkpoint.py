"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-000120` holding `weights.safetensors`, `state.pt` and a
`manifest.json` with the size and SHA-256 of both. A folder of that name is complete, see `whole`;
the manifest catches what a disk does to it afterwards.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.errors import UserError
from fastalign.train import whole
from fastalign.train.whole import whole_folder

WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another run; the message is for the user."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tensors: dict[str, Tensor]
    """All weights and buffers, `module.parameter`."""
    state: dict[str, Any]
    """Optimizer, schedule, random states, running moments: all else that a run carries along."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else (hashlib.sha256(file.read()).hexdigest())
        )


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `folder/step-NNNNNN`; it and the `keep` - 1 before it stay.

    Checkpoints of later steps go: they are of a run that was left when an earlier one was resumed.

    Raises:
        OSError: it could not be written (a full disk). Those before it stay, nothing is left of it.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    put_back(folder)
    for left in sorted(folder.glob(".step-*.partial")):
        shutil.rmtree(left)
    final = folder / f"step-{checkpoint.step:06d}"
    with whole_folder(final) as partial:
        save_file(apart(checkpoint.tensors), partial / WEIGHTS)
        with (partial / STATE).open("wb") as file:
            torch.save(checkpoint.state, file)
        files = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)}
            for name in (WEIGHTS, STATE)
        }
        manifest = {"step": checkpoint.step, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2))
    paths = found(folder)
    here = paths.index(final)
    for path in paths[: max(0, here + 1 - keep)] + paths[here + 1 :]:
        shutil.rmtree(path)
    return final


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


def put_back(folder: Path) -> None:
    """Ends what a dead process left half done, see `whole`."""
    for aside in sorted(folder.glob(".step-*.old")):
        whole.put_back(folder / aside.name.removeprefix(".").removesuffix(".old"))


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, intact or not."""
    paths = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(paths, key=lambda p: int(p.name[5:]))


def load(path: Path) -> Checkpoint:
    """Reads one checkpoint back.

    Raises:
        CheckpointError: it is missing or damaged; says what is wrong with which file.
    """
    from safetensors.torch import load_file

    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        step = int(manifest["step"])
        for name in (WEIGHTS, STATE):
            expected = manifest["files"][name]
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(
                    f"damaged checkpoint {path}: {name} has {size} bytes, "
                    f"expected {expected['bytes']}"
                )
            if _digest(path / name) != expected["sha256"]:
                raise CheckpointError(
                    f"damaged checkpoint {path}: {name} does not match its checksum"
                )
    except FileNotFoundError as error:
        raise CheckpointError(
            f"damaged checkpoint {path}: {Path(error.filename).name} is missing"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"damaged checkpoint {path}: {MANIFEST} is not readable") from error
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return Checkpoint(step, load_file(path / WEIGHTS), state)


def check_there(resume: str, folder: Path) -> None:
    """Says at once, before data and models are loaded, that there is nothing to resume.

    Raises:
        CheckpointError: `resume` is "auto" and `folder` holds no checkpoint, or it is no folder.
    """
    if resume != "auto":
        if not Path(resume).is_dir():
            raise CheckpointError(f"nothing to resume: no checkpoint at {resume}")
        return
    put_back(folder)
    if not found(folder):
        raise CheckpointError(f"nothing to resume: no checkpoint in {folder}")


def newest_intact(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that reads back, and a line for every newer one that does not.

    Raises:
        CheckpointError: there is none; says what is wrong with the newest.
    """
    check_there("auto", folder)
    damaged: list[str] = []
    for path in reversed(found(folder)):
        try:
            return load(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    raise CheckpointError(f"nothing to resume: {damaged[0]}")


def random_state() -> dict[str, Any]:
    """Every random state a step draws from."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        # One state a GPU; a run may go on with fewer of them, or with more.
        for i, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(one, i)
