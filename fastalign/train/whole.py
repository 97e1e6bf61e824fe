"""Folders and files that are there whole or not at all, whenever the process dies.

What is written gets a temporary name, `.NAME.partial`, is synced, and is renamed last. A folder of
that name that was there before is moved aside first, to `.NAME.old`, and comes back if the process
dies before the new one has the name.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which becomes `final` at the end.

    Raises:
        OSError: a file could not be written (a full disk). Nothing is left of what was; `final` is
            as it was before.
    """
    make_folder(final.parent)
    put_back(final)
    partial, aside = _partial(final), _aside(final)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        with failed_writes():
            yield partial
        for path in [p for p in sorted(partial.rglob("*")) if p.is_file()] + [partial]:
            sync(path)
        if final.exists():
            final.rename(aside)
        partial.rename(final)
    except BaseException:
        # Room for those who have to end in order; a partial folder is of no use to anyone.
        shutil.rmtree(partial, ignore_errors=True)
        put_back(final)
        raise
    sync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def make_folder(path: Path) -> None:
    """With its parents; their names are on the disk then."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def put_back(final: Path) -> None:
    """Ends what a dead process left half done: of a folder and its elder one has the name."""
    aside = _aside(final)
    if aside.exists() and final.exists():
        shutil.rmtree(aside)
    elif aside.exists():
        aside.rename(final)


def write_text(path: Path, text: str) -> None:
    """A small file, replaced in one step."""
    partial = _partial(path)
    partial.write_text(text)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until the file (or the names in the folder) is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def failed_writes() -> Iterator[None]:
    """Makes OSErrors of what safetensors and torch say of a write that failed, in their own words.

    safetensors ends its message with "(os error 28)"; torch's zip writer raises a RuntimeError
    while it handles the OSError of the file it was given.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number:
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        cause: BaseException | None = error.__context__
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise cause from error


def _partial(final: Path) -> Path:
    return final.parent / f".{final.name}.partial"


def _aside(final: Path) -> Path:
    return final.parent / f".{final.name}.old"
