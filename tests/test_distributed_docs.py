"""docs/distributed.md is true: its commands parse, and its table has every command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastalign import cli

PAGE = (Path(__file__).parent.parent / "docs/distributed.md").read_text()
COMMANDS = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)).splitlines()


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(
    line: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    words = words[words.index("fastalign") + 1 :]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--print_config"])
    assert ended.value.code in (0, None), capsys.readouterr().err


def test_every_command_is_in_the_table_once() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    named = [name for row in rows for name in re.findall("`(.*?)`", row)]
    assert sorted(named) == sorted(cli.COMMANDS)
