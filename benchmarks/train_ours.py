"""One training run of fastalign on a folder of `train_task`, for `bench_train`.

    python -m benchmarks.train_ours NAME FOLDER DEVICE DTYPE

prints one JSON line: seconds and tokens of every step, and peak memory.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import train_task
from benchmarks.timing import resident
from fastalign.train.run import Run

NAMES = ("sft", "reward", "reward 5", "dpo", "grpo")


class Memory:
    """Peak memory of a run beside what lay there when it began, both in bytes."""

    def __init__(self, device: str) -> None:
        self.device = device

    def start(self) -> None:
        self.before = resident("VmRSS")
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def found(self) -> dict[str, int]:
        if self.device == "cuda":
            return {"peak": torch.cuda.max_memory_allocated()}
        return {"peak": resident("VmHWM"), "at start": self.before}


def train(name: str, folder: Path, device: str, dtype: str) -> Path:
    """Trains by the command's own function; the folder of the run."""
    size = json.loads((folder / "size.json").read_text())
    model, output = str(folder / "model"), tempfile.mkdtemp()
    shared: dict[str, Any] = dict(
        output=output, device=device, dtype=dtype, checkpoint_every=10**6, seed=0, lr=1e-5
    )
    if name == "grpo":
        from fastalign.rollout import SamplingConfig
        from fastalign.train import grpo

        grpo.train(
            grpo.GRPOConfig(
                policy=model,
                reward=f"{Path(__file__).with_name('train_task.py')}:reward_of",
                prompts=str(folder / "prompts.jsonl"),
                eval_lines="0:1",
                eval_limit=1,
                eval_samples=1,
                sampling=SamplingConfig(max_new_tokens=size["new_tokens"]),
                steps=size["steps"],
                prompts_per_step=size["batch"] // 4,
                samples_per_prompt=4,
                epochs=1,
                batch_tokens=10**6,
                kl_coef=0.04,
                **shared,
            )
        )
        return Path(output)
    data = "completions" if name == "sft" else "preferences"
    tokens = round(size["batch"] * train_task.mean_tokens(folder, data))
    shared |= dict(
        model=model,
        data=str(folder / f"{data}.jsonl"),
        batch_tokens=tokens,
        micro_tokens=tokens,
        max_length=size["max_length"],
        epochs=1,
    )
    if name == "sft":
        from fastalign.train import sft

        sft.train(sft.SFTConfig(**shared))
    elif name.startswith("reward"):
        from fastalign.train import reward

        heads = int(name.split()[1]) if " " in name else 1
        reward.train(reward.RewardConfig(heads=heads, **shared))
    else:
        from fastalign.train import dpo

        dpo.train(dpo.DPOConfig(reference="live", **shared))
    return Path(output)


def main() -> None:
    name, folder, device, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    logging.basicConfig(level=logging.ERROR)
    memory = Memory(device)
    begin = Run.__enter__

    def enter(self: Run) -> Run:  # libraries, model and data are loaded by then
        memory.start()
        return begin(self)

    Run.__enter__ = enter  # type: ignore[method-assign]
    run = train(name, folder, device, dtype)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "train"]
    seconds = [b["time"] - a["time"] for a, b in zip(steps, steps[1:], strict=False)]
    # A prompt of several responses is read once here and counts for each, as it does in TRL.
    tokens = [line["tokens"] + line.get("tokens/repeated", 0) for line in steps[1:]]
    print(json.dumps({"seconds": seconds, "tokens": tokens, **memory.found()}))


if __name__ == "__main__":
    main()
