"""Every form of data that is accepted, what is dropped and counted."""

import gzip
import json
from pathlib import Path

import pytest
from records import CHAT_PAIR, PAIR, assistant, one_preference, user

from fastalign.data.formats import (
    Completion,
    DataError,
    LoadReport,
    Prompt,
    read_completions,
    read_preferences,
    read_prompts,
)

HH = Path(__file__).parents[2] / "shared/data/hh-rlhf/harmless-test.jsonl.gz"


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


def test_which_completions_were_cut_off(write):
    """Only those that say so; the word may mean anything elsewhere."""
    said = [True, False, None, "no"]
    path = write(*({"prompt": "a", "completion": "b", "finished": one} for one in said), PAIR)
    records, _ = read_completions(path)
    assert [r.finished for r in records] == [True, False, True, True, True]
    path = write(PAIR | {"finished": False})
    assert read_completions(path)[0][0].finished


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
