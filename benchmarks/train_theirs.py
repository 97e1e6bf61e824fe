"""One training run of TRL's trainers on a folder of `train_task`, for `bench_train`.

    python -m benchmarks.train_theirs NAME FOLDER DEVICE DTYPE

prints one JSON line: seconds and real tokens (no padding) of every step, and peak memory.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import train_task

NAMES = ("sft", "sft packed", "sft defaults", "reward", "dpo", "grpo")


def main() -> None:
    name, folder, device, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import torch
    import transformers
    import trl

    from benchmarks.train_ours import Memory

    torch.manual_seed(0)
    size = json.loads((folder / "size.json").read_text())
    model = str(folder / "model")
    kind = name.split()[0]
    steps, batch = size["steps"], size["batch"]
    shared: dict[str, Any] = dict(
        output_dir=tempfile.mkdtemp(),
        use_cpu=device == "cpu",
        bf16=dtype == "bfloat16",
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-5,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        dataloader_num_workers=0,
    )
    if name != "sft defaults":
        shared["gradient_checkpointing"] = False
    data_name = {"sft": "completions", "grpo": "prompts"}.get(kind, "preferences")
    data = datasets.load_dataset(
        "json", data_files=str(folder / f"{data_name}.jsonl"), split="train"
    )
    counts: list[int] = []
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            memory.start()
            ends.append(time.perf_counter())

    memory = Memory(device)
    options: dict[str, Any] = {"callbacks": [Clock()], "train_dataset": data}
    if kind == "sft":
        if name == "sft packed":
            tokens = round(batch * train_task.mean_tokens(folder, "completions"))
            shared |= {"packing": True, "max_length": tokens, "per_device_train_batch_size": 1}
        else:
            shared["max_length"] = size["max_length"]
        trainer: Any = trl.SFTTrainer(model, trl.SFTConfig(**shared), **options)
    elif kind == "reward":
        shared["max_length"] = size["max_length"]
        trainer = trl.RewardTrainer(model, trl.RewardConfig(**shared), **options)
    elif kind == "dpo":
        shared["max_length"] = size["max_length"]
        trainer = trl.DPOTrainer(model, args=trl.DPOConfig(**shared), **options)
    else:

        def reward(completions: list[str], **_: Any) -> list[float]:
            return train_task.reward(completions)

        settings = trl.GRPOConfig(
            **shared,
            num_generations=4,
            max_completion_length=size["new_tokens"],
            beta=0.04,
        )
        trainer = trl.GRPOTrainer(model, reward_funcs=reward, args=settings, **options)
    count(trainer, kind, counts)
    trainer.train()
    seconds = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    result = {"seconds": seconds, "tokens": counts[: len(seconds)], **memory.found()}
    print(json.dumps(result))


def count(trainer: Any, kind: str, counts: list[int]) -> None:
    """Notes the real tokens of every batch that a step trains on, in the steps' order."""
    if kind == "grpo":
        inner = trainer._compute_loss

        def compute_loss(model: Any, inputs: Any) -> Any:
            real = inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
            counts.append(int(real))
            return inner(model, inputs)

        trainer._compute_loss = compute_loss
        return
    collate = trainer.data_collator

    def collator(examples: Any) -> Any:
        batch = collate(examples)
        mask = batch.get("attention_mask")
        counts.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
        return batch

    trainer.data_collator = collator


if __name__ == "__main__":
    main()
