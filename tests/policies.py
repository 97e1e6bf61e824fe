"""Batches of log-probs, losses to test with, and how a call on each backend is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from fastalign.losses import APA, AWR, GRPO, MLE, PPO, ValueLoss
from fastalign.ops.policy_loss import actor_critic_loss, policy_loss
from fastalign.testing import assert_no_worse

CUDA = torch.cuda.is_available()
KERNELS = ["cpp", "triton"]
ALL = ["reference", *KERNELS]
LOSSES: dict[str, Any] = {
    "mle": MLE(),
    "apa": APA(0.7),
    "apa repo": APA(2.0, form="repo"),
    "awr": AWR(0.6, weight_cap=3.0),
    "awr free": AWR(0.6, weight_cap=None),
    "ppo": PPO(),
    "ppo all": PPO(0.3, 0.4, dual_clip=1.6, kl_coef=0.2, entropy_coef=0.1),
    "ppo no lower": PPO(clip=1.5, kl_coef=0.2, kl_kind="k1"),
    "dapo": GRPO("dapo", kl_coef=0.1, kl_kind="k2"),
    "cispo": GRPO("cispo", clip=0.3, clip_high=0.2, kl_coef=0.1, entropy_coef=-0.2),
}
GSPO = GRPO("gspo", clip=0.05, clip_high=0.08, kl_coef=0.1, entropy_coef=0.1)
OFFSETS = [0, 3, 3, 40, 1100, 1301]  # an empty sequence, one past a block of tokens
NAMES = ("logp", "entropy", "advantages", "old_logp", "ref_logp", "values", "returns", "old_values")
Batch = dict[str, Tensor]


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(len(NAMES), *shape, generator=generator)
    made = dict(zip(NAMES, noise, strict=True))
    made["logp"] = -2.0 * noise[0].abs()
    made["old_logp"] = made["logp"] + 0.4 * noise[3]
    made["ref_logp"] = made["logp"] + 0.8 * noise[4]
    made["old_values"] = made["values"] + 0.5 * noise[7]
    return {name: x.to(dtype) for name, x in made.items()}


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and CUDA else "cpu"


def inputs_of(loss: Any, b: Batch) -> dict[str, Any]:
    return {name: b[name] for name in loss.required if name != "cu_seqlens"}


def run(backend: str, f: Callable[[Batch], tuple[Tensor, Mapping]], b: Batch) -> dict[str, Tensor]:
    """loss, statistics and the gradients of logp, entropy and values of f on ``b``."""
    device = device_of(backend)
    given = {name: x.detach().clone().to(device) for name, x in b.items()}
    leaves = {name: given[name].requires_grad_() for name in ("logp", "entropy", "values")}
    with fa.backend(backend):
        loss, statistics = f(given)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {"loss": loss.detach()} | {k: x.detach() for k, x in statistics.items()}
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            found[f"d{name}"] = gradient
    return {name: x.cpu() for name, x in found.items()}


def compare(backend: str, f: Callable[[Batch], tuple[Tensor, Mapping]], b: Batch) -> None:
    kernel, eager = run(backend, f, b), run("reference", f, b)
    truth = run(
        "reference", f, {k: x.double() if x.is_floating_point() else x for k, x in b.items()}
    )
    assert set(kernel) == set(eager) == set(truth)
    for name, true in truth.items():
        grad = name in ("dlogp", "dentropy", "dvalues")
        assert_no_worse(kernel[name], eager[name], true, torch.float32, grad=grad)


def call(loss: Any, **options: Any) -> Callable[[Batch], tuple[Tensor, Mapping]]:
    """policy_loss on a batch; with an entropy and both other log-probs for the statistics."""

    def f(b: Batch) -> tuple[Tensor, Mapping]:
        others = {name: b[name] for name in ("old_logp", "ref_logp")}
        moved = {k: x.to(b["logp"].device) for k, x in options.items() if isinstance(x, Tensor)}
        return policy_loss(
            loss, b["logp"], inputs_of(loss, b) | others, entropy=b["entropy"], **options | moved
        )

    return f


def critic(
    loss: Any, clip: float | None, **options: Any
) -> Callable[[Batch], tuple[Tensor, Mapping]]:
    def f(b: Batch) -> tuple[Tensor, Mapping]:
        moved = {k: x.to(b["logp"].device) for k, x in options.items() if isinstance(x, Tensor)}
        return actor_critic_loss(
            loss,
            b["logp"],
            inputs_of(loss, b),
            b["values"],
            b["returns"],
            old_values=b["old_values"],
            value_loss=ValueLoss(clip),
            vf_coef=0.3,
            entropy=b["entropy"],
            **options | moved,
        )

    return f
