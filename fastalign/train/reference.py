"""The reference's log-probs of fixed responses: computed once and kept, or anew in every step.

Kept ones lie in a file whose name is a digest of all they depend on: the reference's weights, the
token ids (what the tokenizer and its chat template made of the data) and the precision. A run that
is resumed, or another one of the same digest, reads them back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastalign.data.packing import Packed, token_budget_batches
from fastalign.models import Policy, lora
from fastalign.models.flops import forward_flops
from fastalign.train.meter import Meter
from fastalign.train.preference_data import Responses
from fastalign.train.run import autocast, forward_dtype
from fastalign.train.same_run import data_digest, weights_digest
from fastalign.train.whole import failed_writes, sync

log = logging.getLogger("fastalign")


@torch.no_grad()
def logprobs(policy: Policy, packed: Packed, dtype: str) -> Tensor:
    """fp32 [M], of the pack's targets that count; the pack is on the policy's device."""
    with autocast(policy.head_weight.device, dtype):
        return policy.logprobs(packed)[0]


def ref_logprobs(
    reference: Policy | None, responses: Responses, rows: Sequence[int], packed: Packed, dtype: str
) -> Tensor:
    """fp32 [M], of some responses and their pack: the reference's own, or without one the kept."""
    if reference is None:
        return responses.stored(rows).to(packed.input_ids.device)
    return logprobs(reference, packed, dtype)


def precompute(
    policy: Policy,
    sets: Sequence[Responses],
    folder: Path,
    dtype: str,
    micro_tokens: int,
    meter: Meter,
) -> None:
    """Gives every set its ``ref_logp``, by `policy` as it is, or from the file that has them.

    Args:
        policy: the reference.
        sets: responses; an empty one is fine.
        folder: where the files are.
        dtype: of the forward pass.
        micro_tokens: of one forward pass.
        meter: counts it, in the phase "reference".
    """
    from safetensors.torch import save_file

    with meter.phase("reference"):
        path = folder / f"{digest(policy, sets, dtype)}.safetensors"
        found = _read(path)
        if found is None:
            found = {str(i): _all(policy, s, dtype, micro_tokens) for i, s in enumerate(sets)}
            sizes = [s.size(_passes(s, micro_tokens)) for s in sets]
            meter.count(flops=sum(forward_flops(policy, *size) for size in sizes))
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            with failed_writes():
                save_file(found, partial)
            sync(partial)
            partial.replace(path)
            count = sum(len(logp) for logp in found.values())
            log.info("reference log-probs: %s tokens, kept in %s", f"{count:,}", path)
    for i, responses in enumerate(sets):
        responses.ref_logp = found[str(i)]


def _read(path: Path) -> dict[str, Tensor] | None:
    """What a file holds; None where there is none, or a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    try:
        found = load_file(path)
    except SafetensorError as error:
        log.warning("%s is damaged and will be written anew: %s", path, error)
        return None
    log.info("reference log-probs: read from %s", path)
    return found


def _all(policy: Policy, responses: Responses, dtype: str, micro_tokens: int) -> Tensor:
    """fp32 [T], of every response, on the CPU."""
    device, was_training = policy.head_weight.device, policy.training
    policy.eval()
    found = torch.empty(responses.starts[-1])
    for rows in _passes(responses, micro_tokens):
        logp = logprobs(policy, responses.pack(rows).to(device), dtype).cpu()
        parts = logp.split([responses.counts[i] for i in rows])
        for i, part in zip(rows, parts, strict=True):
            found[responses.starts[i] : responses.starts[i + 1]] = part
    policy.train(was_training)
    return found


def _passes(responses: Responses, micro_tokens: int) -> list[list[int]]:
    return token_budget_batches(responses.lengths, micro_tokens, prompts=responses.prompts)


def digest(policy: Policy, sets: Sequence[Responses], dtype: str) -> str:
    """Hexadecimal, 32 digits."""
    model, device = policy.model, policy.head_weight.device
    base = lora.without_adapter(model) if lora.has_adapter(model) else model
    config = base.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):  # they say nothing of the numbers
        config.pop(name, None)
    parts = [weights_digest(base), json.dumps(config, sort_keys=True, default=str)]
    parts += [device.type, str(forward_dtype(device, dtype))]
    parts += [data_digest(responses.items) for responses in sets]
    return hashlib.sha256("; ".join(parts).encode()).hexdigest()[:32]
