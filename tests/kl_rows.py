"""Rows of logits of two models to test with, and how token_kl's backends are judged on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.token_kl import (
    kl_dlogits,
    kl_stats,
)
from fastalign.testing import adversarial_logits, assert_no_worse

CUDA = torch.cuda.is_available()
KERNELS = ["cpp", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and CUDA else "cpu"


def reference_of(logits: Tensor, seed: int = 11) -> Tensor:
    """Another model's logits: like these, with noise and some tokens quite different."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(logits.shape, generator=generator)
    far = torch.rand(logits.shape, generator=generator) < 0.02
    return (logits.float() + torch.where(far, 6.0 * noise, 0.3 * noise)).to(logits.dtype)


def against_all(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One adversarial case as the policy, once with each of the cases as the reference."""
    cases = adversarial_logits(75, dtype)
    logits, targets = cases[name]
    ref_logits = torch.cat([ref for ref, _ in cases.values()])
    return logits.repeat(len(cases), 1), ref_logits, targets.repeat(len(cases))


def for_backward(stats: Any) -> list[Tensor]:
    """What kl_dlogits wants of the statistics: all but ref_logp."""
    return [*stats[:5], *stats[6:]]


def run(
    backend: str,
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float = 0.0,
    with_entropy: bool = True,
) -> list[Tensor]:
    """logp, entropy, kl, ref_logp, and the gradient of sum(g logp + e entropy + k kl)."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(7)
    g, e, k = torch.randn(3, len(targets), generator=generator)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x, r, y = (v.to(device) for v in (logits, ref_logits, targets))
    t, g, e, k = (v.to(device, wide) for v in (temperature, g, e, k))
    with fa.backend(backend):
        stats = kl_stats(x, r, y, t, softcap, -100)
        e_or_none = e if with_entropy else None
        dx = kl_dlogits(g, e_or_none, k, x, r, y, t, softcap, -100, for_backward(stats))
    assert all(x.dtype == wide and x.shape == targets.shape for x in stats)
    return [v.cpu() for v in (stats[0], stats[1], stats[4], stats[5], dx)]


def compare(
    backend: str, logits: Tensor, ref_logits: Tensor, targets: Tensor, temperature: Tensor, *args
) -> None:
    rest = (targets, temperature, *args)
    kernel = run(backend, logits, ref_logits, *rest)
    eager = run("reference", logits, ref_logits, *rest)
    truth = run("reference", logits.double(), ref_logits.double(), *rest)
    for index, (got, plain, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        assert_no_worse(got, plain, true, logits.dtype, grad=index == 4)
