"""Runs of `train dpo` on a tiny model and a handful of pairs, and their losses in float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastalign.data.formats import Completion, LoadReport
from fastalign.data.synthetic import SyntheticTask
from fastalign.data.tokenizer import train_tokenizer
from fastalign.data.tokens import tokenize_completions
from fastalign.models import Policy, load_tokenizer
from fastalign.train import dpo

N_PAIRS = 6
CLOCKS = ("time", "joules", "tokens_per_s", "flops_per_s", "utilisation", "memory_gib")


def make_model(folder: Path) -> str:
    """A model of random weights with its tokenizer; the folder."""
    texts = [str(r.prompt) + str(r.completion) for r in SyntheticTask().completions(60)]
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(3)
    Policy.load("scratch:1m", tokenizer, max_length=256).save(folder, tokenizer)
    return str(folder)


def records(n: int = N_PAIRS) -> list[dict[str, Any]]:
    """Pairs that say which response is the reference's, by how much one is better."""
    pairs = SyntheticTask(seed=5).preferences(n)
    return [
        {
            "prompt": pair.prompt,
            "chosen": str(pair.chosen)[:60],
            "rejected": str(pair.rejected)[: 40 + 3 * i],
            "chosen_is_ref": i % 3 == 0,
            "margin": 0.25 * i,
        }
        for i, pair in enumerate(pairs)
    ]


def unpaired(n: int = N_PAIRS) -> list[dict[str, Any]]:
    return [
        {"prompt": r["prompt"], "completion": r["chosen" if good else "rejected"], "label": good}
        for i, r in enumerate(records(n))
        for good in ([True], [False], [False, True])[i % 3]
    ]


def config(folder: Path, model: str, data: str, **changes: Any) -> dpo.DPOConfig:
    """Two steps on all pairs, several packs each, a checkpoint after each step."""
    values: dict[str, Any] = {
        "output": str(folder),
        "model": model,
        "data": data,
        "max_length": 256,
        "epochs": 2,
        "batch_tokens": 100_000,
        "micro_tokens": 250,
        "lr": 3e-3,
        "warmup": 0.0,
        "schedule": "constant",
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
    }
    return dpo.DPOConfig(**(values | changes))


def lines_of(folder: Path, phase: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if phase in (None, line["phase"])]


def without_clocks(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k.split("/")[0] not in CLOCKS} for line in lines]


def model_of(run: Path, step: int, model: str) -> Path:
    """A folder that transformers loads, with the weights of a checkpoint."""
    folder = run / f"after-{step}"
    shutil.copytree(model, folder)
    saved = load_file(run / "checkpoints" / f"step-{step:06d}" / "shard-00001.safetensors")
    of_model = [name for name in saved if name.startswith("policy.model.")]
    own = {name.removeprefix("policy.model."): saved[name] for name in of_model}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def texts_of(model: str) -> list[Any]:
    """The responses of `records`, as token ids."""
    texts = [(r["prompt"], r[side]) for r in records() for side in ("chosen", "rejected")]
    found = [Completion(p, r, None, "") for p, r in texts]
    return tokenize_completions(found, load_tokenizer(model), LoadReport("here"), max_length=256)
