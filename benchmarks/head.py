"""What the two benchmarks of the loss head share: problems, truth, timing, one row per candidate.

The ceiling is the bare matrix products, on tensors of the full size, in the same interleaved run:
one for a forward pass, three with the gradients of hidden states and weight. Every candidate is
first judged on a small problem against plain PyTorch in float64 on the same (rounded) inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Run, cell, failure, release, share, timings, try_out
from fastalign.ops import linear_logprobs
from fastalign.testing import peaked_head

SHAPES = {
    "cpu": [(512, 768, 32_000), (1024, 768, 50_257), (512, 896, 151_936)],
    "cuda": [(16_384, 4096, 128_256), (8192, 4096, 151_936), (8192, 2048, 32_768)],
}
SMALL = (256, 128, 2048)
LONGEST_SEQUENCE = {"cpu": 128, "cuda": 1024}
FORWARD, BOTH = "forward", "forward+backward"
PRODUCTS = {FORWARD: 1, BOTH: 3}
# A candidate further than this from the truth, relative to its largest element, computes something
# else: about ten times what rounding does to the plain computation in that dtype.
AGREES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]
    """old_logp, ref_logp and advantages, [N] float32."""
    sequences: int
    """The rows are so many sequences of equal length."""
    upstream: Tensor
    """[N] float32: the gradient that reaches per-token results."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute ``task``: ``f(hidden, weight, problem)`` returns its results."""

    task: str
    what: str
    package: str
    f: Callable[[Tensor, Tensor, Problem], tuple[Tensor, ...]]
    passes: tuple[str, ...] = (FORWARD, BOTH)

    def label(self, direction: str) -> str:
        return f"{direction} | {self.task} | {self.package}: {self.what}"


def make_problem(n: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> Problem:
    hidden, weight, targets = peaked_head(n, width, vocab, dtype=dtype, device=device)
    logp = linear_logprobs(hidden, weight, targets, ignore_index=None)
    noise = torch.Generator().manual_seed(1)
    sequences = n // min(LONGEST_SEQUENCE[device], max(1, n // 4))
    if n % sequences or sequences % 2:
        raise ValueError(f"make_problem: {n} rows are not pairs of sequences of equal length")

    # Ratios on all sides of PPO's bounds, none so near one that rounding decides on which side.
    steps = torch.tensor([-0.4, -0.1, -0.05, 0.05, 0.1, 0.4])
    old = logp + steps[torch.randint(len(steps), (n,), generator=noise)].to(device)
    ref = logp + 0.3 * torch.randn(n, generator=noise).to(device)
    advantages = torch.randn(sequences, generator=noise).repeat_interleave(n // sequences)
    return Problem(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        targets,
        {"old_logp": old, "ref_logp": ref, "advantages": advantages.to(device)},
        sequences,
        torch.randn(n, generator=noise).to(device),
    )


def runs_of(candidate: Candidate, problem: Problem) -> dict[str, Run]:
    """The candidate's passes, by name, as calls without arguments."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return candidate.f(hidden, weight, problem)

    def both() -> tuple[Tensor, ...]:
        leaves = (problem.hidden, problem.weight)
        results = candidate.f(*leaves, problem)
        ups = [problem.upstream.to(r.dtype) if r.dim() else torch.ones_like(r) for r in results]
        return torch.autograd.grad(results, leaves, ups)

    everything: dict[str, Run] = {FORWARD: forward, BOTH: both}
    return {name: everything[name] for name in candidate.passes}


def widened(problem: Problem) -> Problem:
    return Problem(
        problem.hidden.detach().double().requires_grad_(),
        problem.weight.detach().double().requires_grad_(),
        problem.targets,
        {name: x.double() for name, x in problem.inputs.items()},
        problem.sequences,
        problem.upstream.double(),
    )


def distance(got: Sequence[Tensor], truth: Sequence[Tensor], least: float = 1e-30) -> float:
    """The largest max|got - truth| / max(least, max|truth|) over the pairs."""
    worst = 0.0
    for x, true in zip(got, truth, strict=True):
        error = (x.detach().double() - true).abs().max() / true.abs().max().clamp(min=least)
        worst = max(worst, float("inf") if error.isnan() else error.item())
    return worst


def judge(
    candidates: Sequence[Candidate], truths: dict[str, Candidate], dtype: torch.dtype, device: str
) -> tuple[dict[Candidate, dict[str, float]], dict[str, str]]:
    """Errors of each candidate's results and gradients at SMALL, and what those that fail raise."""
    problem = make_problem(*SMALL, dtype, device)
    wide = widened(problem)
    true = {task: run_both(candidate, wide) for task, candidate in truths.items()}
    errors: dict[Candidate, dict[str, float]] = {}
    failures: dict[str, str] = {}
    for candidate in candidates:
        try:
            results, gradients = run_both(candidate, problem)
        except Exception as error:  # other people's code on any machine: reported, never hidden
            label = candidate.label("judged")
            failures[label] = failure(error, label, device)
            continue
        true_results, true_gradients = true[candidate.task]
        errors[candidate] = {
            "error": distance(results, true_results, least=1.0),
            "gradient error": distance(gradients, true_gradients),
        }
    return errors, failures


def run_both(
    candidate: Candidate, problem: Problem
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    leaves = (problem.hidden, problem.weight)
    results = candidate.f(*leaves, problem)
    ups = [problem.upstream.to(r.dtype) if r.dim() else torch.ones_like(r) for r in results]
    gradients = torch.autograd.grad(results, leaves, ups)
    return tuple(r.detach() for r in results), gradients


def ceilings(problem: Problem) -> dict[str, Run]:
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    z = hidden.new_empty(len(hidden), len(weight))
    dh, dw = torch.empty_like(hidden), torch.empty_like(weight)

    def one() -> None:
        torch.mm(hidden, weight.t(), out=z)

    def three() -> None:
        torch.mm(hidden, weight.t(), out=z)
        torch.mm(z, weight, out=dh)
        torch.mm(z.t(), hidden, out=dw)

    return {FORWARD: one, BOTH: three}


def bench(
    shape: tuple[int, ...],
    candidates: Sequence[Candidate],
    truths: dict[str, Candidate],
    options: Any,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of one shape N x H x V, and what failed."""
    dtype, device = getattr(torch, options.dtype), options.device
    n, width, vocab = shape
    # Else a candidate compiled for earlier shapes could meet the recompilation limit, and run
    # uncompiled without a word.
    torch.compiler.reset()
    errors, failures = judge(candidates, truths, dtype, device)
    release(device)
    problem = make_problem(n, width, vocab, dtype, device)
    bare = ceilings(problem)
    runs = {f"{name} | ceiling": run for name, run in bare.items()}
    entries = {}
    for candidate in candidates:
        if candidate in errors:
            for direction, run in runs_of(candidate, problem).items():
                label = candidate.label(direction)
                runs[label], entries[label] = run, (candidate, direction)
    peaks, broken = try_out(runs, device)
    failures |= broken
    taken = timings({k: runs[k] for k in peaks}, device, options.repeats, share_of(options))
    gradients = problem.hidden.nbytes + problem.weight.nbytes
    own: dict[str, float] = {}  # seconds of the first own candidate of each task and pass
    rows = []
    for direction in (FORWARD, BOTH):
        ceiling = taken[f"{direction} | ceiling"].median
        flop = PRODUCTS[direction] * 2 * n * width * vocab
        labels = [label for label, entry in entries.items() if entry[1] == direction]
        labels.sort(key=lambda label: list(truths).index(entries[label][0].task))
        for label in [f"{direction} | ceiling", *(x for x in labels if x in taken)]:
            time = taken[label]
            row: dict[str, Any] = {"N": n, "H": width, "V": vocab, "pass": direction}
            if label in entries:
                candidate = entries[label][0]
                key = f"{direction} | {candidate.task}"
                if candidate.package == "fastalign":
                    own.setdefault(key, time.median)
                peak = peaks[label]
                extra = None if peak is None else max(0, peak - gradients * (direction == BOTH))
                judged = errors[candidate]
                # Results and gradients both: a forward pass is of no use if it trains wrongly.
                agrees = max(judged.values()) <= AGREES[dtype]
                row |= {"task": candidate.task, "what": candidate.what, "of": candidate.package}
                facts = {
                    "x fastalign": time.median / own[key] if key in own else None,
                    "extra MiB": None if extra is None else extra / 2**20,
                    **judged,
                    "agrees": agrees,
                }
            else:
                row |= {"task": "-", "what": f"bare GEMMs: {PRODUCTS[direction]}", "of": "ceiling"}
                facts = {}
            rows.append(
                row
                | {
                    "ms": 1e3 * time.median,
                    "q1 ms": 1e3 * time.low,
                    "q3 ms": 1e3 * time.high,
                    "rounds": time.rounds,
                    "x GEMMs": time.median / ceiling,
                    "of ceiling": ceiling / time.median,
                    "TFLOP/s": flop / time.median / 1e12,
                }
                | facts
            )
    for what, why in failures.items():
        print(f"FAILED at {n}x{width}x{vocab}: {what}: {why}")
    return rows, failures


def share_of(options: Any) -> float | None:
    return share(options, len(options.shapes or SHAPES[options.device]))


def at(shape: tuple[int, ...], failures: dict[str, str]) -> dict[str, str]:
    name = "x".join(cell(size) for size in shape)
    return {f"{name}: {what}": why for what, why in failures.items()}


def status(failures: dict[str, str]) -> int:
    """Exit status: 1 when one of fastalign's own candidates failed, a rival's failure is a row."""
    return int(any("| fastalign:" in name for name in failures))
