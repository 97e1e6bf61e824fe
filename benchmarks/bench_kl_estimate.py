"""kl_estimate: forward, and forward and backward, beside the usual lines of PyTorch.

    python -m benchmarks.bench_kl_estimate [--device cuda --dtype bfloat16] [--out FILE.json]

Traffic: forward, both log-probs are read and float32 is written; backward, both are read again with
the upstream gradient, and the gradient by logp is written (k1 needs none of it: its slope is 1).
The ceiling is a copy of as many bytes. Rivals, in the same interleaved run: the formulas as
trainers write them, with autograd, eager and through torch.compile. Shapes: the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Run, arguments, report, share, timings
from fastalign.ops import kl_estimate

SHAPES = [(16_384,), (262_144,), (4_194_304,)]
Estimate = Callable[[Tensor, Tensor], Tensor]


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    return logp.float() - ref_logp.float()


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    return 0.5 * (logp.float() - ref_logp.float()).square()


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    gap = ref_logp.float() - logp.float()
    return torch.exp(gap) - gap - 1


PLAIN: dict[str, Estimate] = {"k1": k1, "k2": k2, "k3": k3}


def bench(n: int, kind: str, options: Any, n_cases: int) -> list[dict[str, Any]]:
    device, dtype = options.device, getattr(torch, options.dtype)
    logp = (-2.0 * torch.rand(n, device=device)).to(dtype)
    ref_logp = (logp.float() + 0.4 * torch.randn(n, device=device)).to(dtype)
    leaf, upstream = logp.clone().requires_grad_(), torch.rand(n, device=device)
    rivals: dict[str, Estimate] = {"plain": PLAIN[kind]}
    if "compile" not in options.without:
        rivals["plain, compiled"] = torch.compile(PLAIN[kind], dynamic=False)
    fused = partial(kl_estimate, kind=kind)
    torch.testing.assert_close(fused(logp, ref_logp), PLAIN[kind](logp, ref_logp))

    def forward(f: Estimate) -> Run:
        return torch.no_grad()(lambda: f(logp, ref_logp))

    def both(f: Estimate) -> Run:
        return lambda: torch.autograd.grad(f(leaf, ref_logp), leaf, upstream)

    one = 2 * logp.element_size() + 4
    again = 0 if kind == "k1" else 3 * logp.element_size() + 4
    rows = []
    for what, form, moved in (("forward", forward, one * n), ("both", both, (one + again) * n)):
        spare = torch.zeros(2, moved // 2, dtype=torch.uint8, device=device)
        runs: dict[str, Run] = {
            "copy (ceiling)": partial(torch.Tensor.copy_, *spare),
            "fastalign": form(fused),
            **{name: form(f) for name, f in rivals.items()},
        }
        for run in runs.values():
            run()
        taken = timings(runs, device, options.repeats, share(options, 2 * n_cases))
        rows += [
            {
                "N": n,
                "kind": kind,
                "pass": what,
                "what": name,
                "us": 1e6 * time.median,
                "q1 us": 1e6 * time.low,
                "q3 us": 1e6 * time.high,
                "rounds": time.rounds,
                "minimal MB": moved / 1e6,
                "GB/s": moved / time.median / 1e9,
                "of copy speed": taken["copy (ceiling)"].median / time.median,
                "this / fastalign": time.median / taken["fastalign"].median,
            }
            for name, time in taken.items()
        ]
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    cases = [(shape[0], kind) for shape in options.shapes or SHAPES for kind in PLAIN]
    rows = [row for case in cases for row in bench(*case, options, len(cases))]
    report(rows, options, {"dtype": options.dtype})


if __name__ == "__main__":
    main()
