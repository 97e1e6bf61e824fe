"""A command that must end in one line on standard error."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastalign import cli


class Failed:
    """A command run in this process: its status, and the one line on standard error."""

    def __init__(self, capsys: Any, *argv: object) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in argv])
        self.status = stop.value.code
        err = capsys.readouterr().err
        lines = err.splitlines()
        # Lines of progress may stand before; the error is the last line and the only one.
        assert [line.startswith("fastalign: ") for line in lines].count(True) == 1, err
        assert "Traceback" not in err and err.endswith("\n")
        self.line = lines[-1].removeprefix("fastalign: ")
        assert lines[-1].startswith("fastalign: ")


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path
