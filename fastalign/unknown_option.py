"""What was meant by an option that a command does not have: another spelling, another command's,
or the name that other trainers have for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

# What TRL, transformers, peft and their like call it -> what it is here.
ELSEWHERE = {
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "max_grad_norm": "grad_clip",
    "adam_beta2": "beta2",
    "batch_size": "batch_tokens",
    "per_device_train_batch_size": "batch_tokens",
    "gradient_accumulation_steps": "micro_tokens",
    "gradient_checkpointing": "activation_checkpointing",
    "attn_implementation": "attention",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "eval_steps": "eval_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "resume_from_checkpoint": "resume",
    "output_dir": "output",
    "model_name_or_path": "model",
    "dataset": "data",
    "dataset_name": "data",
    "max_seq_length": "max_length",
    "loss_type": "loss",
    "reward_model": "reward",
    "num_generations": "samples_per_prompt",
    "max_completion_length": "sampling.max_new_tokens",
    "use_vllm": "engine",
    "bf16": "dtype",
    "lora_r": "lora.rank",
    "lora_target_modules": "lora.target_modules",
}


def told(word: str, options: Iterable[str], others: Mapping[str, set[str]]) -> str:
    """One line about an option that a command does not have.

    Args:
        word: the option as it was given, `--lerning_rate`.
        options: the command's own, `--lr`.
        others: names of the options of the other commands.
    """
    name = word.lstrip("-")
    own = [option.lstrip("-") for option in options if option.startswith("--")]
    known = {option.rpartition(".")[2]: option for option in reversed(own)}
    known |= {theirs: ours for theirs, ours in ELSEWHERE.items() if ours in own}
    known |= {option: option for option in own}
    head = name.partition(".")[0]
    owners = [] if head in own else [other for other, names in others.items() if head in names]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8 if owners else 0.6)
    hint = f"; did you mean --{known[near[0]]}?" if near else ""
    if owners:
        have = "have" if len(owners) > 1 else "has"
        return f"no option {word} here ({', '.join(owners)} {have} it){hint}"
    return f"unknown option {word}{hint}"
