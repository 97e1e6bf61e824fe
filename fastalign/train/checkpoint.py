"""Checkpoints that are whole or not there.

A checkpoint is a folder `step-000120`, the work of all processes:

  shard-00001.safetensors  weights, buffers, the optimizer's moments: a file of each process with
                           its parts, see `shards`
  state.pt                 all else
  manifest.json            size and SHA-256 of these files

A folder of that name is complete, see `whole`; the manifest catches what a disk does to it
afterwards.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.errors import UserError
from fastalign.train import distributed, shards, whole
from fastalign.train.whole import failed_writes, whole_folder

STATE, MANIFEST = "state.pt", "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another run; the message is for the user."""


@dataclass(frozen=True)
class Checkpoint:
    """What is to be saved."""

    step: int
    tensors: dict[str, Tensor]
    """All weights and buffers, `module.parameter`, and what is as large as they are: whole, or
    spread over the processes."""
    state: dict[str, Any]
    """Schedule, random states, running moments: all else that a run carries along. The main
    process's is saved."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint on the disk, whose files are intact; its tensors are still there only."""

    path: Path
    step: int
    state: dict[str, Any]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors."""
        return shards.shapes(self.path)

    def read(self, into: dict[str, Tensor]) -> None:
        """Fills tensors that are laid out as this run has them; all processes call."""
        shards.read(self.path, into)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else (hashlib.sha256(file.read()).hexdigest())
        )


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `folder/step-NNNNNN`; it and the `keep` - 1 before it stay. All processes call.

    Checkpoints of later steps go: they are of a run that was left when an earlier one was resumed.

    Raises:
        OSError: it could not be written (a full disk). Those before it stay, nothing is left of it.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    with ExitStack() as stack:  # holds the main process's folder

        def begin() -> Path:
            whole.make_folder(folder)
            put_back(folder)
            for left in sorted(folder.glob(".step-*.partial")):
                shutil.rmtree(left)
            return stack.enter_context(whole_folder(final))

        partial = distributed.on_main(begin)
        shards.write(partial, checkpoint.tensors)
        names = sorted(path.name for path in partial.glob(shards.PATTERN))
        files = dict(distributed.split(lambda name: (name, _facts(partial / name)), names))

        def end() -> None:
            with failed_writes():
                with (partial / STATE).open("wb") as file:
                    torch.save(checkpoint.state, file)
                files[STATE] = _facts(partial / STATE)
                manifest = {"step": checkpoint.step, "files": files}
                (partial / MANIFEST).write_text(json.dumps(manifest, indent=2))
                stack.close()
            paths = found(folder)
            here = paths.index(final)
            for path in paths[: max(0, here + 1 - keep)] + paths[here + 1 :]:
                shutil.rmtree(path)

        distributed.on_main(end)
    return final


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def put_back(folder: Path) -> None:
    """Ends what a dead process left half done, see `whole`."""
    for aside in sorted(folder.glob(".step-*.old")):
        whole.put_back(folder / aside.name.removeprefix(".").removesuffix(".old"))


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, intact or not."""
    paths = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(paths, key=lambda p: int(p.name[5:]))


def load(path: Path) -> Saved:
    """Looks through one checkpoint's files, each process through its share of them.

    Raises:
        CheckpointError: it is missing or damaged; says what is wrong with which file.
    """
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        step, files = int(manifest["step"]), dict(manifest["files"])
        expected = [(path / name, files[name]) for name in sorted({*files, STATE})]
        wrong = [line for line in distributed.split(lambda one: _damage(*one), expected) if line]
    except FileNotFoundError as error:
        raise CheckpointError(f"damaged checkpoint {path}: {MANIFEST} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"damaged checkpoint {path}: {MANIFEST} is not readable") from error
    if wrong:
        raise CheckpointError(f"damaged checkpoint {path}: {wrong[0]}")
    others = [name for name in files if name != STATE and not Path(name).match(shards.PATTERN)]
    if others:
        raise CheckpointError(
            f"checkpoint {path} is intact, but of another version of fastalign: this one does not "
            f"read {others[0]}; go on with that version, or begin a new run"
        )
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    return Saved(path, step, state)


def _damage(path: Path, expected: dict[str, Any]) -> str | None:
    """What a line says of a file that is not as it was written."""
    if not path.exists():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path.name} has {size} bytes, expected {expected['bytes']}"
    if _digest(path) != expected["sha256"]:
        return f"{path.name} does not match its checksum"
    return None


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


def newest_intact(folder: Path) -> tuple[Saved, list[str]]:
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
