"""token_logprobs: time, bytes moved and the fraction of this machine's copy speed.

    python -m benchmarks.bench_token_logprobs [--device cuda --dtype bfloat16] [--out FILE.json]

Traffic: the forward pass reads N * V logits once, the backward pass reads and writes them once.
Rivals, in the same interleaved run: log_softmax + gather (with its autograd), logsumexp - gather,
and the entropy by softmax beside it. The ceiling is a copy of the logits (read + write).
Logits are peaked as a trained model's (fastalign.testing.peaked_logits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Run, arguments, medians, report
from fastalign.ops import token_logprobs
from fastalign.testing import peaked_logits

SHAPES = {"cpu": [(256, 32_768), (64, 128_256)], "cuda": [(4096, 32_768), (8192, 128_256)]}


def log_softmax_gather(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0]


def logsumexp_gather(logits: Tensor, targets: Tensor) -> Tensor:
    picked = logits.gather(-1, targets[:, None])[:, 0].float()
    return picked - torch.logsumexp(logits.float(), -1)


def with_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def bench(n: int, vocab: int, options: Any) -> list[dict[str, Any]]:
    dtype = getattr(torch, options.dtype)
    logits, targets = peaked_logits(n, vocab, dtype=dtype, device=options.device)
    leaf = logits.clone().requires_grad_()
    g = torch.ones(n, device=options.device)
    size = logits.numel() * logits.element_size()
    spare = torch.empty_like(logits)

    def forward(f: Any, **kwargs: Any) -> Run:
        return lambda: f(logits, targets, **kwargs)

    def both(f: Any, **kwargs: Any) -> Run:
        def run() -> None:
            out = f(leaf, targets, **kwargs)
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(out, leaf, [g] * len(out))

        return run

    entropy = {"return_entropy": True}
    runs: dict[str, tuple[Run, int]] = {
        "copy (ceiling)": (lambda: spare.copy_(logits), 2 * size),
        "forward": (forward(token_logprobs), size),
        "forward, entropy": (forward(token_logprobs, **entropy), size),
        "forward, log_softmax+gather": (forward(log_softmax_gather), size),
        "forward, logsumexp-gather": (forward(logsumexp_gather), size),
        "forward, entropy, eager": (forward(with_entropy), size),
        "both": (both(token_logprobs), 3 * size),
        "both, entropy": (both(token_logprobs, **entropy), 3 * size),
        "both, log_softmax+gather": (both(log_softmax_gather), 3 * size),
        "both, entropy, eager": (both(with_entropy), 3 * size),
    }
    taken = medians({k: run for k, (run, _) in runs.items()}, options.device, options.repeats)
    ceiling = 2 * size / taken["copy (ceiling)"]
    rivals = {"forward": "forward, log_softmax+gather", "both": "both, log_softmax+gather"}
    rivals |= {f"{k}, entropy": f"{k}, entropy, eager" for k in ("forward", "both")}
    return [
        {
            "N": n,
            "V": vocab,
            "what": name,
            "ms": 1e3 * taken[name],
            "minimal MB": moved / 1e6,
            "GB/s": moved / taken[name] / 1e9,
            "of copy": moved / taken[name] / ceiling,
            "x rival": taken[rivals[name]] / taken[name] if name in rivals else None,
        }
        for name, (_, moved) in runs.items()
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows = []
    for shape in SHAPES[options.device]:
        rows += bench(*shape, options)
    report(rows, options, {"dtype": options.dtype})


if __name__ == "__main__":
    main()
