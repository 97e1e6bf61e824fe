"""Records of preference data to test with, and how they are read."""

from fastalign.data.formats import (
    read_preferences,
)


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


def one_preference(path):
    (pair,), report = read_preferences(path)
    assert report.kept == 1 and not report.dropped
    assert pair.source == f"{path}:1"
    return pair.prompt, pair.chosen, pair.rejected


def rows(n):
    return [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(n)]


def read(source, **options):
    return [pair.prompt for pair in read_preferences(str(source), **options)[0]]
