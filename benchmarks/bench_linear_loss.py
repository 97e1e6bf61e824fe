"""linear_loss: hidden states to loss and gradients, beside the three bare matrix products.

    python -m benchmarks.bench_linear_loss [--device cuda --dtype bfloat16] [--out FILE.json]

Work: 3 products of 2 N H V FLOP (1 for the forward pass alone). "x GEMMs" is the time over that of
the bare products in the same interleaved run (1 is perfect), "of ceiling" its inverse, "x
fastalign" the time over linear_loss's for the same task. Rivals: benchmarks/peers.py; where they
give per-token log-probs, the loss is the same object in plain PyTorch on top.

"extra MiB" is the peak beside inputs and the gradients of the inputs: on CUDA of torch's
allocator, on CPU of the process's resident memory. "error" and "gradient error" are the largest
against float64 on a small problem, relative to the largest element (or 1, for results); "agrees"
says whether both are rounding. Times are medians, with the quartiles beside them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.head import BOTH, SHAPES, Candidate, Problem, at, bench, status
from benchmarks.timing import arguments, report
from fastalign.losses import APA, MLE, PPO
from fastalign.ops import linear_loss, plan


def dpo(logp: Tensor, entropy: Tensor, sign: Tensor, cu_seqlens: Tensor) -> Tensor:
    """-log sigmoid(BETA (logp of chosen - logp of rejected)) of each pair; pairs are equally long.

    sign is 1 at the tokens of chosen sequences and -1 at those of rejected ones.
    """
    margins = (sign * logp).view(cu_seqlens.numel() - 1, -1).sum(1)
    return -F.logsigmoid(peers.BETA * margins)


PPO_KL = PPO(clip=peers.CLIP, kl_coef=peers.KL_COEF)
# Task -> (loss, names of its inputs).
TASKS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "MLE": (MLE(), ()),
    "APA": (APA(lambda_=1.0), ("advantages", "ref_logp")),
    "PPO+KL+entropy": (
        PPO(clip=peers.CLIP, kl_coef=peers.KL_COEF, entropy_coef=0.01),
        ("advantages", "old_logp", "ref_logp"),
    ),
    "PPO+KL": (PPO_KL, ("advantages", "old_logp", "ref_logp")),
    "DPO": (dpo, ("sign",)),
}


def inputs_of(task: str, problem: Problem) -> dict[str, Tensor]:
    length = len(problem.targets) // problem.sequences
    sign = problem.upstream.new_tensor([1.0, -1.0]).repeat(problem.sequences // 2)
    everything = problem.inputs | {"sign": sign.repeat_interleave(length)}
    return {name: everything[name] for name in TASKS[task][1]}


def bounds_of(problem: Problem) -> Tensor:
    """cu_seqlens of the pairs."""
    n = len(problem.targets)
    return torch.arange(0, n + 1, 2 * n // problem.sequences, device=problem.targets.device)


def own(task: str) -> Candidate:
    loss = TASKS[task][0]

    def run(hidden: Tensor, weight: Tensor, problem: Problem) -> tuple[Tensor, ...]:
        groups = bounds_of(problem) if task == "DPO" else None
        out = linear_loss(
            hidden,
            weight,
            problem.targets,
            loss,
            inputs_of(task, problem),
            ignore_index=None,
            groups=groups,
        )
        return (out.loss,)

    passes = {} if task in ("MLE", "PPO+KL+entropy") else {"passes": (BOTH,)}
    return Candidate(task, "linear_loss", "fastalign", run, **passes)


def on_logp(task: str, rival: peers.Loaded, **passes: Any) -> Candidate:
    """A rival that gives log-probs, with the task's loss in plain PyTorch on top."""
    loss = TASKS[task][0]

    def run(hidden: Tensor, weight: Tensor, problem: Problem) -> tuple[Tensor, ...]:
        logp, entropy = rival.function(hidden, weight, problem.targets)
        inputs: dict[str, Any] = inputs_of(task, problem)
        if task == "DPO":
            inputs["cu_seqlens"] = bounds_of(problem)
        return (loss(logp, entropy, **inputs).mean(),)

    return Candidate(task, rival.peer.name, rival.peer.package, run, **passes)


def likelihood(rival: peers.Loaded) -> Candidate:
    return Candidate(
        "MLE",
        rival.peer.name,
        rival.peer.package,
        lambda h, w, problem: (rival.function(h, w, problem.targets),),
    )


def whole(task: str, rival: peers.Loaded) -> Candidate:
    """A rival that computes the whole loss."""

    def run(hidden: Tensor, weight: Tensor, problem: Problem) -> tuple[Tensor, ...]:
        return (rival.function(hidden, weight, problem.targets, problem.inputs, problem.sequences),)

    return Candidate(task, rival.peer.name, rival.peer.package, run, passes=(BOTH,))


def candidates_on(device: str, without: list[str]) -> tuple[list[Candidate], dict[str, str]]:
    tokens, absent = peers.load(peers.TOKENS, device, without)
    found = [own(task) for task in TASKS]
    for rival in tokens:
        if rival.peer.entropy:
            found.append(on_logp("PPO+KL+entropy", rival, passes=(BOTH,)))
        elif rival.function is peers.naive_logp:
            found += [on_logp("MLE", rival)]
            found += [on_logp(task, rival, passes=(BOTH,)) for task in ("APA", "PPO+KL", "DPO")]
        else:
            found.append(on_logp("APA", rival, passes=(BOTH,)))
            if rival.peer.package == "trl":
                found.append(on_logp("MLE", rival))
    for task, kind in (
        ("MLE", peers.LIKELIHOOD),
        ("PPO+KL", peers.POLICY),
        ("DPO", peers.PREFERENCE),
    ):
        here, missing = peers.load(kind, device, without)
        absent |= missing
        found += [likelihood(r) if task == "MLE" else whole(task, r) for r in here]
    return found, absent


def main() -> int:
    options = arguments(__doc__).parse_args()
    truth = peers.Loaded(peers.Peer("float64", "torch", lambda: peers.naive), peers.naive)
    truths = {task: on_logp(task, truth) for task in TASKS}
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for shape in options.shapes or SHAPES[options.device]:
        candidates, absent = candidates_on(options.device, options.without)
        print(plan(*shape, dtype=getattr(torch, options.dtype), device=options.device))
        found, failed = bench(shape, candidates, truths, options)
        rows += found
        failures |= at(shape, failed)
        notes = {"dtype": options.dtype, "absent": absent, "failed": failures}
        report(rows, options, notes, ratio="x GEMMs")
    return status(failures)


if __name__ == "__main__":
    sys.exit(main())
