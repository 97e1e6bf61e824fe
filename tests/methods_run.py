"""Small runs of many methods, for tests that compare one process with several of them.

Answers are given, not drawn, so that every number of processes learns from the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several_processes import reading, scripted

from fastalign.models import load_tokenizer
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
    sampled,
    sft,
)
from fastalign.train.engine import policy_weights
from fastalign.train.optim import OptimConfig
from fastalign.train.setup import load_policy

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
LORA: dict[str, Any] = {"lora": LoRAConfig(rank=4), "lr": 1e-2}

RUNS: dict[str, tuple[Any, Callable[[Any], Path], dict[str, Any]]] = {
    # A value head, and a critic of its own, that learn before the policy does.
    "apa": (apa.APAConfig, apa.train, ONLINE | {"critic_steps": 3}),
    "awr": (awr.AWRConfig, awr.train, ONLINE),
    "ppo": (ppo.PPOConfig, ppo.train, ONLINE | {"critic": "reward", "critic_steps": 3}),
    # Sampled from before and after.
    "mle": (mle.MLEConfig, mle.train, LABELLED | {"eval_reward": "gold", "eval_samples": 2}),
    "rwr": (rwr.RWRConfig, rwr.train, LABELLED),
    "dt": (dt.DTConfig, dt.train, LABELLED),
    "apa-offline": (offline.OfflineAPAConfig, offline.train_apa, LABELLED | {"refresh": True}),
    "awr-offline": (offline.OfflineAWRConfig, offline.train_awr, LABELLED),
    "lora-sft": (sft.SFTConfig, sft.train, DATA | LORA | {"checkpoint_every": 1}),
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "make_engine", scripted)
        for maker in ("TransformersEngine", "whole_engine"):
            plain = getattr(sampled, maker)
            patch.setattr(sampled, maker, lambda p, t, plain=plain: reading(plain(p, t)))
        train(config(output=str(folder), **(options | changes)))
    return of_run(folder) if distributed.world().is_main else {}


def of_run(folder: Path) -> dict[str, Any]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    weights = {
        f"{path.relative_to(folder)}: {key}": tensor
        for path in sorted((folder / "model").rglob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }
    return {"metrics": [json.loads(line) for line in lines], "weights": weights}


def merged(model: str) -> dict[str, Any]:
    """What an engine of its own is given of a policy with an adapter: before it is sharded, and
    of the shards."""
    torch.manual_seed(0)
    config = OptimConfig(lora=LORA["lora"])
    policy = load_policy(config, model, load_tokenizer(model), device=torch.device("cpu"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    before = dict(policy_weights(policy))
    distributed.shard(policy, "hidden")
    return {"before": before, "after": dict(policy_weights(policy))}


def check_methods(folder: Path) -> dict[str, Any]:
    size, road = distributed.world().size, folder / "road"
    found = {name: run(name, road, folder / f"{name}-{size}") for name in RUNS}
    return found | {"merged": merged(str(road / "sft" / "model"))}
