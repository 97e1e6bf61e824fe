"""Small runs of many methods, for tests that compare one process with several of them.

Answers are given, not drawn, so that every number of processes learns from the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from several_processes import scripted

from fastalign.models.lora import LoRAConfig
from fastalign.train import (
    apa,
    awr,
    distributed,
    dpo,
    dt,
    grpo,
    mle,
    offline,
    online,
    ppo,
    rwr,
    sft,
)

EVERY = {"device": "cpu", "micro_tokens": 300}
DATA = EVERY | {"limit": 12, "epochs": 1, "batch_tokens": 700, "eval_limit": 4, "max_length": 128}
LABELLED = DATA | {"reward": "gold"}
ONLINE = EVERY | {
    "steps": 1,
    "epochs": 1,
    "prompts_per_step": 6,
    "samples_per_prompt": 2,
    "batch_tokens": 300,
    "eval_limit": 2,
    "eval_samples": 1,
}
LORA = {"lora": LoRAConfig(rank=4), "lr": 1e-2}

RUNS: dict[str, tuple[Any, Callable[[Any], Path], dict[str, Any]]] = {
    # A value head, and a critic of its own, that learn before the policy does.
    "apa": (apa.APAConfig, apa.train, ONLINE | {"critic_steps": 3}),
    "awr": (awr.AWRConfig, awr.train, ONLINE),
    "ppo": (ppo.PPOConfig, ppo.train, ONLINE | {"critic": "reward", "critic_steps": 3}),
    "mle": (mle.MLEConfig, mle.train, LABELLED),
    "rwr": (rwr.RWRConfig, rwr.train, LABELLED),
    "dt": (dt.DTConfig, dt.train, LABELLED),
    "apa-offline": (offline.OfflineAPAConfig, offline.train_apa, LABELLED | {"refresh": True}),
    "awr-offline": (offline.OfflineAWRConfig, offline.train_awr, LABELLED),
    "lora-sft": (sft.SFTConfig, sft.train, DATA | LORA),
    "lora-dpo": (dpo.DPOConfig, dpo.train, DATA | LORA | {"reference": "live"}),
    "lora-grpo": (grpo.GRPOConfig, grpo.train, ONLINE | LORA | {"kl_coef": 0.05, "steps": 2}),
}


def run(name: str, road: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Metrics and weights of one run, which are the main process's."""
    config, train, options = RUNS[name]
    model = str(road / "sft" / "model")
    if hasattr(config, "policy"):
        options = options | {"policy": model, "reward": str(road / "reward" / "model")}
    else:
        options = options | {"model": model}
    plain, online.make_engine = online.make_engine, scripted
    try:
        train(config(output=str(folder), **(options | changes)))
    finally:
        online.make_engine = plain
    return of_run(folder) if distributed.world().is_main else {}


def of_run(folder: Path) -> dict[str, Any]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    weights = {
        f"{path.relative_to(folder)}: {key}": tensor
        for path in sorted((folder / "model").rglob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }
    return {"metrics": [json.loads(line) for line in lines], "weights": weights}


def check_methods(folder: Path) -> dict[str, Any]:
    size = distributed.world().size
    return {name: run(name, folder / "road", folder / f"{name}-{size}") for name in RUNS}
