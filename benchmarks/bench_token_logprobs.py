"""token_logprobs: time, bytes moved and the fraction of this machine's memory speed.

    python -m benchmarks.bench_token_logprobs [--device cuda --dtype bfloat16] [--out FILE.json]

Traffic: the forward pass reads N V logits once, the backward pass reads and writes them once. The
ceilings, in the same interleaved run: a read of the logits (their sum) for the forward pass, a read
and a copy for both. "x memory" is the time over the ceiling's, "x fastalign" that over
token_logprobs' for the same task. Rivals: benchmarks/peers.py. About 4 FLOP a logit forward and 4
backward, and one exponential each; they are not the limit. "error" and "gradient error" are those
of bench_linear_loss. Logits are peaked as a trained model's (fastalign.testing.peaked_logits).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.head import AGREES, BOTH, FORWARD, at, distance, status
from benchmarks.timing import Run, arguments, failure, report, share, timings, try_out
from fastalign.ops import token_logprobs
from fastalign.testing import peaked_logits

SHAPES = {"cpu": [(512, 32_768), (1024, 50_257)], "cuda": [(16_384, 128_256)]}
SMALL = (64, 4096)
LOGP, WITH_ENTROPY = "logp", "logp + entropy"
# Logits read or written once each, beside N-sized vectors.
PASSES = {FORWARD: 1, BOTH: 3}
FLOP_PER_LOGIT = {FORWARD: 4, BOTH: 8}


@dataclass(frozen=True)
class Candidate:
    task: str
    what: str
    package: str
    f: Callable[[Tensor, Tensor], peers.Pair]

    def results(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logp, entropy = self.f(logits, targets)
        return (logp,) if entropy is None or self.task == LOGP else (logp, entropy)

    def label(self, direction: str) -> str:
        return f"{direction} | {self.task} | {self.package}: {self.what}"


def candidates_on(device: str, without: list[str]) -> tuple[list[Candidate], dict[str, str]]:
    rivals, absent = peers.load(peers.LOGITS, device, without)
    found = [
        Candidate(LOGP, "token_logprobs", "fastalign", lambda z, t: (token_logprobs(z, t), None)),
        Candidate(
            WITH_ENTROPY,
            "token_logprobs",
            "fastalign",
            lambda z, t: token_logprobs(z, t, return_entropy=True),
        ),
    ]
    for rival in rivals:
        task = WITH_ENTROPY if rival.peer.entropy else LOGP
        found.append(Candidate(task, rival.peer.name, rival.peer.package, rival.function))
    return found, absent


def gradient(candidate: Candidate, leaf: Tensor, targets: Tensor) -> Tensor:
    results = candidate.results(leaf, targets)
    (got,) = torch.autograd.grad(results, leaf, [torch.ones_like(r) for r in results])
    return got


def judge(candidate: Candidate, dtype: torch.dtype, device: str) -> dict[str, float]:
    logits, targets = peaked_logits(*SMALL, dtype=dtype, device=device)
    truth = Candidate(candidate.task, "float64", "torch", peers.softmax_gather_entropy)
    wide, leaf = logits.double().requires_grad_(), logits.clone().requires_grad_()
    with torch.no_grad():
        error = distance(candidate.results(logits, targets), truth.results(wide, targets), 1.0)
    gradients = gradient(candidate, leaf, targets), gradient(truth, wide, targets)
    return {"error": error, "gradient error": distance(gradients[:1], gradients[1:])}


def ceilings(logits: Tensor) -> dict[str, Run]:
    spare = torch.empty_like(logits)

    def both() -> None:
        logits.sum()
        spare.copy_(logits)

    return {FORWARD: lambda: logits.sum(), BOTH: both}


def runs_of(candidate: Candidate, logits: Tensor, leaf: Tensor, targets: Tensor) -> dict[str, Run]:
    def forward() -> object:
        with torch.no_grad():
            return candidate.results(logits, targets)

    return {FORWARD: forward, BOTH: lambda: gradient(candidate, leaf, targets)}


def bench(
    shape: tuple[int, ...], candidates: list[Candidate], options: Any
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of one shape N x V, and what failed."""
    dtype, device = getattr(torch, options.dtype), options.device
    torch.compiler.reset()
    errors: dict[Candidate, dict[str, float]] = {}
    failures: dict[str, str] = {}
    for candidate in candidates:
        try:
            errors[candidate] = judge(candidate, dtype, device)
        except Exception as error:  # other people's code on any machine: reported, never hidden
            label = candidate.label("judged")
            failures[label] = failure(error, label, device)
    n, vocab = shape
    logits, targets = peaked_logits(n, vocab, dtype=dtype, device=device)
    leaf = logits.clone().requires_grad_()
    runs = {f"{name} | ceiling": run for name, run in ceilings(logits).items()}
    entries = {}
    for candidate in errors:
        for direction, run in runs_of(candidate, logits, leaf, targets).items():
            label = candidate.label(direction)
            runs[label], entries[label] = run, (candidate, direction)
    peaks, broken = try_out(runs, device)
    failures |= broken
    limit = share(options, len(options.shapes or SHAPES[device]))
    taken = timings({name: runs[name] for name in peaks}, device, options.repeats, limit)
    own = {
        (entry[0].task, entry[1]): taken[label].median
        for label, entry in entries.items()
        if entry[0].package == "fastalign" and label in taken
    }
    rows = []
    for direction in (FORWARD, BOTH):
        ceiling = taken[f"{direction} | ceiling"].median
        moved = PASSES[direction] * logits.nbytes
        labels = [label for label, entry in entries.items() if entry[1] == direction]
        labels.sort(key=lambda label: entries[label][0].task == WITH_ENTROPY)
        for label in [f"{direction} | ceiling", *(x for x in labels if x in taken)]:
            time, facts = taken[label], {}
            row: dict[str, Any] = {"N": n, "V": vocab, "pass": direction}
            if label in entries:
                candidate = entries[label][0]
                key = (candidate.task, direction)
                row |= {"task": candidate.task, "what": candidate.what, "of": candidate.package}
                peak = peaks[label]
                extra = None if peak is None else max(0, peak - leaf.nbytes * (direction == BOTH))
                facts = {
                    "GFLOP/s": FLOP_PER_LOGIT[direction] * n * vocab / time.median / 1e9,
                    "x fastalign": time.median / own[key] if key in own else None,
                    "extra MiB": None if extra is None else extra / 2**20,
                    **errors[candidate],
                    "agrees": max(errors[candidate].values()) <= AGREES[dtype],
                }
            else:
                what = "read" if direction == FORWARD else "read, copy"
                row |= {"task": "-", "what": f"memory: {what}", "of": "ceiling"}
            rows.append(
                row
                | {
                    "ms": 1e3 * time.median,
                    "q1 ms": 1e3 * time.low,
                    "q3 ms": 1e3 * time.high,
                    "rounds": time.rounds,
                    "x memory": time.median / ceiling,
                    "of ceiling": ceiling / time.median,
                    "minimal MB": moved / 1e6,
                    "GB/s": moved / time.median / 1e9,
                }
                | facts
            )
    for what, why in failures.items():
        print(f"FAILED at {n}x{vocab}: {what}: {why}")
    return rows, failures


def main() -> int:
    options = arguments(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for shape in options.shapes or SHAPES[options.device]:
        candidates, absent = candidates_on(options.device, options.without)
        found, failed = bench(shape, candidates, options)
        rows += found
        failures |= at(shape, failed)
        notes = {"dtype": options.dtype, "absent": absent, "failed": failures}
        report(rows, options, notes, ratio="x memory")
    return status(failures)


if __name__ == "__main__":
    sys.exit(main())
