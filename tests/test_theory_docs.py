"""docs/theory.md is true: its examples run and print what it shows, and it names every function."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastalign import theory

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/theory.md").read_text()


def test_examples_print_what_the_page_shows(capsys: pytest.CaptureFixture) -> None:
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "text"] * 8
    names: dict[str, Any] = {}
    for (_, code), (_, shown) in zip(blocks[::2], blocks[1::2], strict=True):
        exec(compile(code, "docs/theory.md", "exec"), names)
        assert capsys.readouterr().out == shown


def test_every_function_has_an_example() -> None:
    code = "".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    functions = {name for name in theory.__all__ if name[0].islower()} | {"Memoryless"}
    assert {name for name in functions if f"theory.{name}(" not in code} == set()


def test_theory_is_loaded_when_it_is_first_used() -> None:
    code = (
        "import sys, fastalign\n"
        "print('fastalign.theory' in sys.modules, 'theory' in dir(fastalign))\n"
        "print(fastalign.theory.n_for_kl(2.0), 'fastalign.theory' in sys.modules)\n"
        "try:\n    fastalign.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "False False",
        "19 True",
        "module 'fastalign' has no attribute 'nothing'",
    ], done.stderr
