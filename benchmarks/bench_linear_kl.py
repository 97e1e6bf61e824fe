"""linear_kl: exact KL to a reference model from hidden states, forward alone and with gradients.

    python -m benchmarks.bench_linear_kl [--device cuda --dtype bfloat16] [--out FILE.json]

Work: 2 products of 2 N H V FLOP forward (policy and reference, here of one width); 4 with gradients
when the logits are kept, 6 when they are computed again. "x GEMMs" is the time over that of 2 or 4
bare products on full-size tensors, measured in the same interleaved run. Rival: two full logits
tensors, two log_softmax, sum(p * (log_p - log_r)) and autograd. On CUDA also the bytes that each
takes at most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Run, arguments, medians, peak_bytes, report, share
from fastalign.ops import linear_kl, plan
from fastalign.testing import peaked_head

SHAPES = {
    "cpu": [(512, 512, 16_384), (1024, 512, 32_768)],
    "cuda": [(8192, 2048, 32_768), (16_384, 4096, 128_256)],
}


def bench(n: int, width: int, vocab: int, options: Any) -> list[dict[str, Any]]:
    dtype = getattr(torch, options.dtype)
    hidden, weight, _ = peaked_head(n, width, vocab, dtype=dtype, device=options.device)
    ref_hidden = hidden + 0.1 * torch.randn_like(hidden)
    ref_weight = weight + 0.01 * torch.randn_like(weight)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    g = torch.randn(n, device=options.device)
    z, dh, dw = hidden.new_empty(n, vocab), torch.empty_like(hidden), torch.empty_like(weight)
    small = n * vocab * dtype.itemsize  # two slabs

    def forward_gemms() -> None:
        torch.mm(hidden, weight.t(), out=z)
        torch.mm(ref_hidden, ref_weight.t(), out=z)

    def gemms() -> None:
        forward_gemms()
        torch.mm(z, weight, out=dh)
        torch.mm(z.t(), hidden, out=dw)

    def naive(x: Tensor, y: Tensor) -> Tensor:
        log_p = torch.log_softmax((x @ y.t()).float(), -1)
        log_r = torch.log_softmax((ref_hidden @ ref_weight.t()).float(), -1)
        return (log_p.exp() * (log_p - log_r)).sum(-1)

    def own(x: Tensor, y: Tensor, workspace: int | None = None) -> Tensor:
        return linear_kl(x, y, ref_hidden, ref_weight, workspace=workspace)

    def step(f: Any) -> Run:
        return lambda: torch.autograd.grad(f(h, w), (h, w), g)

    def forward(f: Any) -> Run:
        return lambda: f(hidden, weight)

    everything = 3 * n * vocab * dtype.itemsize  # both models' logits and the gradient
    runs: dict[str, tuple[Run, int]] = {
        "2 GEMMs (ceiling)": (forward_gemms, 2),
        "forward": (forward(own), 2),
        "forward, two log_softmax": (forward(naive), 2),
        "4 GEMMs (ceiling)": (gemms, 4),
        "both, logits kept": (step(lambda x, y: own(x, y, everything)), 4),
        "both, recomputed": (step(lambda x, y: own(x, y, small)), 4),
        "both, two log_softmax": (step(naive), 4),
    }
    limit = share(options, len(options.shapes or SHAPES[options.device]))
    only = {k: run for k, (run, _) in runs.items()}
    taken = medians(only, options.device, options.repeats, limit)
    ceilings = {2: taken["2 GEMMs (ceiling)"], 4: taken["4 GEMMs (ceiling)"]}
    rows = []
    for name, (run, count) in runs.items():
        peak = peak_bytes(run, options.device)
        rows.append(
            {
                "N": n,
                "H": width,
                "V": vocab,
                "what": name,
                "ms": 1e3 * taken[name],
                "TFLOP/s": count * 2 * n * width * vocab / taken[name] / 1e12,
                "x GEMMs": taken[name] / ceilings[count],
                "peak MB": None if peak is None else peak / 1e6,
            }
        )
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows = []
    dtype = getattr(torch, options.dtype)
    for n, width, vocab in options.shapes or SHAPES[options.device]:
        head: dict[str, Any] = dict(op="linear_kl", reference_width=width)
        print(plan(n, width, vocab, dtype=dtype, device=options.device, **head))
        rows += bench(n, width, vocab, options)
    report(rows, options, {"dtype": options.dtype})


if __name__ == "__main__":
    main()
