"""Small loss heads to test with: hidden states, weight, targets, and losses on all inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.linear_logprobs import linear_logprobs
from fastalign.testing import peaked_head

N, H, V = 37, 24, 203
GROUPS = torch.tensor([0, 6, 6, 21, 25, 37])


def policy_loss(
    logp: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    old_logp: Tensor,
    values: Tensor,
    returns: Tensor,
    clip: float,
    cost: Tensor,
) -> Tensor:
    """PPO's clipped loss, an entropy bonus and a value loss: every input of linear_loss at work."""
    ratio = (logp - old_logp).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -gain - cost * entropy + 0.5 * (values - returns) ** 2


def likelihood(logp: Tensor, entropy: Tensor) -> Tensor:
    return -logp


def pair_loss(logp: Tensor, entropy: Tensor, sign: Tensor, cu_seqlens: Tensor) -> Tensor:
    """DPO without a reference: one group holds a preferred (+1) and a rejected (-1) answer."""
    margin = segment_sum(logp * sign, cu_seqlens)
    return -torch.nn.functional.logsigmoid(0.1 * margin)


def segment_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    lengths = cu_seqlens.diff()
    group = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
    return torch.zeros(len(lengths), dtype=x.dtype, device=x.device).index_add(0, group, x)


def make(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """hidden, weight, targets (every fifth ignored) and the inputs of ``policy_loss``."""
    hidden, weight, targets = peaked_head(N, H, V, dtype=dtype, device=device)
    targets[::5] = -100
    generator = torch.Generator().manual_seed(3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    draw = [torch.randn(N, generator=generator).to(device, wide) for _ in range(4)]
    with torch.no_grad():
        old_logp = linear_logprobs(hidden, weight, targets) + 0.2 * draw[1]
    inputs = {
        "advantages": draw[0],
        "old_logp": old_logp,
        "values": draw[2].requires_grad_(),
        "returns": draw[3],
        "clip": 0.2,
        "cost": torch.tensor(0.01, device=device, dtype=wide, requires_grad=True),
    }
    return hidden.requires_grad_(), weight.requires_grad_(), targets, inputs


def rows(count: int | None, dtype: torch.dtype = torch.float32) -> int | None:
    return count and count * V * dtype.itemsize


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


def products(f: Any) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))
