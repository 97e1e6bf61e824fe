"""whiten: a batch of advantages with a mask, beside the usual lines of PyTorch.

    python -m benchmarks.bench_whiten [--device cuda --dtype bfloat16] [--out FILE.json]

Traffic: cells and mask are read once and float32 is written; the op reads the cells twice, as it
must know the mean before it can write. The ceiling is a copy of as many bytes. Rivals, in the same
interleaved run: masked mean, masked variance with Bessel's correction, and the whitening by them,
as TRL and verl have it, eager and through torch.compile; and the op without a mask, on the kept
cells packed, and with the statistics given, as gae returns them. Shapes: B x T, rows of unequal
length.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Run, arguments, medians, report, share
from fastalign.ops import whiten

SHAPES = [(64, 512), (256, 1024), (1024, 4096)]


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    x = x.float()
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / count
    variance = variance * count / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def of_unequal_length(rows: int, steps: int, device: str) -> Tensor:
    """The mask of rows that end somewhere in their second half."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(steps // 2, steps + 1, (rows, 1), generator=generator)
    return (torch.arange(steps) < lengths).to(device)


def bench(rows: int, steps: int, options: Any) -> list[dict[str, Any]]:
    device, dtype = options.device, getattr(torch, options.dtype)
    x = torch.randn(rows, steps, device=device).to(dtype)
    mask = of_unequal_length(rows, steps, device)
    packed = x[mask]
    own = packed.double()
    statistics = torch.stack([own.new_tensor(own.numel()), own.mean(), own.var()])
    size = rows * steps * (x.element_size() + 5)
    source, spare = torch.zeros(2, size // 2, dtype=torch.uint8, device=device)
    runs: dict[str, Run] = {
        "copy (ceiling)": lambda: spare.copy_(source),
        "fastalign": lambda: whiten(x, mask),
        "fastalign, no mask": lambda: whiten(x),
        "fastalign, packed": lambda: whiten(packed),
        "fastalign, statistics given": lambda: whiten(x, mask, statistics=statistics),
        "masked_whiten": lambda: masked_whiten(x, mask),
    }
    if "compile" not in options.without:
        compiled = torch.compile(masked_whiten, dynamic=False)
        runs["masked_whiten, compiled"] = partial(compiled, x, mask)
    torch.testing.assert_close(whiten(x, mask)[mask], masked_whiten(x, mask)[mask])
    taken = medians(runs, device, options.repeats, share(options, len(options.shapes or SHAPES)))
    return [
        {
            "B": rows,
            "T": steps,
            "what": name,
            "us": 1e6 * time,
            "minimal MB": size / 1e6,
            "GB/s": size / time / 1e9,
            "of copy speed": taken["copy (ceiling)"] / time,
            "this / fastalign": time / taken["fastalign"],
        }
        for name, time in taken.items()
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    shapes: list[tuple[int, int]] = options.shapes or SHAPES
    rows = [row for shape in shapes for row in bench(*shape, options)]
    report(rows, options, {"dtype": options.dtype})


if __name__ == "__main__":
    main()
