"""A step on responses that share prompts: prompts held once in a pack, beside prompts repeated.

    python -m benchmarks.bench_shared_prompts [--size 0.6b] [--device cuda] [--out FILE.json]

Forward and backward pass of a policy and its loss on the same sequences, both packed, both through
the same loss head; what differs is `share` of `pack`. No optimizer step, no sampling.

    pairs     DPO on 4 pairs with lengths as those of dialogues: prompts log-normal with a median of
              90 tokens and a mean of 124, responses with a median of 50 and a mean of 75
    answers   GRPO on 2 prompts of 100 tokens with 4 responses of 50 to each
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch

from benchmarks import train_task
from benchmarks.timing import Run, arguments, medians, report, share
from fastalign import losses, ops
from fastalign.data.packing import Packed, pack
from fastalign.models import Policy

Sequences = tuple[list[list[int]], list[int]]


def pairs(size: train_task.Size) -> Sequences:
    """4 pairs: sequences, and tokens of their prompts."""
    draw = random.Random(0)
    room = size.max_length // 2
    sequences, prompts = [], []
    for _ in range(4):
        prompt = _tokens(draw, train_task.length(draw, 90, 0.8, 4, room), size)
        for _ in range(2):
            answer = _tokens(draw, train_task.length(draw, 50, 0.9, 2, room), size)
            sequences.append(prompt + answer)
            prompts.append(len(prompt))
    return sequences, prompts


def answers(size: train_task.Size) -> Sequences:
    """2 prompts with 4 responses each: sequences, and tokens of their prompts."""
    draw = random.Random(0)
    asked = [_tokens(draw, min(100, size.max_length // 2), size) for _ in range(2)]
    sequences = [
        p + _tokens(draw, min(50, size.max_length // 2), size) for p in asked for _ in "1234"
    ]
    return sequences, [len(p) for p in asked for _ in "1234"]


def _tokens(draw: random.Random, n: int, size: train_task.Size) -> list[int]:
    return [draw.randrange(size.vocab) for _ in range(n)]


def policy(size: train_task.Size, device: str, dtype: torch.dtype) -> Policy:
    torch.manual_seed(0)
    return Policy(size.model()).to(device, dtype)


def step(
    model: Policy, packed: Packed, task: str, inputs: dict[str, Any], bounds: Any
) -> torch.Tensor:
    """Loss and gradients; the log-probs."""
    model.zero_grad(set_to_none=False)
    hidden = model.response_hidden(packed)
    loss: Any = losses.DPO(0.1) if task == "pairs" else losses.GRPO("dapo")
    options: dict[str, Any] = {"normalizer": len(hidden)}
    if task == "pairs":
        options = {"normalizer": 4, "groups": bounds}
    out = ops.linear_loss(
        hidden,
        model.head_weight,
        packed.response_targets,
        loss,
        {name: inputs[name] for name in loss.required if name in inputs},
        ignore_index=None,
        **options,
    )
    out.loss.backward()
    return out.logp.detach()


def bench(task: str, size: train_task.Size, options: Any) -> list[dict[str, Any]]:
    sequences, prompts = (pairs if task == "pairs" else answers)(size)
    model = policy(size, options.device, getattr(torch, options.dtype))
    packs = {
        "fastalign": pack(sequences, prompts, share=True).to(options.device),
        "prompts repeated": pack(sequences, prompts).to(options.device),
    }
    sizes = torch.tensor([len(s) - p for s, p in zip(sequences, prompts, strict=True)])
    bounds = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    with torch.no_grad():
        logp = model.logprobs(packs["prompts repeated"])[0]
    noise = torch.randn(len(logp), generator=torch.Generator().manual_seed(0)).to(logp)
    inputs = {"ref_logp": logp, "old_logp": logp, "advantages": noise}
    runs: dict[str, Run] = {
        what: partial(step, model, packed, task, inputs, bounds) for what, packed in packs.items()
    }
    limit = share(options, 2)
    found = step(model, packs["fastalign"], task, inputs, bounds)
    apart = (found - logp).abs().max().item()
    taken = medians(runs, options.device, options.repeats, limit)
    tokens = {what: packed.input_ids.numel() for what, packed in packs.items()}
    return [
        {
            "task": task,
            "what": what,
            "tokens": tokens[what],
            "tokens / fastalign": tokens[what] / tokens["fastalign"],
            "ms": 1e3 * time,
            "this / fastalign": time / taken["fastalign"],
            "log-probs differ": apart if what == "fastalign" else 0.0,
        }
        for what, time in taken.items()
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", default="25m", choices=list(train_task.SIZES))
    options = parser.parse_args()
    size = train_task.SIZES[options.size]
    rows = [row for task in ("pairs", "answers") for row in bench(task, size, options)]
    report(rows, options, {"dtype": options.dtype, "size": options.size})


if __name__ == "__main__":
    main()
