"""`fastalign overoptimise`: where the reward that runs learn from and the gold one part.

The folder it writes:

    over_optimisation.json              courses of gold and proxy against KL, drops, disagreement
    over-optimisation.svg, .png         along training
    over-optimisation-best-of-n.svg, .png

`fastalign report` shows the same for runs beside that folder. Formulas stand in courses.py.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalign.commands import courses
from fastalign.train import repeat, strict_json
from fastalign.train.folder import claim_folder, clear_folder, write_config
from fastalign.train.whole import write_text

log = logging.getLogger("fastalign")
FILE = "over_optimisation.json"


@dataclass
class OveroptimiseConfig:
    """Gold against proxy reward along runs and along best-of-n, and by how much gold falls."""

    runs: str
    """Folder of runs, at any depth: of methods that learn from their own samples with --gold, of
    bestofn with --gold, of train reward."""
    output: str = "runs/overoptimise"
    """Folder of the results."""
    overwrite: bool = False
    """Delete what a former study left in the output folder."""


def run(config: OveroptimiseConfig) -> Path:
    """Reads the runs, measures and draws; the folder of the results."""
    from fastalign.report.files import write_atomically
    from fastalign.report.over_optimisation import plots, table_of_drops

    found: dict[str, Any] = courses.read(Path(config.runs))
    folder = Path(config.output)
    claim_folder(folder, overwrite=config.overwrite, resumable=False)
    if config.overwrite:
        clear_folder(folder)
    write_config(folder, config)
    found |= repeat.facts(torch.device("cpu"))
    written = strict_json.dumps(found, indent=1)
    write_text(folder / FILE, written + "\n")
    found = json.loads(written)  # what could not be computed is None, here as for the report
    for plot in plots(found):
        for name, content in plot.files.items():
            write_atomically(folder / name, content)
    for title, kind in (("along training", "runs"), ("best-of-n", "best_of_n")):
        head, rows = table_of_drops(found[kind]) if found[kind] else ([], [])
        for row in rows:
            told = ", ".join(f"{k} {v}" for k, v in zip(head[2:-1], row[2:-1], strict=True))
            log.info("%s, %s: %s; %s", title, row[0], told, row[-1])
    return folder
