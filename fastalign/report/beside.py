"""Sections of the page that show what other commands wrote: one file each, found by its name.

The file is looked for in the folder the report is about, then in the folder that its command writes
to by default, inside and beside that one. Of runs/apa: runs/apa/frontier.json,
runs/apa/frontier/frontier.json, runs/frontier/frontier.json; the first that is there.

To show another file, add a line to SHOWN.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalign.report import best_of_n, frontier, over_optimisation
from fastalign.report.figure import Plot
from fastalign.report.markup import figure, missing, safe
from fastalign.report.read import Road


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    html: str
    files: dict[str, bytes] = field(default_factory=dict)
    """Its pictures by name, to be written beside the page."""


@dataclass(frozen=True)
class Shown:
    file: str
    folder: str
    """Name of the folder that its command writes to by default."""
    title: str
    section: Callable[[dict[str, Any], Road], tuple[str, list[Plot]]]
    """(content of the file, what the page is about) -> HTML that opens the section, and its plots.
    It may raise KeyError, TypeError or ValueError for a file that is not as it should be."""


SHOWN = (
    Shown("frontier.json", "frontier", "How good can it get at this KL?", frontier.section),
    Shown("curve.json", "bestofn", "Best-of-n", best_of_n.section),
    Shown("over_optimisation.json", "overoptimise", "Over-optimisation", over_optimisation.section),
)


def find(path: Path, file: str, folder: str) -> Path | None:
    """Where the file of a report on `path` is, by the rule above."""
    path = path.resolve()
    places = (path / file, path / folder / file, path.parent / folder / file)
    return next((place for place in places if place.is_file()), None)


def sections(road: Road) -> list[Section]:
    """Of all files that are there."""
    found = []
    for one in SHOWN:
        path = find(road.path, one.file, one.folder)
        if path is not None:
            found.append(_section(one, path, road))
    return found


def _section(one: Shown, path: Path, road: Road) -> Section:
    id = one.folder
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        words, plots = one.section(content, road)
    except (KeyError, TypeError, ValueError):
        return Section(id, one.title, missing(f"{one.file} is damaged; it is left out."))
    lede = f'<p class="lede">From {safe(f"{path.parent.name}/{path.name}")}.</p>'
    files = {name: content for plot in plots for name, content in plot.files.items()}
    return Section(id, one.title, lede + words + "".join(map(figure, plots)), files)
