"""The whole road on the built-in task: SFT -> reward ensemble -> APA -> evaluation -> report."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from fastalign.models import scratch
from fastalign.train import apa, reward, sft
from fastalign.train.run import claim_folder, clear_folder, write_config

log = logging.getLogger("fastalign")


@dataclass
class QuickstartConfig:
    """Align a small model from scratch, offline, in minutes on two CPU cores."""

    output: str = "runs/quickstart"
    """Folder of the runs sft, reward and apa and of report.html."""
    overwrite: bool = False
    """Delete what a former quickstart left in the output folder."""
    seed: int = 0
    """Of everything."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, ..."""
    model: str = "scratch:3m"
    """scratch:1m, 3m, 10m, 25m or 100m."""
    steps: int = 20
    """Rounds of APA."""


def run(config: QuickstartConfig) -> Path:
    """Runs it; the path of the report."""
    from rich.console import Console
    from rich.text import Text

    from fastalign.report import before_after_table, headline, write_report

    began = time.monotonic()
    folder = Path(config.output)
    claim_folder(folder, overwrite=config.overwrite)
    if config.model.startswith("scratch:"):
        scratch.size(config.model)
    if config.overwrite:
        clear_folder(folder)
    write_config(folder, config)
    shared = {"seed": config.seed, "device": config.device}
    log.info("1/3 supervised fine-tuning of %s on the built-in task", config.model)
    policy = sft.train(
        sft.SFTConfig(output=str(folder / "sft"), model=config.model, **shared)  # type: ignore[arg-type]
    )
    log.info("2/3 reward ensemble on preference pairs")
    ensemble = reward.train(
        reward.RewardConfig(output=str(folder / "reward"), model=str(policy), **shared)  # type: ignore[arg-type]
    )
    log.info("3/3 aligning the policy with the ensemble by APA")
    apa.train(
        apa.APAConfig(
            output=str(folder / "apa"),
            policy=str(policy),
            reward=str(ensemble),
            steps=config.steps,
            **shared,  # type: ignore[arg-type]
        )
    )
    path = write_report(folder)
    comparison = json.loads((folder / "apa" / "evaluation.json").read_text())
    Console().print(before_after_table(comparison), Text(headline(comparison)))
    log.info("done in %.0f s; report: %s", time.monotonic() - began, path)
    return path
