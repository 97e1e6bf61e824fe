"""preference_loss: DPO from token log-probs, forward and backward, beside plain PyTorch.

    python -m benchmarks.bench_preference_loss [--device cuda] [--out FILE.json]

Traffic: the log-probs and the reference's are read once; the backward pass writes the gradient. 4
bytes a number. The ceiling is a copy of as many bytes. Rivals, in the same interleaved run, eager
and through torch.compile: "padded", the lines of DPO trainers on [2P, T] with a mask (chosen ones
first, sums over rows, logsigmoid), and "packed", segment sums of the same packed tokens as here;
both form what is logged too, as the fused op does ("loss only": without). Of Liger the loss on sums
that its fused layer calls. All lengths are drawn between 1/4 and 7/4 of T, so that padded tensors
hold 1.75 times the tokens. Before timing, every rival's loss is compared. Shapes: P x T.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import Peer, compiled, load
from benchmarks.timing import Run, arguments, report, share, timings
from fastalign.losses import DPO
from fastalign.ops import preference_loss

SHAPES = [(8, 256), (64, 512), (8, 8192), (512, 512)]
BETA = 0.1
LOSS = DPO(BETA)
Batch = dict[str, Tensor]


def batch(pairs: int, tokens: int, device: str) -> Batch:
    """Packed and padded forms of the same pairs."""
    generator = torch.Generator().manual_seed(0)
    lengths = (tokens * (0.25 + 1.5 * torch.rand(2 * pairs, generator=generator))).long() + 1
    n = int(lengths.sum())
    logp = -2.0 * torch.rand(n, generator=generator)
    ref_logp = logp + 0.2 * torch.randn(n, generator=generator)
    made = {"cu_seqlens": torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])}
    order = [*range(0, 2 * pairs, 2), *range(1, 2 * pairs, 2)]
    for name, x in (("logp", logp), ("ref_logp", ref_logp), ("mask", torch.ones(n).bool())):
        parts = x.split(lengths.tolist())
        rows = torch.nn.utils.rnn.pad_sequence([parts[i] for i in order], batch_first=True)
        made |= {name: x, f"padded_{name}": rows}
    return {name: x.to(device) for name, x in made.items()}


def fused(b: Batch) -> Tensor:
    return preference_loss(LOSS, b["logp"], b["cu_seqlens"], ref_logp=b["ref_logp"])[0].mean()


def logged(w: Tensor, r: Tensor, ref_w: Tensor, ref_r: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        chosen, rejected = BETA * (w - ref_w), BETA * (r - ref_r)
        margins = chosen - rejected
        found = (chosen, rejected, margins, (chosen > rejected).float(), w, r)
        return tuple(x.mean() for x in found)


def sigmoid_loss(w: Tensor, r: Tensor, ref_w: Tensor, ref_r: Tensor) -> Tensor:
    return -F.logsigmoid(BETA * ((w - ref_w) - (r - ref_r))).mean()


def padded_sums(b: Batch) -> tuple[Tensor, ...]:
    mask = b["padded_mask"]
    w, r = (b["padded_logp"] * mask).sum(1).chunk(2)
    ref_w, ref_r = (b["padded_ref_logp"] * mask).sum(1).chunk(2)
    return w, r, ref_w, ref_r


def packed_sums(b: Batch) -> tuple[Tensor, ...]:
    logp, ref_logp = (
        torch.segment_reduce(b[name], "sum", offsets=b["cu_seqlens"], unsafe=True)
        for name in ("logp", "ref_logp")
    )
    return logp[0::2], logp[1::2], ref_logp[0::2], ref_logp[1::2]


def padded_loss(b: Batch) -> Tensor:
    return sigmoid_loss(*padded_sums(b))


def padded(b: Batch) -> tuple[Tensor, ...]:
    sums = padded_sums(b)
    return sigmoid_loss(*sums), *logged(*sums)


def packed(b: Batch) -> tuple[Tensor, ...]:
    sums = packed_sums(b)
    return sigmoid_loss(*sums), *logged(*sums)


def liger() -> Callable[[Batch], Any]:
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction

    def f(b: Batch) -> tuple[Tensor, ...]:
        w, r, ref_w, ref_r = padded_sums(b)
        like = b["padded_mask"]
        return LigerFusedLinearDPOFunction.preference_loss_fn(w, r, like, ref_w, ref_r, beta=BETA)

    return f


RIVALS = [
    Peer("padded, loss only", "torch", lambda: padded_loss),
    Peer("padded", "torch", lambda: padded),
    Peer("padded, compiled", "torch", compiled(padded)),
    Peer("packed", "torch", lambda: packed),
    Peer("packed, compiled", "torch", compiled(packed)),
    Peer("Liger on padded", "liger-kernel", liger),
]


def first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def bench(
    pairs: int, tokens: int, options: Any, n_cases: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    device = options.device
    torch._dynamo.reset()  # one function is not compiled for more than a few shapes
    plain = batch(pairs, tokens, device)
    n = len(plain["logp"])
    loaded, absent = load(RIVALS, device, options.without)
    candidates: dict[str, Callable[[Batch], Any]] = {"fastalign": fused}
    candidates |= {rival.peer.name: rival.function for rival in loaded}
    truth = first(packed({k: x.double() if x.is_floating_point() else x for k, x in plain.items()}))
    errors = {name: abs(first(f(plain)).item() - truth.item()) for name, f in candidates.items()}
    grads = {k: plain[k].clone().requires_grad_() for k in ("logp", "padded_logp")}

    def forward(f: Callable[[Batch], Any]) -> Run:
        return torch.no_grad()(lambda: f(plain))

    def both(f: Callable[[Batch], Any]) -> Run:
        leaf = grads["padded_logp" if "padded" in f_name[f] else "logp"]
        return lambda: torch.autograd.grad(first(f(plain | grads)), leaf)

    f_name = {f: name for name, f in candidates.items()}
    rows = []
    for what, form, moved in (("forward", forward, 8 * n), ("both", both, 12 * n)):
        spare = torch.zeros(2, moved // 2, dtype=torch.uint8, device=device)
        runs: dict[str, Run] = {"copy (ceiling)": partial(torch.Tensor.copy_, *spare)}
        runs |= {name: form(f) for name, f in candidates.items()}
        for run in runs.values():
            run()
        taken = timings(runs, device, options.repeats, share(options, n_cases))
        rows += [
            {
                "P": pairs,
                "T": tokens,
                "tokens": n,
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
                "error": errors.get(name),
            }
            for name, seconds in taken.items()
        ]
    return rows, absent


def main() -> None:
    options = arguments(__doc__).parse_args()
    shapes: list[tuple[int, int]] = options.shapes or SHAPES
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for shape in shapes:
        found, absent = bench(*shape, options, 2 * len(shapes))
        rows += found
    report(rows, options, {"dtype": "float32", "absent": absent})


if __name__ == "__main__":
    main()
