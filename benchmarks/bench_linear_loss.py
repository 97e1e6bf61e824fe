"""linear_loss: hidden states to loss and gradients, beside the three bare matrix products.

    python -m benchmarks.bench_linear_loss [--device cuda --dtype bfloat16] [--out FILE.json]

Work: 3 products of 2 N H V FLOP. The ceiling is those three products alone, on tensors of the full
size, in the same interleaved run; "x GEMMs" is the time over it (1 is perfect). Rivals: naive
log_softmax + gather and F.cross_entropy on full logits, with autograd. MiB on CUDA is the peak
beside inputs and gradients of the inputs; on CPU only the planned workspace is known.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Run, arguments, medians, peak_bytes, report
from fastalign.ops import linear_loss, plan
from fastalign.testing import peaked_head

SHAPES = {
    "cpu": [(512, 512, 16_384), (1024, 512, 32_768)],
    "cuda": [(8192, 2048, 32_768), (16_384, 4096, 128_256)],
}


def likelihood(logp: Tensor, entropy: Tensor) -> Tensor:
    return -logp


def policy(logp: Tensor, entropy: Tensor, advantages: Tensor, old_logp: Tensor) -> Tensor:
    ratio = (logp - old_logp).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -gain - 0.01 * entropy


def bench(n: int, width: int, vocab: int, options: Any) -> list[dict[str, Any]]:
    dtype = getattr(torch, options.dtype)
    hidden, weight, targets = peaked_head(n, width, vocab, dtype=dtype, device=options.device)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    advantages = torch.randn(n, device=options.device)
    old_logp = torch.full((n,), -1.0, device=options.device)
    inputs = {"advantages": advantages, "old_logp": old_logp}
    z, dh, dw = hidden.new_empty(n, vocab), torch.empty_like(hidden), torch.empty_like(weight)

    def gemms() -> None:
        torch.mm(hidden, weight.t(), out=z)
        torch.mm(z, weight, out=dh)
        torch.mm(z.t(), hidden, out=dw)

    def step(f: Any) -> Run:
        return lambda: torch.autograd.grad(f(), (h, w))

    def naive_policy() -> Tensor:
        log_p = torch.log_softmax((h @ w.t()).float(), -1)
        logp = log_p.gather(-1, targets[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        return policy(logp, entropy, advantages, old_logp).mean()

    def naive_likelihood() -> Tensor:
        log_p = torch.log_softmax((h @ w.t()).float(), -1)
        return -log_p.gather(-1, targets[:, None])[:, 0].mean()

    def own(loss: Any, given: dict[str, Tensor]) -> Tensor:
        return linear_loss(h, w, targets, loss, given, ignore_index=None).loss

    runs: dict[str, Run] = {
        "three GEMMs (ceiling)": gemms,
        "linear_loss, likelihood": step(lambda: own(likelihood, {})),
        "linear_loss, PPO + entropy": step(lambda: own(policy, inputs)),
        "F.cross_entropy(linear)": step(lambda: F.cross_entropy((h @ w.t()).float(), targets)),
        "log_softmax + gather": step(naive_likelihood),
        "log_softmax, PPO + entropy": step(naive_policy),
    }
    taken = medians(runs, options.device, options.repeats)
    flops = 3 * 2 * n * width * vocab
    ceiling = taken["three GEMMs (ceiling)"]

    chosen = plan(n, width, vocab, dtype=dtype, device=options.device)
    print(chosen)
    rows = []
    for name, run in runs.items():
        ceiling_row = name == "three GEMMs (ceiling)"
        peak = None if ceiling_row else peak_bytes(run, options.device)
        if peak is None and name.startswith("linear_loss"):
            peak = chosen.workspace + chosen.accumulator
        rows.append(
            {
                "N": n,
                "H": width,
                "V": vocab,
                "what": name,
                "ms": 1e3 * taken[name],
                "TFLOP/s": flops / taken[name] / 1e12,
                "x GEMMs": taken[name] / ceiling,
                "MiB": None if peak is None else peak / 2**20,
            }
        )
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows = []
    for shape in SHAPES[options.device]:
        rows += bench(*shape, options)
    report(rows, options, {"dtype": options.dtype})


if __name__ == "__main__":
    main()
