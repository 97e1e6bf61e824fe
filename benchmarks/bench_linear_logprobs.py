"""linear_logprobs: per-token log-probs from hidden states, forward alone and with gradients.

    python -m benchmarks.bench_linear_logprobs [--device cuda --dtype bfloat16] [--out FILE.json]

Work: 1 product of 2 N H V FLOP forward; 3 with gradients when the logits are kept, 4 when they are
computed again. "x GEMMs" is the time over that of 1 or 3 bare products on full-size tensors,
measured in the same interleaved run. Rivals: log_softmax + gather on full logits with autograd, and
TRL's ChunkedLogProbFunction where TRL is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Run, arguments, medians, report
from fastalign.ops import linear_logprobs
from fastalign.testing import peaked_head

SHAPES = {
    "cpu": [(512, 512, 16_384), (1024, 512, 32_768)],
    "cuda": [(8192, 2048, 32_768), (16_384, 4096, 128_256)],
}


def trl_logprobs() -> Any:
    """TRL's chunked op, or None where TRL is not installed."""
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ModuleNotFoundError:
        return None
    return ChunkedLogProbFunction


def bench(n: int, width: int, vocab: int, options: Any) -> list[dict[str, Any]]:
    dtype = getattr(torch, options.dtype)
    hidden, weight, targets = peaked_head(n, width, vocab, dtype=dtype, device=options.device)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    g = torch.randn(n, device=options.device)
    z, dh, dw = hidden.new_empty(n, vocab), torch.empty_like(hidden), torch.empty_like(weight)
    small = max(64, n // 4) * vocab * dtype.itemsize

    def gemms() -> None:
        torch.mm(hidden, weight.t(), out=z)
        torch.mm(z, weight, out=dh)
        torch.mm(z.t(), hidden, out=dw)

    def naive(x: Tensor, y: Tensor) -> Tensor:
        return torch.log_softmax((x @ y.t()).float(), -1).gather(-1, targets[:, None])[:, 0]

    def own(x: Tensor, y: Tensor, workspace: int | None = None) -> Tensor:
        return linear_logprobs(x, y, targets, ignore_index=None, workspace=workspace)

    def step(f: Any) -> Run:
        return lambda: torch.autograd.grad(f(h, w), (h, w), g)

    def forward(f: Any) -> Run:
        return lambda: f(hidden, weight)

    runs: dict[str, tuple[Run, int]] = {
        "1 GEMM (ceiling)": (lambda: torch.mm(hidden, weight.t(), out=z), 1),
        "forward": (forward(own), 1),
        "forward, log_softmax + gather": (forward(naive), 1),
        "3 GEMMs (ceiling)": (gemms, 3),
        "both, logits kept": (step(lambda x, y: own(x, y, n * vocab * dtype.itemsize)), 3),
        "both, recomputed": (step(lambda x, y: own(x, y, small)), 3),
        "both, log_softmax + gather": (step(naive), 3),
    }
    chunked = trl_logprobs()
    if chunked is not None:
        runs["both, TRL ChunkedLogProbFunction"] = (
            step(lambda x, y: chunked.apply(x, y, None, targets, 1.0, 8192, None, 1.0, ())[0]),
            3,
        )
    taken = medians({k: run for k, (run, _) in runs.items()}, options.device, options.repeats)
    ceilings = {1: taken["1 GEMM (ceiling)"], 3: taken["3 GEMMs (ceiling)"]}
    return [
        {
            "N": n,
            "H": width,
            "V": vocab,
            "what": name,
            "ms": 1e3 * taken[name],
            "TFLOP/s": count * 2 * n * width * vocab / taken[name] / 1e12,
            "x GEMMs": taken[name] / ceilings[count],
        }
        for name, (_, count) in runs.items()
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows = []
    for shape in SHAPES[options.device]:
        rows += bench(*shape, options)
    trl = "measured" if trl_logprobs() is not None else "not installed: not measured"
    report(rows, options, {"dtype": options.dtype, "TRL": trl})


if __name__ == "__main__":
    main()
