"""token_rewards: PPO's rewards with KL statistics, beside the usual lines of PyTorch.

    python -m benchmarks.bench_token_rewards [--device cuda --dtype bfloat16] [--out FILE.json]

Traffic: two log-probs (RTO: three) and a mask are read once, float32 rewards are written once. The
ceiling is a copy of as many bytes. Rivals, in the same interleaved run: the KL penalty, the
bounded score added at the last kept token of each row, and the masked KL statistics, as TRL, verl
and OpenRLHF have them, eager and through torch.compile; the same tokens without padding, packed in
one row; RTO's rewards likewise. Shapes: B x T, rows of unequal length.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_whiten import of_unequal_length
from benchmarks.timing import Run, arguments, report, share, timings
from fastalign.ops import token_rewards

SHAPES = [(64, 512), (256, 1024), (1024, 4096)]
KL_COEF, CLIP_SCORE, DPO_COEF, CLIP_DPO = 0.05, 10.0, 0.05, 0.05
Found = tuple[Tensor, Tensor, Tensor]


def plain(
    kind: str,
    logp: Tensor,
    ref_logp: Tensor,
    scores: Tensor,
    mask: Tensor,
    dpo_logp: Tensor | None = None,
) -> Found:
    logp, ref_logp = logp.float(), ref_logp.float()
    gap = ref_logp - logp
    kl = (-gap if kind == "k1" else torch.exp(gap) - 1 - gap) * mask
    rewards = -KL_COEF * kl
    if dpo_logp is not None:
        implied = DPO_COEF * (dpo_logp.float() - ref_logp)
        rewards = rewards + implied.clamp(-CLIP_DPO, CLIP_DPO) * mask
    steps = torch.arange(logp.shape[1], device=logp.device)
    last = (mask * steps).argmax(1, keepdim=True)
    terminal = scores.clamp(-CLIP_SCORE, CLIP_SCORE)[:, None]
    rewards = rewards + torch.zeros_like(rewards).scatter_(1, last, terminal)
    sequence_kl = kl.sum(1)
    return rewards, sequence_kl.sum() / mask.sum(), sequence_kl


def fused(
    kind: str,
    logp: Tensor,
    ref_logp: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    dpo_logp: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Found:
    rewards, statistics = token_rewards(
        logp,
        ref_logp,
        scores,
        kl_coef=KL_COEF,
        kl_kind=kind,
        clip_score=CLIP_SCORE,
        dpo_logp=dpo_logp,
        dpo_coef=DPO_COEF,
        clip_dpo=CLIP_DPO,
        mask=mask,
        cu_seqlens=cu_seqlens,
    )
    return rewards, statistics["kl"], statistics["sequence_kl"]


def bench(rows: int, steps: int, task: str, options: Any, n_cases: int) -> list[dict[str, Any]]:
    device, dtype = options.device, getattr(torch, options.dtype)
    logp = (-2.0 * torch.rand(rows, steps, device=device)).to(dtype)
    ref_logp, dpo_logp = (
        (logp.float() + 0.4 * torch.randn_like(logp, dtype=torch.float32)).to(dtype)
        for _ in range(2)
    )
    scores = 3.0 * torch.randn(rows, device=device)
    mask = of_unequal_length(rows, steps, device)
    kind = "k3" if task == "PPO, k3" else "k1"
    dpo = dpo_logp if task == "RTO" else None
    args = (kind, logp, ref_logp, scores, mask, dpo)
    for got, want in zip(fused(*args), plain(*args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    lengths = mask.sum(1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    packed = (kind, logp[mask], ref_logp[mask], scores, None, None if dpo is None else dpo[mask])
    size = rows * steps * ((2 + (dpo is not None)) * logp.element_size() + 5)
    source, spare = torch.zeros(2, size // 2, dtype=torch.uint8, device=device)
    runs: dict[str, Run] = {
        "copy (ceiling)": lambda: spare.copy_(source),
        "fastalign": partial(fused, *args),
        "fastalign, packed": partial(fused, *packed, offsets),
        "plain": partial(plain, *args),
    }
    if "compile" not in options.without:
        runs["plain, compiled"] = partial(torch.compile(plain, dynamic=False), *args)
    for run in runs.values():
        run()
    taken = timings(runs, device, options.repeats, share(options, n_cases))
    return [
        {
            "B": rows,
            "T": steps,
            "task": task,
            "what": name,
            "us": 1e6 * time.median,
            "q1 us": 1e6 * time.low,
            "q3 us": 1e6 * time.high,
            "rounds": time.rounds,
            "minimal MB": size / 1e6,
            "GB/s": size / time.median / 1e9,
            "of copy speed": taken["copy (ceiling)"].median / time.median,
            "this / fastalign": time.median / taken["fastalign"].median,
        }
        for name, time in taken.items()
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    shapes: list[tuple[int, int]] = options.shapes or SHAPES
    cases = [(*shape, task) for shape in shapes for task in ("PPO, k1", "PPO, k3", "RTO")]
    rows = [row for case in cases for row in bench(*case, options, len(cases))]
    report(rows, options, {"dtype": options.dtype})


if __name__ == "__main__":
    main()
