"""token_kl: time, bytes moved and the fraction of this machine's copy speed.

    python -m benchmarks.bench_token_kl [--device cuda --dtype bfloat16] [--out FILE.json]

Traffic: the forward pass reads N * V logits of both models once; the backward pass reads both and
writes one. Rivals, in the same interleaved run: sum(p * (log_p - log_r)) from two log_softmax and
torch.nn.functional.kl_div, both with their autograd. The ceiling is a copy of the logits (read +
write). Logits are peaked as a trained model's (fastalign.testing.peaked_logits); the reference's
are the policy's with noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Run, arguments, medians, report, share
from fastalign.ops import token_kl
from fastalign.testing import peaked_logits

SHAPES = {"cpu": [(256, 32_768), (64, 128_256)], "cuda": [(4096, 32_768), (8192, 128_256)]}


def log_softmax_sum(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p, log_r = (torch.log_softmax(x.float(), -1) for x in (logits, ref_logits))
    return (log_p.exp() * (log_p - log_r)).sum(-1)


def kl_div(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_p, log_r = (torch.log_softmax(x.float(), -1) for x in (logits, ref_logits))
    return torch.nn.functional.kl_div(log_r, log_p, reduction="none", log_target=True).sum(-1)


def bench(n: int, vocab: int, options: Any) -> list[dict[str, Any]]:
    dtype = getattr(torch, options.dtype)
    logits, _ = peaked_logits(n, vocab, dtype=dtype, device=options.device)
    ref_logits = logits + 0.1 * torch.randn_like(logits)
    leaf = logits.clone().requires_grad_()
    g = torch.ones(n, device=options.device)
    size = logits.numel() * logits.element_size()
    spare = torch.empty_like(logits)

    def forward(f: Any) -> Run:
        return lambda: f(logits, ref_logits)

    def both(f: Any) -> Run:
        return lambda: torch.autograd.grad(f(leaf, ref_logits), leaf, g)

    runs: dict[str, tuple[Run, int]] = {
        "copy (ceiling)": (lambda: spare.copy_(logits), 2 * size),
        "forward": (forward(token_kl), 2 * size),
        "forward, two log_softmax": (forward(log_softmax_sum), 2 * size),
        "forward, kl_div": (forward(kl_div), 2 * size),
        "both": (both(token_kl), 5 * size),
        "both, two log_softmax": (both(log_softmax_sum), 5 * size),
        "both, kl_div": (both(kl_div), 5 * size),
    }
    limit = share(options, len(options.shapes or SHAPES[options.device]))
    only = {k: run for k, (run, _) in runs.items()}
    taken = medians(only, options.device, options.repeats, limit)
    ceiling = 2 * size / taken["copy (ceiling)"]
    rivals = {k: f"{k}, two log_softmax" for k in ("forward", "both")}
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
    for n, vocab in options.shapes or SHAPES[options.device]:
        rows += bench(n, vocab, options)
    report(rows, options, {"dtype": options.dtype})


if __name__ == "__main__":
    main()
