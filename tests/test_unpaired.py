"""Labelled single responses, and what pairs may carry beside their texts."""

import pytest
from records import CHAT_PAIR, PAIR, assistant, read_preferences, user

from fastalign.data.files import DataError
from fastalign.data.formats import read_completions
from fastalign.data.unpaired import is_paired, read_unpaired

GOOD = {"prompt": "2+2?", "completion": "4", "label": True}


def test_labels_stay_with_their_responses(write):
    """A dropped record does not shift them; conversations are read, too."""
    chat = {"prompt": [user("2+3?")], "completion": [assistant("6")], "label": False}
    path = write(GOOD, {**GOOD, "completion": " "}, {**GOOD, "label": False}, chat)
    found, report = read_unpaired(path)
    assert [(r.completion, r.label, r.source) for r in found] == [
        ("4", True, f"{path}:1"),
        ("4", False, f"{path}:3"),
        ([assistant("6")], False, f"{path}:4"),
    ]
    assert report.kept == 3 and report.dropped == {"empty response": 1}
    assert [r.label for r in read_unpaired(path, lines="2:")[0]] == [False, False]


def test_what_is_no_label(write):
    with pytest.raises(DataError, match="data.jsonl:2: label must be true or false, got 1"):
        read_unpaired(write(GOOD, {**GOOD, "label": 1}))
    message = "data.jsonl:1: found the keys completion, prompt; expected prompt . completion . lab"
    with pytest.raises(DataError, match=message):
        read_unpaired(write({k: v for k, v in GOOD.items() if k != "label"}))


def test_pairs_are_told_from_single_responses(write):
    path = write(PAIR, GOOD)
    assert is_paired(path) and not is_paired(path, None, "1:")
    assert is_paired(write(CHAT_PAIR, name="chat.jsonl"))


def test_margin_and_the_references_sample(write):
    path = write({**PAIR, "margin": 2, "chosen_is_ref": False}, PAIR)
    pairs, _ = read_preferences(path)
    assert [(p.margin, p.chosen_is_ref) for p in pairs] == [(2.0, False), (None, None)]
    assert len(read_completions(path)[0]) == 2


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"margin": "much"}, "margin must be a number, got str"),
        ({"margin": True}, "margin must be a number, got bool"),
        ({"margin": float("inf")}, "margin must be finite, got inf"),
        ({"chosen_is_ref": "yes"}, "chosen_is_ref must be true or false, got 'yes'"),
    ],
)
def test_bad_fields(write, field, message):
    with pytest.raises(DataError, match=f"data.jsonl:1: {message}"):
        read_preferences(write({**PAIR, **field}))
