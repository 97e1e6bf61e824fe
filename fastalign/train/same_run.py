"""Whether a checkpoint is of the run that wants to go on from it.

What decides which example comes when must be the same, or some would be learned from twice and some
never: the method, the seed, the size of a batch, and the data and frozen models themselves, by
their contents and not their names. Other options may change (a learning rate, more steps); the log
says which did, because the run is then no longer the one that an uninterrupted process would have
made.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastalign.train import distributed
from fastalign.train.folder import RunError

FIXED = ("seed", "batch_tokens", "prompts_per_step", "samples_per_prompt")
FREE = (
    *("output", "device", "checkpoint_every", "checkpoint_updates", "keep_checkpoints"),
    "eval_every",
)


def changed_options(
    command: str, options: dict[str, Any], saved: dict[str, Any]
) -> list[tuple[str, Any, Any]]:
    """(option, its value in the checkpoint, its value now) of those that matter and differ.

    Args:
        command: the present method; options: its configuration, as of `options_of`.
        saved: the same of the checkpoint's run, `{"command": ..., "options": ...}`.

    Raises:
        RunError: the checkpoint is of another method, or an option in `FIXED` differs.
    """
    if saved["command"] != command:
        raise RunError(
            f"the checkpoint is of a run of {saved['command']}, this is one of {command}"
        )
    before, now = flat(saved["options"]), flat(options)
    changed = [
        (name, before.get(name), now.get(name))
        for name in dict.fromkeys([*now, *before])
        if name not in FREE and before.get(name) != now.get(name)
    ]
    for name, was, is_now in changed:
        if name in FIXED:
            raise RunError(
                f"the checkpoint is of a run with {name} {was}, this one has {is_now}: its steps "
                "would be others; resume with the former value, or begin a new run"
            )
    return changed


def flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names, `sampling.temperature`; tuples as the lists that they
    are in a file."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


class Inputs:
    """What a run reads and does not change, known again by a digest of its contents.

    Goes into a `Stateful` beside the optimizer: `Inputs(data=examples, reference=reference)`.

    Args:
        parts: by name, tokenized examples (dataclasses of token ids and other values) or a frozen
            module.
    """

    def __init__(self, **parts: Sequence[Any] | nn.Module) -> None:
        self.digests = {
            name: weights_digest(part) if isinstance(part, nn.Module) else data_digest(part)
            for name, part in parts.items()
        }

    def state_dict(self) -> dict[str, str]:
        return self.digests

    def load_state_dict(self, state: dict[str, str]) -> None:
        """
        Raises:
            RunError: names the first part that differs.
        """
        for name, digest in self.digests.items():
            if state.get(name) != digest:
                raise RunError(
                    f"the checkpoint is of a run with another {name} ({state.get(name)} there, "
                    f"{digest} here): resume with the former one, or begin a new run"
                )


def data_digest(examples: Sequence[Any]) -> str:
    """The number of examples, and 12 digits of SHA-256 of all their fields."""
    digest = hashlib.sha256()
    for example in examples:
        for field in dataclasses.fields(example):
            value = getattr(example, field.name)
            if isinstance(value, list):
                # The length keeps [1], [2, 3] apart from [1, 2], [3].
                digest.update(array("q", [len(value), *value]).tobytes())
            else:
                digest.update(f"{value!r};".encode())
    return f"{len(examples)} examples, {digest.hexdigest()[:12]}"


@torch.no_grad()
def weights_digest(module: nn.Module) -> str:
    """12 digits of SHA-256 over names, shapes and sums of the bits of all weights and buffers.

    The sums are exact, and taken where the weights are: a big model on a GPU is not moved. Of
    sharded weights, all processes must call.
    """
    digest = hashlib.sha256()
    for name, part_or_whole in module.state_dict().items():
        tensor = distributed.whole(part_or_whole)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        for part in tensor.contiguous().reshape(-1).view(torch.uint8).split(1 << 22):
            words = F.pad(part, (0, -part.numel() % 4)).view(torch.int32)
            # Each counts by its place, so that two that changed places show.
            place = torch.arange(1, words.numel() + 1, device=words.device)
            digest.update(f"{int((words * place).sum())};".encode())
    return digest.hexdigest()[:12]
