"""reward_heads: K heads and their UWO statistic, forward and backward, beside plain PyTorch.

    python -m benchmarks.bench_reward_heads [--device cuda --dtype bfloat16] [--out FILE.json]

Traffic: the forward pass reads B rows of width D once; the backward pass reads them once more and
writes the gradient of all N rows. The heads are small beside that. FLOP: 2 B D K forward, 4 B D K
backward. "all rows" scores N = B rows, "gathered" picks B of N = 4 B by index. The ceilings are a
copy of as many bytes and the bare products of as many FLOP, all into memory that is there: the
slower one is what can be reached.
Rivals, in the same interleaved run: one linear layer after another and the stack of their scores,
one product for all heads (both followed by the statistic in plain PyTorch and autograd), and the
latter through torch.compile. Where they gather, they do so by indexing.
Shapes: B x D x K.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Run, arguments, medians, report, share
from fastalign.ops import reward_heads

SHAPES = {"cpu": [(2048, 4096, 16), (256, 768, 5)], "cuda": [(8192, 4096, 16), (256, 4096, 5)]}
COEF = 0.5
Heads = Callable[..., tuple[Tensor, Tensor]]


def fused(hidden: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None) -> Any:
    return reward_heads(hidden, weight, bias, index=index, reduce="uwo", coef=COEF)


def uwo(scores: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores.float()
    return scores, scores.mean(1) - COEF * scores.var(1)


def one_product(
    hidden: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    return uwo(F.linear(hidden if index is None else hidden[index], weight, bias))


def layer_by_layer(
    hidden: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = hidden if index is None else hidden[index]
    heads = zip(weight.split(1), bias.split(1), strict=True)
    return uwo(torch.cat([F.linear(rows, w, b) for w, b in heads], dim=1))


def products(what: str, rows: Tensor, weight: Tensor, d: Tensor) -> Run:
    """The bare products of a pass."""
    scores, drows, dweight = (torch.empty_like(x) for x in (d, rows, weight))

    def run() -> None:
        torch.mm(rows, weight.t(), out=scores)
        if what == "both":
            torch.mm(d, weight, out=drows)
            torch.mm(d.t(), rows, out=dweight)

    return run


def bench(samples: int, width: int, heads: int, options: Any, n_cases: int) -> list[dict[str, Any]]:
    device, dtype = options.device, getattr(torch, options.dtype)
    rows = []
    rivals: dict[str, Heads] = {"layer by layer": layer_by_layer, "one product": one_product}
    if "compile" not in options.without:
        torch.compiler.reset()  # past a number of shapes it would give up and run eagerly
        rivals["one product, compiled"] = torch.compile(one_product, dynamic=False)
    for gathered in (False, True):
        n = 4 * samples if gathered else samples
        hidden = torch.randn(n, width, device=device).to(dtype)
        weight = (torch.randn(heads, width, device=device) / width**0.5).to(dtype)
        bias = torch.zeros(heads, device=device, dtype=dtype)
        index = torch.randperm(n, device=device)[:samples] if gathered else None
        leaves = tuple(x.clone().requires_grad_() for x in (hidden, weight, bias))
        g = torch.randn(samples, heads, device=device)
        e = torch.randn(samples, device=device)
        read, written = (x * width * hidden.element_size() for x in (samples, n))
        bytes_of = {"forward": read, "both": 2 * read + written}
        spare = {
            what: torch.zeros(2, size // 2, dtype=torch.uint8, device=device)
            for what, size in bytes_of.items()
        }

        def forward(f: Heads, given: Any = (hidden, weight, bias, index)) -> Run:
            @torch.no_grad()
            def run() -> None:
                f(*given)

            return run

        def both(f: Heads, given: Any = (leaves, index, (g, e))) -> Run:
            leaves, index, gradients = given
            return lambda: torch.autograd.grad(f(*leaves, index), leaves, gradients)

        for what, form in (("forward", forward), ("both", both)):
            runs: dict[str, Run] = {
                "copy (ceiling)": partial(torch.Tensor.copy_, *spare[what]),
                "products (ceiling)": products(what, hidden[:samples], weight, g.to(dtype)),
                "fastalign": form(fused),
                **{name: form(f) for name, f in rivals.items()},
            }
            taken = medians(runs, device, options.repeats, share(options, n_cases))
            limit = max(taken["copy (ceiling)"], taken["products (ceiling)"])
            flop = (2 if what == "forward" else 6) * samples * width * heads
            rows += [
                {
                    "B": samples,
                    "D": width,
                    "K": heads,
                    "rows": "gathered" if gathered else "all",
                    "pass": what,
                    "what": name,
                    "us": 1e6 * seconds,
                    "minimal MB": bytes_of[what] / 1e6,
                    "GB/s": bytes_of[what] / seconds / 1e9,
                    "GFLOP/s": None if name.startswith("copy") else flop / seconds / 1e9,
                    "of ceiling": limit / seconds,
                    "this / fastalign": seconds / taken["fastalign"],
                }
                for name, seconds in taken.items()
            ]
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    shapes: list[tuple[int, int, int]] = options.shapes or SHAPES[options.device]
    rows = [row for shape in shapes for row in bench(*shape, options, 4 * len(shapes))]
    report(rows, options, {"dtype": options.dtype, "statistic": f"uwo, coef {COEF}"})


if __name__ == "__main__":
    main()
