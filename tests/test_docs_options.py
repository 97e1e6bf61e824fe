"""Every option and command that README.md and the pages of docs/ name is there."""

from __future__ import annotations

import dataclasses
import re
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fastalign import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of torchrun, pip and the benchmarks.
FOREIGN = {
    "nproc-per-node",
    "no-build-isolation",
    "sizes",
    "repeats",
    "shapes",
    "minutes",
    "without",
}
COMMON = {"help", "version", "config", "print_config", "resume", "overwrite"}


def options_of(config_class: Any) -> set[str]:
    """`lr`, `lora.rank`, ..."""
    found = set()
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        found.add(field.name)
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            found |= {f"{field.name}.{one.name}" for one in dataclasses.fields(inner)}
    return found


def known() -> set[str]:
    classes = [getattr(import_module(m), c) for m, c, _ in cli.COMMANDS.values()]
    return set().union(*map(options_of, classes))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_options_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--([A-Za-z][\w.-]*\w)", page.read_text()))
    assert named - known() - COMMON - FOREIGN == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"(?:^|`|    )\$? ?fastalign ((?:train )?[a-z][a-z-]*)", text, re.MULTILINE)
    assert set(named) - set(cli.COMMANDS) - {"train"} == set()  # "fastalign train METHOD"


def test_every_command_is_explained_somewhere() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for command in cli.COMMANDS:
        assert f"`{command}`" in text or f"fastalign {command}" in text, command
