"""linear_logprobs: per-token log-probs from hidden states, forward alone and with gradients.

    python -m benchmarks.bench_linear_logprobs [--device cuda --dtype bfloat16] [--out FILE.json]

Work: 1 product of 2 N H V FLOP forward; 3 with gradients when the logits are kept, 4 when they are
computed again. "x GEMMs" is the time over that of 1 or 3 bare products on full-size tensors,
measured in the same interleaved run. Rivals: benchmarks/peers.py. The columns are those of
bench_linear_loss; "x fastalign" compares with linear_logprobs at its default workspace.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.head import BOTH, SHAPES, Candidate, Problem, at, bench, status
from benchmarks.timing import arguments, report
from fastalign.ops import linear_logprobs, plan

LOGP, WITH_ENTROPY = "logp", "logp + entropy"


def own(task: str, what: str, room: float | None = None, **passes: Any) -> Candidate:
    """linear_logprobs by default, or with room for so many times all logits."""
    entropy = task == WITH_ENTROPY

    def run(hidden: Tensor, weight: Tensor, problem: Problem) -> tuple[Tensor, ...]:
        logits = hidden.shape[0] * weight.shape[0] * hidden.element_size()
        out = linear_logprobs(
            hidden,
            weight,
            problem.targets,
            ignore_index=None,
            return_entropy=entropy,
            workspace=None if room is None else int(room * logits),
        )
        return (out,) if isinstance(out, Tensor) else out

    return Candidate(task, what, "fastalign", run, **passes)


def rival(task: str, loaded: peers.Loaded) -> Candidate:
    def run(hidden: Tensor, weight: Tensor, problem: Problem) -> tuple[Tensor, ...]:
        logp, entropy = loaded.function(hidden, weight, problem.targets)
        return (logp, entropy) if task == WITH_ENTROPY else (logp,)

    return Candidate(task, loaded.peer.name, loaded.peer.package, run)


def candidates_on(device: str, without: list[str]) -> tuple[list[Candidate], dict[str, str]]:
    tokens, absent = peers.load(peers.TOKENS, device, without)
    found = []
    for task in (LOGP, WITH_ENTROPY):
        found += [
            own(task, "linear_logprobs"),
            own(task, "linear_logprobs, logits kept", 2.0, passes=(BOTH,)),
            own(task, "linear_logprobs, recomputed", 0.5, passes=(BOTH,)),
        ]
        found += [rival(task, r) for r in tokens if r.peer.entropy == (task == WITH_ENTROPY)]
    return found, absent


def main() -> int:
    options = arguments(__doc__).parse_args()
    truth = peers.Loaded(peers.Peer("float64", "torch", lambda: peers.naive), peers.naive)
    truths = {task: rival(task, truth) for task in (LOGP, WITH_ENTROPY)}
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    dtype = getattr(torch, options.dtype)
    for shape in options.shapes or SHAPES[options.device]:
        candidates, absent = candidates_on(options.device, options.without)
        print(plan(*shape, op="linear_logprobs", dtype=dtype, device=options.device))
        found, failed = bench(shape, candidates, truths, options)
        rows += found
        failures |= at(shape, failed)
        notes = {"dtype": options.dtype, "absent": absent, "failed": failures}
        report(rows, options, notes, ratio="x GEMMs")
    return status(failures)


if __name__ == "__main__":
    sys.exit(main())
