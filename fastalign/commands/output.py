"""Files that a command leaves behind: refused at the door where they cannot be written, and whole
or not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fastalign.train import strict_json
from fastalign.train.folder import RunError
from fastalign.train.whole import sync, write_text


def claim_file(output: str | None, *, overwrite: bool) -> Path | None:
    """The file to write, whose folder is made; None for the screen.

    Raises:
        RunError: it is there already, is a folder, or cannot be written.
    """
    if output is None:
        return None
    path = Path(output)
    if path.is_dir():
        raise RunError(f"output {path} is a folder; expected a file")
    if path.exists() and not overwrite:
        raise RunError(f"output {path} is there already; choose another, or --overwrite")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise RunError(f"cannot write output {path}: {parent} is a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_of(path).write_text("")
        partial_of(path).unlink()
    except OSError as error:
        raise RunError(f"cannot write output {path}: {error.strerror}") from error
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """Gives a file to write into, which gets its name at the end; what was there before stays until
    then, and after an error."""
    partial = partial_of(path)
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        sync(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def write_line(file: TextIO, record: dict[str, Any]) -> None:
    """One JSON line."""
    file.write(strict_json.dumps(record) + "\n")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """A file of JSON lines, replaced in one step."""
    write_text(path, "".join(strict_json.dumps(record) + "\n" for record in records))


def add_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Adds JSON lines to those that are there."""
    with path.open("a") as file:
        for record in records:
            write_line(file, record)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that a stopped command may have left half written."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
