"""Records out of files, folders and hub data sets: where the bytes are, not what they mean.

``read_records`` yields (record, "file.jsonl:12"). Numbers are the file's lines for JSON lines, and
the record's number, from 1, for JSON arrays, parquet and ``datasets``.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastalign.errors import UserError

Records = Iterator[tuple[dict[str, Any], str]]

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class DataError(UserError):
    """What is wrong with the data, in one line for the user."""


def read_records(
    source: str, *, split: str | None = None, lines: str | None = None, limit: int | None = None
) -> Records:
    """Yields every record of a source with its place.

    Args and errors: see ``fastalign.data.formats.read_preferences``.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit must be at least 1, got {limit}")
    chosen = None if lines is None else _slice(source, lines)
    records = _open(source, split)
    if chosen is not None:
        every = list(records)
        records = iter(every[chosen])
        if every and not every[chosen]:
            raise DataError(f"{source}: lines {lines!r} selects none of its {len(every):,} records")
    yield from islice(records, limit)


def _slice(source: str, lines: str) -> slice:
    match = re.fullmatch(r"(-?\d+)?:(-?\d+)?", lines)
    if match is None:
        raise DataError(f'{source}: lines must look like "0:2000", got {lines!r}')
    start, stop = (None if part is None else int(part) for part in match.groups())
    return slice(start, stop)


def _open(source: str, split: str | None) -> Records:
    path = Path(source).expanduser()
    if path.is_file():
        if split is not None:
            raise DataError(f"{source}: split {split!r} was asked for, but this is one file")
        return _read_file(path)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _read_datasets(source, split, saved=True)
        return _read_folder(path, split)
    if _HUB_ID.fullmatch(source) and not source.endswith(SUFFIXES):
        return _read_datasets(source, split, saved=False)
    raise DataError(f"{source}: no such file or folder")


def _read_folder(folder: Path, split: str | None) -> Records:
    files = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES))
    if not files:
        raise DataError(f"{folder}: no {', '.join(SUFFIXES)} file in this folder")
    first_word = {path: re.split(r"[-_.]", path.name, maxsplit=1)[0] for path in files}
    if split is not None:
        chosen = [path for path in files if first_word[path] == split]
        if not chosen:
            names = ", ".join(path.name for path in files[:5])
            raise DataError(f"{folder}: no file of the split {split!r} among {names}")
        files = chosen
    else:
        # Training on the test file by accident is worse than one more question.
        found = sorted({word for word in first_word.values() if word in SPLITS})
        if len(found) > 1:
            raise DataError(f"{folder}: has the splits {', '.join(found)}; say which with split")
    for path in files:
        yield from _read_file(path)


def _read_file(path: Path) -> Records:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: expected a {', '.join(SUFFIXES)} file")
    read = _read_parquet if path.name.endswith(".parquet") else _read_json
    for record, number in read(path):
        where = f"{path}:{number}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
        yield record, where


def _read_json(path: Path) -> Iterator[tuple[Any, int]]:
    """JSON lines or one JSON array, whatever the name: the first character decides."""
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            if start == "[":
                yield from ((record, number) for number, record in enumerate(json.load(file), 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line), number
                    except json.JSONDecodeError as error:
                        raise DataError(f"{path}:{number}: not JSON ({error.msg})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[Any, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({error})") from None
    number = 0
    with file:
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield record, number


def _read_datasets(source: str, split: str | None, saved: bool) -> Records:
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(
            f"{source}: this data set needs the datasets library: pip install 'fastalign[datasets]'"
        ) from None
    try:
        data = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{source}: no such file or folder, and datasets says: {reason}") from None
    if isinstance(data, dict):
        names = list(data)
        if split is None and len(names) > 1:
            raise DataError(f"{source}: has the splits {', '.join(names)}; say which with split")
        name = names[0] if split is None else split
        if name not in data:
            raise DataError(f"{source}: no split {name!r}; it has {', '.join(names)}")
        data = data[name]
    elif split is not None:
        raise DataError(f"{source}: split {split!r} was asked for, but it is saved without splits")
    for number, record in enumerate(data, 1):
        yield dict(record), f"{source}:{number}"
