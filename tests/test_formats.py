"""Every form of data that is accepted, what is dropped and counted, every error message."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from fastalign.data.formats import (
    Completion,
    DataError,
    LoadReport,
    Preference,
    Prompt,
    read_completions,
    read_preferences,
    read_prompts,
)

HH = Path(__file__).parents[2] / "shared/data/hh-rlhf/harmless-test.jsonl.gz"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


PAIR = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
CHAT_PAIR = {
    "prompt": [user("2+2?")],
    "chosen": [assistant("4")],
    "rejected": [assistant("5")],
}


@pytest.fixture
def write(tmp_path):
    def write(*records, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


def one_preference(path):
    (pair,), report = read_preferences(path)
    assert report.kept == 1 and not report.dropped
    assert pair.source == f"{path}:1"
    return pair.prompt, pair.chosen, pair.rejected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        pytest.param(PAIR, ("2+2?", "4", "5"), id="plain"),
        pytest.param(
            {**PAIR, "score_chosen": 3.0, "margin": None}, ("2+2?", "4", "5"), id="other-keys"
        ),
        pytest.param(
            CHAT_PAIR, ([user("2+2?")], [assistant("4")], [assistant("5")]), id="conversation"
        ),
        pytest.param(
            {
                "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                "rejected": [user("a"), assistant("b"), user("c"), assistant("e")],
            },
            ([user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e")]),
            id="conversation-implicit-prompt",
        ),
        pytest.param(
            {
                "prompt": "a",
                "chosen": [user("a"), assistant("d")],
                "rejected": [user("a"), assistant("e")],
            },
            ([user("a")], [assistant("d")], [assistant("e")]),
            id="conversation-and-a-copy-of-its-question",
        ),
        pytest.param(
            {
                "prompt": [user("a")],
                "chosen": [user("a"), assistant("d")],
                "rejected": [user("a"), assistant("e")],
            },
            ([user("a")], [assistant("d")], [assistant("e")]),
            id="conversation-repeated-in-responses",
        ),
        pytest.param(
            {"prompt": "a", "chosen": [assistant("d")], "rejected": [assistant("e")]},
            ([user("a")], [assistant("d")], [assistant("e")]),
            id="plain-prompt-conversation-responses",
        ),
        pytest.param(
            {"prompt": [user("a")], "chosen": "d", "rejected": "e"},
            ([user("a")], [assistant("d")], [assistant("e")]),
            id="conversation-prompt-plain-responses",
        ),
        pytest.param(
            {"chosen": "Q: sky? A: the blue one", "rejected": "Q: sky? A: the black one"},
            ("Q: sky? A: the", " blue one", " black one"),
            id="text-implicit-prompt-cut-between-words",
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: so\n\nAssistant: good",
                "rejected": "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: so\n\nAssistant: gone",
            },
            (
                "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: so\n\nAssistant:",
                " good",
                " gone",
            ),
            id="dialogue-text-split-at-the-last-assistant",
        ),
    ],
)
def test_preference_forms(write, record, expected):
    assert one_preference(write(record)) == expected


def test_message_keys_beyond_role_and_content_go(write):
    answer = {"role": "assistant", "content": "4", "name": "bot"}
    prompt, chosen, _ = one_preference(write({**CHAT_PAIR, "chosen": [answer]}))
    assert chosen == [assistant("4")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (PAIR | {"chosen": "5"}, "chosen equals rejected"),
        (PAIR | {"rejected": "  "}, "empty response"),
        ({"chosen": "a b", "rejected": "a b c"}, "empty response"),
        ({"chosen": "yes", "rejected": "no"}, "chosen and rejected share no prompt"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]},
            "chosen and rejected share no prompt",
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: B\n\nHuman: c\n\nAssistant: d",
            },
            "dialogues differ before the last assistant turn",
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            },
            "dialogues differ before the last assistant turn",
        ),
        (
            {
                "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                "rejected": [user("a"), assistant("e"), user("c"), assistant("d")],
            },
            "response is not one assistant message",
        ),
        (
            {
                "chosen": [user("a"), assistant("b"), user("c")],
                "rejected": [user("a"), assistant("b"), user("d")],
            },
            "response is not one assistant message",
        ),
    ],
)
def test_dropped_and_counted(write, record, reason):
    path = write(PAIR, record, record)
    pairs, report = read_preferences(path)
    assert [pair.source for pair in pairs] == [f"{path}:1"]
    assert report.kept == 1
    assert report.dropped == {reason: 2}
    assert report.examples == {reason: f"{path}:2"}


def test_error_when_nothing_is_left(write):
    path = write(PAIR | {"chosen": "5"}, PAIR | {"chosen": "5"})
    with pytest.raises(DataError, match=r"no usable record.*chosen equals rejected: 2, first at"):
        read_preferences(path)


def test_report_line():
    report = LoadReport("file", kept=1998)
    report.drop("chosen equals rejected", "file:17")
    report.drop("chosen equals rejected", "file:99")
    report.truncate("chosen cut", "file:5")
    assert str(report) == (
        "file: kept 1,998 of 2,000; dropped 2 (chosen equals rejected: 2, first at file:17); "
        "truncated 1 (chosen cut: 1, first at file:5)"
    )


def test_completion_forms(write):
    path = write(
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b", "reward": 1},
        {"prompt": [user("a")], "completion": [assistant("b")], "reward": -0.5},
        {"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b")]},
        PAIR,
    )
    records, report = read_completions(path)
    assert records == [
        Completion("a", "b", None, f"{path}:1"),
        Completion("a", "b", 1.0, f"{path}:2"),
        Completion([user("a")], [assistant("b")], -0.5, f"{path}:3"),
        Completion(
            [{"role": "system", "content": "s"}, user("a")], [assistant("b")], None, f"{path}:4"
        ),
        Completion("2+2?", "4", None, f"{path}:5"),
    ]
    assert str(report) == f"{path}: kept 5 of 5"


def test_prompt_forms(write):
    path = write(
        {"prompt": "a"},
        {"prompt": "a"},
        {"prompt": [user("a")]},
        {"messages": [user("b"), assistant("c")]},
        {"messages": [user("b"), assistant("d")]},
        {"prompt": "2+2?", "completion": "4"},
        PAIR,
    )
    prompts, report = read_prompts(path)
    assert prompts == [
        Prompt("a", f"{path}:1"),
        Prompt("a", f"{path}:2"),  # a prompt file says itself how often each prompt is wanted
        Prompt([user("a")], f"{path}:3"),
        Prompt([user("b")], f"{path}:4"),
        Prompt("2+2?", f"{path}:6"),
    ]
    assert report.dropped == {"prompt seen before": 2}


# Files, folders, slices


def rows(n):
    return [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(n)]


def read(source, **options):
    return [pair.prompt for pair in read_preferences(str(source), **options)[0]]


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


# Bad input: one clear line each


def failure(call, *args, **options):
    with pytest.raises(DataError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("source", ["nowhere.jsonl", "some/where.parquet", "nowhere", "./a/b"])
def test_missing_file(source):
    assert failure(read_prompts, source) == f"{source}: no such file or folder"


def test_not_json(write):
    path = write(PAIR, '{"prompt": "a", ')
    assert failure(read_preferences, path).startswith(f"{path}:2: not JSON (")
    array = write('[{"prompt": "a"},', "{]", name="array.json")
    assert failure(read_prompts, array).startswith(f"{array}:2: not JSON (")
    assert failure(read_prompts, write("3")).endswith("expected a JSON object, got int")


def test_not_text_not_gzip_not_parquet(tmp_path):
    for name, content, message in (
        ("a.jsonl", b"\xff\xfe\x00", "not UTF-8 text"),
        ("a.jsonl.gz", b"plain", "not a whole gzip file"),
        ("b.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9], "not a whole gzip file"),
        ("a.parquet", b"plain text", "not a parquet file"),
        ("a.csv", b"a,b", "expected a .jsonl, .json"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert message in failure(read_prompts, str(path))


def test_wrong_keys(write):
    path = write({"question": "a", "answer": "b"})
    assert failure(read_preferences, path) == (
        f"{path}:1: found the keys answer, question; for preferences expected "
        "prompt + chosen + rejected, or chosen + rejected that share their beginning"
    )
    assert "for prompts expected prompt, or messages" in failure(read_prompts, path)
    assert "for completions expected prompt + completion" in failure(read_completions, path)
    half = write({"prompt": "a", "chosen": "b", "rejected": None}, name="half.jsonl")
    assert "found the keys chosen, prompt;" in failure(read_preferences, half)


def test_empty_data_set(write, tmp_path):
    path = write("")
    assert failure(read_preferences, path) == f"{path}: the data set is empty"
    array = write("[]", name="empty.json")
    assert failure(read_prompts, array) == f"{array}: the data set is empty"
    (tmp_path / "folder").mkdir()
    assert "no .jsonl, .json" in failure(read_prompts, str(tmp_path / "folder"))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (float("nan"), "reward must be finite, got nan"),
        (float("-inf"), "reward must be finite, got -inf"),
        ("1.0", "reward must be a number, got str"),
        (True, "reward must be a number, got bool"),
    ],
)
def test_bad_reward(write, reward, message):
    good = {"prompt": "a", "completion": "b", "reward": 1.0}
    path = write(good, {**good, "reward": reward})
    assert failure(read_completions, path) == f"{path}:2: {message}"


def test_missing_reward_is_an_error_only_when_required(write):
    path = write({"prompt": "a", "completion": "b", "reward": None})
    assert read_completions(path)[0][0].reward is None
    message = failure(read_completions, path, require_reward=True)
    assert message == f"{path}:1: reward is missing"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (3, "prompt must be a string or a list of messages, got int"),
        ({"role": "user"}, "prompt must be a string or a list of messages, got dict"),
        ("", "prompt is empty"),
        ([], "prompt is an empty list of messages"),
        (["hi"], "prompt[0] must be a message with the strings role and content"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "prompt[0] must be a message with the strings role and content",
        ),
        (
            [user("a"), assistant("b")],
            "prompt ends with an assistant message; the answer belongs apart",
        ),
    ],
)
def test_bad_prompt(write, prompt, message):
    path = write({"prompt": prompt})
    assert failure(read_prompts, path) == f"{path}:1: {message}"


def test_other_bad_fields(write):
    path = write({**PAIR, "chosen": 4})
    assert "chosen must be a string or a list of messages, got int" in failure(
        read_preferences, path
    )
    path = write({**PAIR, "chosen": [assistant("4")]})
    assert "one of chosen and rejected is a string" in failure(read_preferences, path)
    path = write({"messages": "hello"})
    assert "messages must be a list of messages, got str" in failure(read_completions, path)


def test_bad_options(write):
    path = write(*rows(3))
    assert failure(read_prompts, path, lines="2000") == (
        f"{path}: lines must look like \"0:2000\", got '2000'"
    )
    assert failure(read_prompts, path, lines="5:9") == (
        f"{path}: lines '5:9' selects none of its 3 records"
    )
    assert "limit must be at least 1, got 0" in failure(read_prompts, path, limit=0)
    assert "this is one file" in failure(read_prompts, path, split="train")


@pytest.mark.data
@pytest.mark.skipif(not HH.exists(), reason=f"the HH test file is not at {HH}")
def test_hh_rlhf():
    pairs, report = read_preferences(str(HH))
    assert report.dropped == {
        "dialogues differ before the last assistant turn": 5,
        "empty response": 4,
    }
    assert report.kept == len(pairs) == 2303
    for pair in pairs:
        assert isinstance(pair.prompt, str) and isinstance(pair.chosen, str)
        assert pair.prompt.startswith("\n\nHuman:") and pair.prompt.endswith("\n\nAssistant:")
        assert pair.chosen != pair.rejected and "\n\nAssistant:" not in pair.chosen
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    for pair in pairs:
        record = lines[int(pair.source.rsplit(":", 1)[1]) - 1]
        assert f"{pair.prompt}{pair.chosen}" == record["chosen"]
        assert f"{pair.prompt}{pair.rejected}" == record["rejected"]
    train, _ = read_preferences(str(HH), lines="0:2000")
    held_out, _ = read_preferences(str(HH), lines="2000:")
    assert train + held_out == pairs
    prompts, prompt_report = read_prompts(str(HH))
    assert len(prompts) == len({pair.prompt for pair in pairs})
    assert len(prompts) + sum(prompt_report.dropped.values()) == 2312
