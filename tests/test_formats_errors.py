"""Data that is wrong: one clear line each."""

import gzip

import pytest
from records import PAIR, assistant, rows, user

from fastalign.data.formats import (
    DataError,
    read_completions,
    read_preferences,
    read_prompts,
)


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
    assert message.startswith(f"{path}:1: reward is missing: give the data a number reward or")


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
