"""policy_loss: forward and backward on log-probs, beside plain PyTorch, eager and compiled.

    python -m benchmarks.bench_policy_loss [--device cuda] [--out FILE.json]

Traffic: each input is read once and each gradient written once in the forward pass; the backward
pass reads and writes the gradients once more. 4 bytes a number. The ceiling is a copy of as many
bytes. Rivals, in the same interleaved run: the usual few lines of PyTorch with autograd (ratio,
clamp, minimum, k3, masked mean), eager and through torch.compile. They form the loss only, the
fused op its statistics (ratio, clip fraction, k1, k2, k3) too; the lines "and statistics" let the
rivals form the same ones. The public libraries' losses on log-probs are such lines of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from benchmarks.timing import Run, arguments, medians, report, share
from fastalign.losses import APA, PPO, ValueLoss

SIZES = [16_384, 1_048_576]
PPO_LOSS = PPO(clip=0.2, clip_high=0.28, kl_coef=0.05, entropy_coef=0.01)
VALUE_LOSS = ValueLoss(clip=0.2)
Batch = dict[str, Tensor]


def batch(n: int, device: str) -> Batch:
    """Log-probs a few updates away from those that sampled the tokens; one token in ten masked."""
    generator = torch.Generator().manual_seed(0)
    logp = -2.0 * torch.rand(n, generator=generator)
    noise = torch.randn(6, n, generator=generator)
    made = {
        "logp": logp,
        "entropy": -logp + 0.2 * noise[0].abs(),
        "values": noise[1],
        "old_logp": logp + 0.15 * noise[2],
        "ref_logp": logp + 0.4 * noise[3],
        "advantages": noise[4],
        "returns": noise[1] + 0.5 * noise[5],
        "old_values": noise[1] + 0.1 * noise[0],
        "mask": torch.rand(n, generator=generator) < 0.9,
    }
    return {name: x.to(device) for name, x in made.items()}


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def ppo_terms(b: Batch) -> Tensor:
    ratio = torch.exp(b["logp"] - b["old_logp"])
    clipped = torch.clamp(ratio, 0.8, 1.28)
    policy = -torch.minimum(ratio * b["advantages"], clipped * b["advantages"])
    gap = b["ref_logp"] - b["logp"]
    return policy + 0.05 * (torch.exp(gap) - 1 - gap) - 0.01 * b["entropy"]


def plain_ppo(b: Batch) -> Tensor:
    return masked_mean(ppo_terms(b), b["mask"])


def plain_ppo_and_statistics(b: Batch) -> tuple[Tensor, ...]:
    loss = plain_ppo(b)
    with torch.no_grad():
        mask, found = b["mask"], [b["entropy"]]
        ratio = torch.exp(b["logp"] - b["old_logp"])
        high, low = (ratio > 1.28) & (b["advantages"] > 0), (ratio < 0.8) & (b["advantages"] < 0)
        found += [ratio, (high | low).float()]
        for other in ("ref_logp", "old_logp"):
            gap = b[other] - b["logp"]
            found += [-gap, 0.5 * gap * gap, torch.exp(gap) - 1 - gap]
        return loss, *(masked_mean(x, mask) for x in found)


def plain_actor_critic(b: Batch) -> Tensor:
    old = b["old_values"]
    near = old + torch.clamp(b["values"] - old, -0.2, 0.2)
    error, other = (b["values"] - b["returns"]).square(), (near - b["returns"]).square()
    return masked_mean(ppo_terms(b) + 0.25 * torch.maximum(error, other), b["mask"])


def plain_apa(b: Batch) -> Tensor:
    residual = b["logp"] - b["advantages"] / 0.5 - b["ref_logp"]
    return masked_mean(residual.square(), b["mask"])


def fused_ppo(b: Batch) -> Tensor:
    inputs = {name: b[name] for name in PPO_LOSS.required}
    loss, _ = fa.ops.policy_loss(PPO_LOSS, b["logp"], inputs, entropy=b["entropy"], mask=b["mask"])
    return loss


def fused_actor_critic(b: Batch) -> Tensor:
    inputs = {name: b[name] for name in PPO_LOSS.required}
    loss, _ = fa.ops.actor_critic_loss(
        PPO_LOSS,
        b["logp"],
        inputs,
        b["values"],
        b["returns"],
        old_values=b["old_values"],
        value_loss=VALUE_LOSS,
        vf_coef=0.5,
        entropy=b["entropy"],
        mask=b["mask"],
    )
    return loss


def fused_apa(b: Batch) -> Tensor:
    inputs = {name: b[name] for name in APA.required}
    return fa.ops.policy_loss(APA(0.5), b["logp"], inputs, mask=b["mask"])[0]


# Fused and plain form, the tensors that get gradients, and how many others are read.
CASES: dict[str, tuple[Callable, dict[str, Callable], tuple[str, ...], int]] = {
    "PPO, KL, entropy": (
        fused_ppo,
        {"": plain_ppo, " and statistics": plain_ppo_and_statistics},
        ("logp", "entropy"),
        3,
    ),
    "actor-critic": (
        fused_actor_critic,
        {"": plain_actor_critic},
        ("logp", "entropy", "values"),
        5,
    ),
    "APA": (fused_apa, {"": plain_apa}, ("logp",), 2),
}


def with_backward(f: Callable, b: Batch, leaves: tuple[str, ...]) -> Run:
    given = b | {name: b[name].clone().requires_grad_() for name in leaves}

    def run() -> None:
        out = f(given)
        loss = out if isinstance(out, Tensor) else out[0]
        torch.autograd.grad(loss, [given[name] for name in leaves])

    return run


def bench(case: str, n: int, options: Any) -> list[dict[str, Any]]:
    fused, plain, leaves, others = CASES[case]
    b = batch(n, options.device)
    size = n * (4 * (len(leaves) + others) + 1 + 3 * 4 * len(leaves))
    source, spare = torch.zeros(2, size // 2, dtype=torch.uint8, device=options.device)
    runs: dict[str, Run] = {
        "copy (ceiling)": lambda: spare.copy_(source),
        "fastalign": with_backward(fused, b, leaves),
    }
    for name, f in plain.items():
        runs[f"eager{name}"] = with_backward(f, b, leaves)
        runs[f"torch.compile{name}"] = with_backward(torch.compile(f), b, leaves)
    limit = share(options, len(CASES) * len(SIZES))
    taken = medians(runs, options.device, options.repeats, limit)
    return [
        {
            "case": case,
            "tokens": n,
            "what": name,
            "ms": 1e3 * time,
            "MB": size / 1e6,
            "GB/s": size / time / 1e9,
            "of copy speed": taken["copy (ceiling)"] / time,
            "this / fastalign": time / taken["fastalign"],
        }
        for name, time in taken.items()
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    rows = [row for case in CASES for n in SIZES for row in bench(case, n, options)]
    report(rows, options, {})


if __name__ == "__main__":
    main()
