"""Inputs to test the scans over time with: gae, lambda_returns, vtrace."""

from __future__ import annotations

import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops import gae
from fastalign.testing import assert_no_worse

BACKENDS = ["reference", "cpp", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make_inputs(
    rows: int, steps: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, a mask in runs (turns of a dialogue) and bootstrap values."""
    random = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, steps, generator=random)
    values = 2.0 + torch.randn(rows, steps, generator=random)
    turns = torch.rand(rows, steps // 16 + 1, generator=random) < 0.6
    mask = turns.repeat_interleave(16, dim=1)[:, :steps]
    bootstrap = torch.randn(rows, generator=random)
    return (
        rewards.to(device, dtype),
        values.to(device, dtype),
        mask.to(device),
        bootstrap.to(device),
    )


def to_double(kwargs: dict) -> dict:
    return {
        key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in kwargs.items()
    }


def eager_in_dtype(rewards: Tensor, values: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    """The reference as the eager computation of the same dtype (its carry is float32)."""
    with fa.backend("reference"):
        return gae(rewards, values, **kwargs)


def check_gae(backend: str, rewards: Tensor, values: Tensor, **kwargs) -> None:
    truth = gae(rewards.double(), values.double(), **to_double(kwargs))
    eager = eager_in_dtype(rewards, values, **kwargs)
    with fa.backend(backend):
        got = gae(rewards, values, **kwargs)
    for one, same, true in zip(got, eager, truth, strict=True):
        assert one.dtype == torch.float32 and one.is_contiguous()
        assert_no_worse(one, same, true, rewards.dtype)


def small_blocks(monkeypatch) -> None:
    """Blocks of 16 tokens in chunks of 32, whose maps are composed four at a time."""
    from fastalign.kernels import gae as kernels

    for name, size in [("BLOCK_T", 16), ("CHUNK", 32), ("BLOCK_CHUNKS", 4), ("BLOCK_PARTS", 4)]:
        monkeypatch.setattr(kernels, name, size)
