"""Where records come from: kinds of files, folders, hub ids, slices."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from records import CHAT_PAIR, assistant, one_preference, read, rows, user

from fastalign.data.formats import (
    DataError,
    Preference,
    read_preferences,
    read_prompts,
)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.jsonl.gz", "d.json.gz", "d.parquet"])
def test_file_kinds(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(3)), path)
    elif ".jsonl" in name:
        text = "".join(json.dumps(row) + "\n\n" for row in rows(3))
        opened = gzip.open(path, "wt") if name.endswith("gz") else open(path, "w")
        with opened as file:
            file.write(text)
    else:
        opened = gzip.open(path, "wt") if name.endswith("gz") else open(path, "w")
        with opened as file:
            json.dump(rows(3), file, indent=1)
    pairs, report = read_preferences(str(path))
    assert [pair.prompt for pair in pairs] == ["p0", "p1", "p2"]
    # With blank lines between them, records stand on lines 1, 3, 5; elsewhere they are counted.
    numbers = [1, 3, 5] if ".jsonl" in name else [1, 2, 3]
    assert [pair.source for pair in pairs] == [f"{path}:{number}" for number in numbers]
    assert report.kept == 3


def test_json_lines_under_the_name_json_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "lines.json"
    text = "\n".join(json.dumps(row) for row in rows(2))
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert read(path) == ["p0", "p1"]


def test_parquet_conversations(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "chat.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CHAT_PAIR]), path)
    assert one_preference(str(path)) == ([user("2+2?")], [assistant("4")], [assistant("5")])


def test_slices(write):
    path = write(*rows(10))
    assert read(path, lines="2:4") == ["p2", "p3"]
    assert read(path, lines="8:") == ["p8", "p9"]
    assert read(path, lines=":2") == ["p0", "p1"]
    assert read(path, lines="-1:") == ["p9"]
    assert read(path, limit=3) == ["p0", "p1", "p2"]
    assert read(path, lines="4:9", limit=2) == ["p4", "p5"]
    assert read(path, limit=99) == [f"p{i}" for i in range(10)]


def test_limit_stops_reading(write):
    path = write(*rows(2), "this is not JSON")
    assert read(path, limit=2) == ["p0", "p1"]


def test_a_limit_that_was_reached_is_said(write):
    path = write(*rows(5))
    for limit, said in ((3, "kept 3 of 3 (limit 3)"), (6, "kept 5 of 5"), (None, "kept 5 of 5")):
        assert str(read_prompts(path, limit=limit)[1]) == f"{path}: {said}"


def test_folder_of_files_and_splits(tmp_path, write):
    write(*rows(2), name="f/train-0.jsonl")
    write(*rows(1), name="f/train-1.jsonl")
    write(*rows(4), name="f/test.jsonl")
    write("not data", name="f/README.md")
    folder = tmp_path / "f"
    assert len(read(folder, split="train")) == 3
    assert len(read(folder, split="test")) == 4
    with pytest.raises(DataError, match="has the splits test, train; say which with split"):
        read(folder)
    with pytest.raises(DataError, match="no file of the split 'dev' among test.jsonl"):
        read(folder, split="dev")
    write(*rows(2), name="g/b.jsonl")
    write(*rows(1), name="g/a.jsonl")
    pairs, _ = read_preferences(str(tmp_path / "g"))
    assert [Path(pair.source).name for pair in pairs] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]


def test_folder_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the datasets library")
    data = datasets.Dataset.from_list([CHAT_PAIR] * 3)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "two")
    pairs, _ = read_preferences(str(tmp_path / "one"))
    assert pairs[2] == Preference(
        [user("2+2?")], [assistant("4")], [assistant("5")], f"{tmp_path / 'one'}:3"
    )
    assert len(read(tmp_path / "two", split="test")) == 1
    with pytest.raises(DataError, match="has the splits train, test; say which with split"):
        read(tmp_path / "two")
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        read(tmp_path / "two", split="dev")
    with pytest.raises(DataError, match="saved without splits"):
        read(tmp_path / "one", split="train")


def test_hub_id_goes_through_datasets(monkeypatch):
    """The hub itself is not asked: load_dataset is replaced by one that knows one name."""
    datasets = pytest.importorskip("datasets", reason="needs the datasets library")

    def load(name):
        if name != "someone/pairs":
            raise FileNotFoundError(f"Dataset {name!r} doesn't exist\nand more lines")
        return {"train": rows(2), "test": rows(1)}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("someone/pairs", split="test") == ["p0"]
    with pytest.raises(DataError) as caught:
        read("someone/else")
    assert str(caught.value) == (
        "someone/else: no such file or folder, and datasets says: "
        "Dataset 'someone/else' doesn't exist"
    )


def test_without_datasets_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"someone/pairs: .* pip install 'fastalign\[datasets\]'"):
        read("someone/pairs")
