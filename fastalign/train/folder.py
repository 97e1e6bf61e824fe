"""A run's folder: who may use it, what it is cleared of, its configuration.

run folder/
  config.yaml      the resolved configuration
  metrics.jsonl    one JSON object a line
  checkpoints/     step-000100/ ...
  accounting.json  what it cost by phase, written when it ends or is stopped
  reference/       log-probs of the reference, of preference losses that keep them
  computed/        rewards and log-probs of given responses, of the methods that learn from these
  model/           what came out, written at the end
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from fastalign.errors import UserError
from fastalign.train.whole import write_text

GONE = ".gone"
"""How the name of a folder ends that is being deleted."""


class RunError(UserError):
    """A run that cannot start; the message is one clear line for the user."""


def claim_folder(
    folder: Path, *, overwrite: bool, reuse: bool = False, resumable: bool = True
) -> None:
    """Makes the folder, or says why it cannot be used. A folder of nothing but config.yaml is free.

    Nothing is deleted yet: a former run goes when this one begins, its data and models loaded.
    `resumable`: whether the command has --resume.

    Raises:
        RunError: it holds something already, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"output {folder} is a file; expected a folder")
    try:
        held = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if held - {"config.yaml"} and not reuse:
            if not overwrite:
                raise RunError(
                    f"output folder {folder} is already in use; choose another --output, "
                    f"or --overwrite{', or --resume' if resumable else ''}"
                )
            if "config.yaml" not in held:
                raise RunError(
                    f"--overwrite: {folder} does not hold a run (no config.yaml); not deleting it"
                )
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise RunError(f"cannot write to output folder {folder}: {error.strerror}") from error


def is_unfinished(folder: Path) -> bool:
    """Whether this is the folder of a run that was stopped before its first checkpoint."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    checkpoints = [
        path
        for path in folder.glob("checkpoints/*")
        if path.name.startswith(("step-", ".step-")) and not path.name.endswith(".partial")
    ]
    return ("config.yaml" in names or not names) and "model" not in names and not checkpoints


def clear_folder(folder: Path) -> None:
    """Deletes what a former run left in a claimed folder: its checkpoints first, so that nobody
    resumes the rest, and config.yaml, which says that this is a run's folder, last. A folder in it
    is gone at once; nobody finds it half deleted."""
    order = {"checkpoints": 0, "config.yaml": 2}
    for path in sorted(folder.iterdir(), key=lambda path: (order.get(path.name, 1), path.name)):
        if path.is_dir() and not path.is_symlink():
            gone = path
            if not path.name.endswith(GONE):
                gone = path.rename(folder / f".{path.name.lstrip('.')}{GONE}")
            shutil.rmtree(gone)
        else:
            path.unlink()


def write_config(folder: Path, config: Any) -> None:
    """The resolved configuration as config.yaml, which `--config` reads back."""
    import yaml

    write_text(folder / "config.yaml", yaml.safe_dump(options_of(config), sort_keys=False))


def options_of(config: Any) -> dict[str, Any]:
    """The options that make the run what it is, without those of one start of it."""
    values = dataclasses.asdict(config)
    for once in ("resume", "overwrite"):
        values.pop(once, None)
    return values
