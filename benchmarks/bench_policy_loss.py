"""policy_loss: forward and backward on log-probs, beside plain PyTorch, eager and compiled.

    python -m benchmarks.bench_policy_loss [--device cuda] [--out FILE.json]

Traffic: each input is read once and each gradient written once in the forward pass; on a GPU the
backward pass reads and writes the gradients once more (on a CPU it sees that the upstream factor
is 1). 4 bytes a number. The ceiling is a copy of as many bytes. Rivals, in the same interleaved
run: the usual few lines of PyTorch with autograd (ratio, clamp, minimum, k3, masked mean), eager
and through torch.compile. They form the loss only, the fused op its statistics (ratio, clip
fraction, k1, k2, k3) too; the lines "and statistics" let the rivals form the same ones. Of Liger
the loss on log-probs that its fused layer calls; TRL's is a part of its trainer and cannot be
called alone, but is such lines of PyTorch. Before timing, every rival's loss is compared.

"empty function (floor)" is an autograd function with the same leaves that computes nothing and
returns prepared gradients: what torch itself takes of a call, and what no function written in
Python goes below. With 16,384 tokens that is a third of the whole. Eager APA, few operations,
takes four floors there: to be three times as fast would leave a third of a floor for all checks,
allocations and the arithmetic. Shapes: the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from benchmarks.peers import Peer, load
from benchmarks.timing import Run, arguments, report, share, timings
from fastalign.losses import APA, GRPO, PPO, ValueLoss

SIZES = [16_384, 1_048_576]
PPO_LOSS = PPO(clip=0.2, clip_high=0.28, kl_coef=0.05, entropy_coef=0.01)
GRPO_LOSS = GRPO("dapo", clip=0.2, clip_high=0.28, kl_coef=0.05)
APA_LOSS = APA(0.5)
VALUE_LOSS = ValueLoss(clip=0.2)
LENGTH = 64  # of GRPO's sequences
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
    # One advantage for each sequence, as GRPO has it.
    made["group_advantages"] = made["advantages"][::LENGTH].repeat_interleave(LENGTH)[:n]
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


def plain_grpo(b: Batch) -> Tensor:
    ratio = torch.exp(b["logp"] - b["old_logp"])
    clipped, advantages = torch.clamp(ratio, 0.8, 1.28), b["group_advantages"]
    policy = -torch.minimum(ratio * advantages, clipped * advantages)
    gap = b["ref_logp"] - b["logp"]
    return masked_mean(policy + 0.05 * (torch.exp(gap) - 1 - gap), b["mask"])


def liger_grpo() -> Callable[[Batch], Any]:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    def f(b: Batch) -> Any:
        rows = {name: b[name].view(-1, min(LENGTH, len(b[name]))) for name in ("logp", "old_logp")}
        mask = b["mask"].view(rows["logp"].shape)
        return LigerFusedLinearGRPOFunction.ppo_loss_fn(
            rows["logp"],
            mask,
            b["group_advantages"].view(mask.shape)[:, 0],
            mask,
            ref_per_token_logps=b["ref_logp"].view(mask.shape),
            old_per_token_logps=rows["old_logp"],
            epsilon_low=0.2,
            epsilon_high=0.28,
            beta=0.05,
            loss_type="dapo",
        )

    return f


def fused_grpo(b: Batch) -> Tensor:
    inputs = {name: b[name] for name in ("old_logp", "ref_logp")}
    inputs["advantages"] = b["group_advantages"]
    return fa.ops.policy_loss(GRPO_LOSS, b["logp"], inputs, mask=b["mask"])[0]


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
    return fa.ops.policy_loss(APA_LOSS, b["logp"], inputs, mask=b["mask"])[0]


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
    "GRPO (dapo), KL": (fused_grpo, {"": plain_grpo}, ("logp",), 3),
    "APA": (fused_apa, {"": plain_apa}, ("logp",), 2),
}


LIGER = Peer("Liger on log-probs", "liger-kernel", liger_grpo)


class Empty(torch.autograd.Function):
    """Takes leaves, returns gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, slopes: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.slopes = slopes
        return leaves[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *ctx.slopes


def loss_of(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def with_backward(f: Callable, b: Batch, leaves: tuple[str, ...]) -> Run:
    given = b | {name: b[name].clone().requires_grad_() for name in leaves}

    def run() -> None:
        torch.autograd.grad(loss_of(f(given)), [given[name] for name in leaves])

    return run


def empty(b: Batch, leaves: tuple[str, ...]) -> Callable[[Batch], Tensor]:
    slopes = [torch.zeros_like(b[name]) for name in leaves]
    return lambda given: Empty.apply(slopes, *(given[name] for name in leaves))


def bench(case: str, n: int, options: Any, n_cases: int) -> tuple[list[dict], dict[str, str]]:
    torch.compiler.reset()  # past a number of shapes it would give up and run eagerly
    fused, plain, leaves, others = CASES[case]
    b = batch(n, options.device)
    passes = 1 if options.device == "cpu" else 3
    size = n * (4 * (len(leaves) + others) + 1 + passes * 4 * len(leaves))
    source, spare = torch.zeros(2, size // 2, dtype=torch.uint8, device=options.device)
    candidates: dict[str, Callable] = {"fastalign": fused}
    for name, f in plain.items():
        candidates[f"eager{name}"] = f
        if "compile" not in options.without:
            candidates[f"torch.compile{name}"] = torch.compile(f)
    absent: dict[str, str] = {}
    if case.startswith("GRPO"):
        loaded, absent = load([LIGER], options.device, options.without)
        candidates |= {rival.peer.name: rival.function for rival in loaded}
    truth = loss_of(
        plain[""]({k: x.double() if x.is_floating_point() else x for k, x in b.items()})
    )
    errors = {name: abs(loss_of(f(b)).item() - truth.item()) for name, f in candidates.items()}
    runs: dict[str, Run] = {"copy (ceiling)": lambda: spare.copy_(source)}
    runs["empty function (floor)"] = with_backward(empty(b, leaves), b, leaves)
    runs |= {name: with_backward(f, b, leaves) for name, f in candidates.items()}
    for run in runs.values():
        run()
    taken = timings(runs, options.device, options.repeats, share(options, n_cases))
    own = taken["fastalign"].median
    return [
        {
            "case": case,
            "tokens": n,
            "what": name,
            "ms": 1e3 * time.median,
            "q1 ms": 1e3 * time.low,
            "q3 ms": 1e3 * time.high,
            "rounds": time.rounds,
            "MB": size / 1e6,
            "GB/s": size / time.median / 1e9,
            "of copy speed": taken["copy (ceiling)"].median / time.median,
            "this / fastalign": time.median / own,
            "error": errors.get(name),
        }
        for name, time in taken.items()
    ], absent


def main() -> None:
    options = arguments(__doc__).parse_args()
    sizes = [shape[0] for shape in options.shapes] if options.shapes else SIZES
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for case in CASES:
        for n in sizes:
            found, missing = bench(case, n, options, len(CASES) * len(sizes))
            rows += found
            absent |= missing
    report(rows, options, {"dtype": "float32", "absent": absent})


if __name__ == "__main__":
    main()
