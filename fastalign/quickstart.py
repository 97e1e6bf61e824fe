"""The whole road on the built-in task: SFT -> reward ensemble -> APA -> evaluation -> report.

The report also shows how good any policy could get: the frontier of the SFT model under the gold
reward, from 48 fresh answers to each of 20 held-out prompts; the evaluation's 4 are too few.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from fastalign.commands import frontier
from fastalign.models import scratch
from fastalign.rollout import SamplingConfig
from fastalign.train import apa, reward, sft
from fastalign.train.folder import claim_folder, clear_folder, write_config

log = logging.getLogger("fastalign")


@dataclass
class QuickstartConfig:
    """Align a small model from scratch, offline, in minutes on two CPU cores."""

    output: str = "runs/quickstart"
    """Folder of the runs sft, reward and apa, of frontier and of report.html."""
    overwrite: bool = False
    """Delete what a former quickstart left in the output folder."""
    seed: int = 0
    """Of everything."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, ..."""
    model: str = "scratch:1m"
    """scratch:1m, 2m, 3m, 10m, 25m or 100m."""
    steps: int = 14
    """Rounds of APA."""


def run(config: QuickstartConfig) -> Path:
    """Runs it; the path of the report."""
    from fastalign.report import write_report
    from fastalign.report.command import conclude

    began = time.monotonic()
    folder = Path(config.output)
    claim_folder(folder, overwrite=config.overwrite, resumable=False)
    if config.model.startswith("scratch:"):
        scratch.size(config.model)
    if config.overwrite:
        clear_folder(folder)
    write_config(folder, config)
    shared = {"seed": config.seed, "device": config.device}
    log.info("1/3 supervised fine-tuning of %s on the built-in task", config.model)
    policy = sft.train(
        sft.SFTConfig(
            output=str(folder / "sft"),
            model=config.model,
            limit=8000,
            epochs=2,
            batch_tokens=1024,
            max_length=256,
            lr=2e-3,
            eval_every=100,
            **shared,  # type: ignore[arg-type]
        )
    )
    log.info("2/3 reward ensemble on preference pairs")
    ensemble = reward.train(
        reward.RewardConfig(
            output=str(folder / "reward"),
            model=str(policy),
            limit=14000,
            epochs=1,
            batch_tokens=2048,
            max_length=256,
            lr=6e-4,
            eval_every=200,
            **shared,  # type: ignore[arg-type]
        )
    )
    log.info("3/3 aligning the policy with the ensemble by APA")
    apa.train(
        apa.APAConfig(
            output=str(folder / "apa"),
            policy=str(policy),
            reward=str(ensemble),
            sampling=SamplingConfig(max_new_tokens=64),
            steps=config.steps,
            prompts_per_step=64,
            samples_per_prompt=6,
            epochs=2,
            batch_tokens=8192,
            lambda_=0.2,
            lam=1.0,
            lr=4e-4,
            schedule="cosine",
            eval_limit=128,
            eval_samples=4,
            **shared,  # type: ignore[arg-type]
        )
    )
    log.info("the frontier of the SFT model under the gold reward")
    frontier.run(
        frontier.FrontierConfig(
            output=str(folder / "frontier"),
            base=str(policy),
            reward=str(ensemble),
            column="gold",
            runs=str(folder / "apa"),
            limit=20,
            n=48,
            sampling=SamplingConfig(max_new_tokens=64, batch_size=480),
            **shared,  # type: ignore[arg-type]
        )
    )
    conclude(folder / "apa")
    path = write_report(folder)
    log.info("done in %.0f s; report: %s", time.monotonic() - began, path)
    return path
