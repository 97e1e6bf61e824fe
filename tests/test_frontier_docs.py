"""docs/frontier.md is true: its example runs and prints what the page shows; its options exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_cli import configured, fastalign

PAGE = (Path(__file__).parent.parent / "docs/frontier.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def trimmed(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip("─ ")]


@pytest.mark.usefixtures("one_thread")
def test_the_example_prints_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "docs/frontier.md", "exec"), {})
    example, of_the_quickstart = blocks("bash")
    status, printed, err = fastalign(capsys, *shlex.split(example)[1:])
    assert status == 0, err
    assert trimmed(printed) == trimmed(blocks("text")[0])
    assert configured(capsys, *shlex.split(of_the_quickstart)[1:])["n"] == 48
