"""kill -9 at random moments, --resume, and the run is the one that nobody killed, bit for bit.

20 kills over all methods: while it loads, in a step, while a checkpoint or the model is written.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from warm import Warm

CLOCKS = {"time", "tokens_per_s", "tokens_per_s/trained", "flops_per_s", "utilisation"}
CLOCKS |= {"memory_gib"}
DEADLINE = 120.0
EVERY = ["--checkpoint_every", 2, "--device", "cpu"]
SUPERVISED = [
    *("--limit", 24, "--epochs", 3, "--batch_tokens", 512),
    *("--eval_limit", 2, "--eval_every", 4),
]
ONLINE = [
    *("--steps", 10, "--prompts_per_step", 3, "--samples_per_prompt", 2, "--batch_tokens", 256),
    *("--eval_limit", 2, "--eval_samples", 2, "--sampling.max_new_tokens", 8),
]
# What is killed when: "start" while it loads, "step" in one, "between" two checkpoints, where lines
# are logged that the first does not cover, "checkpoint" and "model" while they are written.
METHODS: dict[str, tuple[list[Any], list[str]]] = {
    "sft": (
        ["--model", "scratch:1m", "--vocab_size", 300, *SUPERVISED],
        ["start", "between", "checkpoint", "model"],
    ),
    "reward": (
        ["--model", "SFT", "--heads", 3, "--max_length", 256, *SUPERVISED],
        ["step", "checkpoint", "between"],
    ),
    "dpo": (
        ["--model", "SFT", "--max_length", 256, *SUPERVISED],
        ["start", "step", "checkpoint"],
    ),
    "apa": (
        ["--policy", "SFT", "--reward", "REWARD", *ONLINE],
        ["step", "checkpoint", "model"],
    ),
    "ppo": (  # a checkpoint after each update holds the rollouts of a step half done
        [
            *("--policy", "SFT", "--reward", "REWARD", *ONLINE, "--kl_coef", 0.05),
            *("--kl_control", "adaptive", "--kl_target", 2.0, "--checkpoint_updates", 1),
        ],
        ["checkpoint", "start", "step", "checkpoint"],
    ),
    "grpo": (
        ["--policy", "SFT", "--reward", "REWARD", *ONLINE],
        ["step", "between", "checkpoint"],
    ),
}


def test_there_are_twenty():
    assert sum(len(moments) for _, moments in METHODS.values()) == 20


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as server:
        yield server


@pytest.fixture(scope="module")
def models(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy and a reward ensemble of a few steps."""
    folder = tmp_path_factory.mktemp("models")
    few = ["--limit", 12, "--eval_limit", 2, "--epochs", 1, "--device", "cpu"]
    made = {"SFT": folder / "sft" / "model", "REWARD": folder / "reward" / "model"}
    argv = ["--model", "scratch:1m", "--vocab_size", 300, "--max_length", 256]
    warm.run(folder / "log", "train", "sft", "--output", folder / "sft", *argv, *few)
    argv = ["--model", made["SFT"], "--heads", 3, "--max_length", 256]
    warm.run(folder / "log", "train", "reward", "--output", folder / "reward", *argv, *few)
    return made


def lines_of(folder: Path) -> list[str]:
    """Of metrics.jsonl, the whole ones."""
    path = folder / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def is_between(folder: Path) -> bool:
    """Whether there is a checkpoint, and a line of a later step than the newest one's."""
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")]
    lines = lines_of(folder)
    return bool(steps and lines) and json.loads(lines[-1])["step"] > max(steps)


def kill(pid: int, folder: Path, moment: str, draw: random.Random, n_lines: int) -> None:
    """SIGKILL at the next such moment, or a little later; `n_lines` is what a whole run logs.

    Where a busy machine let the run end before this process saw the moment, it comes then.
    """
    more, late = draw.randint(1, 3), draw.random()
    enough = min(len(lines_of(folder)) + more, n_lines - 1)
    patterns = {"checkpoint": "checkpoints/.step-*.partial", "model": ".model.partial"}
    end = time.monotonic() + DEADLINE
    if moment == "start":
        time.sleep(late)
    while moment != "start" and not (folder / "accounting.json").exists():
        assert time.monotonic() < end, f"no {moment} in {folder}"
        if moment == "step" and len(lines_of(folder)) >= enough:
            time.sleep(0.05 * late)
            break
        if moment in patterns and any(folder.glob(patterns[moment])):
            time.sleep(0.02 * late)
            break
        if moment == "between" and is_between(folder):
            os.kill(pid, signal.SIGSTOP)  # it cannot write the next checkpoint while we look again
            if is_between(folder):
                break
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)


def numbers_of(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    return [
        {
            key: value
            for key, value in json.loads(line).items()
            if key not in CLOCKS and not key.startswith(("time/", "joules"))
        }
        for line in lines_of(folder)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_is_bit_for_bit_the_same(warm, models, tmp_path, method):
    argv, moments = METHODS[method]
    argv = ["train", method, *(models.get(word, word) for word in argv), *EVERY]
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    warm.run(log, *argv, "--output", whole)
    draw = random.Random(f"{method} {len(moments)}")
    resume: list[str] = []
    landed = 0
    for moment in moments:
        pid = warm.start(log, *argv, "--output", parts, *resume)
        kill(pid, parts, moment, draw, len(lines_of(whole)))
        status = warm.wait(pid)
        assert moment != "between" or is_between(parts)
        assert status in (-signal.SIGKILL, 0), log.read_text()
        landed += status == -signal.SIGKILL
        # Before it had its folder, there is nothing to go on from.
        resume = ["--resume"] if parts.exists() else []
    # Beside a busy machine's other work the last one, while the model is written, may come late.
    assert landed >= len(moments) - 1
    warm.run(log, *argv, "--output", parts, *resume)

    assert numbers_of(parts) == numbers_of(whole)
    for path in sorted(whole.glob("model/*")) + sorted(whole.glob("samples.jsonl")):
        assert (parts / path.relative_to(whole)).read_bytes() == path.read_bytes(), path.name
    assert {p.name for p in parts.glob("model/*")} == {p.name for p in whole.glob("model/*")}
    costs, expected = (
        json.loads((folder / "accounting.json").read_text())["phases"] for folder in (parts, whole)
    )
    if method == "dpo":
        # Its cache may be the work of a process that died before there was a checkpoint.
        del expected["reference"]
    for phase in expected:
        for name in ("tokens", "trained", "flops"):
            assert costs[phase][name] == expected[phase][name], (phase, name)
    if (whole / "evaluation.json").exists():
        found, expected = (
            json.loads((folder / "evaluation.json").read_text()) for folder in (parts, whole)
        )
        for name in ("before", "after", "change_stderr"):
            assert found[name] == expected[name]
    left = [p.name for p in parts.rglob(".*") if p.name.endswith((".partial", ".old"))]
    assert not left
