"""bradley_terry_loss of K heads, forward and backward, beside plain PyTorch.

    python -m benchmarks.bench_bradley_terry_loss [--device cuda] [--out FILE.json]

Traffic: scores of both responses and, with "bootstrap", the counts (int64) are read once, the
gradient of the gap is written once; the backward pass reads it and writes two gradients. The
ceiling is a copy of as many bytes.
Rivals, in the same interleaved run: the loss by F.logsigmoid over all heads at once, eager and
through torch.compile, and one head after another. Scores are float32, as reward heads return them.
Shapes: B x K.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Run, arguments, report, share, timings
from fastalign.ops import bradley_terry_loss

SHAPES = [(64, 5), (1024, 5), (4096, 16), (65_536, 16)]
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def fused(chosen: Tensor, rejected: Tensor, counts: Tensor | None) -> Tensor:
    return bradley_terry_loss(chosen, rejected, head_mask=counts)


def logsigmoid(chosen: Tensor, rejected: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None:
        return -F.logsigmoid(chosen - rejected).mean()
    loss = -counts * F.logsigmoid(chosen - rejected)
    return (loss.sum(0) / counts.sum(0).clamp(min=1)).mean()


def head_by_head(chosen: Tensor, rejected: Tensor, counts: Tensor | None) -> Tensor:
    n_heads = chosen.shape[1]
    columns = [None] * n_heads if counts is None else counts[..., None].unbind(1)
    losses = [
        logsigmoid(chosen[:, k, None], rejected[:, k, None], columns[k]) for k in range(n_heads)
    ]
    return torch.stack(losses).mean()


def bench(pairs: int, heads: int, options: Any, n_cases: int) -> list[dict[str, Any]]:
    device = options.device
    chosen, rejected = torch.randn(2, pairs, heads, device=device)
    chosen += 0.5
    drawn = torch.poisson(torch.ones(pairs, heads, device=device)).long()
    leaves = (chosen.clone().requires_grad_(), rejected.clone().requires_grad_())
    rivals: dict[str, Loss] = {"logsigmoid": logsigmoid, "head by head": head_by_head}
    if "compile" not in options.without:
        torch.compiler.reset()  # past a number of shapes it would give up and run eagerly
        rivals["logsigmoid, compiled"] = torch.compile(logsigmoid, dynamic=False)

    def forward(f: Loss, counts: Tensor | None) -> Run:
        return torch.no_grad()(lambda: f(chosen, rejected, counts))

    def both(f: Loss, counts: Tensor | None) -> Run:
        return lambda: torch.autograd.grad(f(*leaves, counts), leaves)

    rows = []
    for counts, (what, form) in product((None, drawn), (("forward", forward), ("both", both))):
        moved = pairs * heads * ((12 if what == "forward" else 24) + (0 if counts is None else 8))
        spare = torch.zeros(2, moved // 2, dtype=torch.uint8, device=device)
        runs: dict[str, Run] = {
            "copy (ceiling)": partial(torch.Tensor.copy_, *spare),
            "fastalign": form(fused, counts),
            **{name: form(f, counts) for name, f in rivals.items()},
        }
        for run in runs.values():
            run()
        taken = timings(runs, device, options.repeats, share(options, n_cases))
        rows += [
            {
                "B": pairs,
                "K": heads,
                "pairs": "all" if counts is None else "bootstrap",
                "pass": what,
                "what": name,
                "us": 1e6 * seconds.median,
                "q1 us": 1e6 * seconds.low,
                "q3 us": 1e6 * seconds.high,
                "rounds": seconds.rounds,
                "minimal MB": moved / 1e6,
                "GB/s": moved / seconds.median / 1e9,
                "of ceiling": taken["copy (ceiling)"].median / seconds.median,
                "this / fastalign": seconds.median / taken["fastalign"].median,
            }
            for name, seconds in taken.items()
        ]
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    shapes: list[tuple[int, int]] = options.shapes or SHAPES
    rows = [row for shape in shapes for row in bench(*shape, options, 4 * len(shapes))]
    report(rows, options, {"dtype": "float32"})


if __name__ == "__main__":
    main()
