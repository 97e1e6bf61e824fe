"""Small runs of the methods that learn from responses with rewards."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastalign.train.run import Interrupted, Run

CLOCKS = ("time", "tokens_per_s", "memory_gib", "flops_per_s", "utilisation", "joules")


def small(config: Any, folder: Path, road: Path, **changes: Any) -> Any:
    """A configuration of a few steps on the built-in task with gold rewards."""
    values: dict[str, Any] = {
        "output": str(folder),
        "model": str(road / "sft" / "model"),
        "reward": "gold",
        "max_length": 256,
        "limit": 8,
        "eval_limit": 3,
        "epochs": 2,
        "batch_tokens": 350,
        "checkpoint_every": 2,
    }
    return config(**(values | changes))


def lines_of(folder: Path, phase: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if phase in (None, line["phase"])]


def without_clocks(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted((folder / "model").glob("*.safetensors")):
        found |= {f"{path.name} {name}": t for name, t in load_file(path).items()}
    return found


def assert_resumes(method: Any, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in step 3 and resumed: metrics and weights are those of a run left alone."""
    whole, parts = Path(config.output) / "whole", Path(config.output) / "parts"
    method.train(dataclasses.replace(config, output=str(whole)))
    plain = Run.log

    def log(self: Run, at: int, phase: str, metrics: dict[str, float]) -> None:
        plain(self, at, phase, metrics)
        if at == 3 and phase == "train":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as stopping:
        stopping.setattr(Run, "log", log)
        with pytest.raises(Interrupted, match="stopped at step 3"):
            method.train(dataclasses.replace(config, output=str(parts)))
    torch.rand(7)  # the random state of the new process is another one
    method.train(dataclasses.replace(config, output=str(parts), resume="auto"))
    assert len(lines_of(whole, "train")) > 3
    assert without_clocks(lines_of(parts)) == without_clocks(lines_of(whole))
    ours, theirs = weights_of(whole), weights_of(parts)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
