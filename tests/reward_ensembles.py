"""Hidden states, heads and samples to test with, and how a backend is judged."""

from __future__ import annotations

import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.reward_heads import _reward_heads, _reward_heads_backward
from fastalign.testing import assert_no_worse

BACKENDS = ["reference", "cpp", "triton"]

KERNELS = ["cpp", "triton"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make(
    rows: int, samples: int, width: int, heads: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weights (a row of which is of length 1), biases, and rows drawn with
    replacement."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(heads, width, generator=generator) / width**0.5
    bias = torch.randn(heads, generator=generator)
    index = torch.randint(rows, (samples,), generator=generator)
    hidden, weight, bias = (x.to(device, dtype) for x in (hidden, weight, bias))
    return hidden, weight, bias, index.to(device)


def run(backend: str, inputs: tuple, reduce: str, gradients: tuple | None = None) -> list[Tensor]:
    """Scores, statistic and std, then the gradients of hidden, weight and bias."""
    hidden, weight, bias, index = inputs
    wide = torch.promote_types(hidden.dtype, torch.float32)
    n = len(hidden) if index is None else len(index)
    generator = torch.Generator().manual_seed(7)
    g = [torch.randn(*size, generator=generator) for size in [(n, len(weight)), (n,), (n,)]]
    g = [x.to(hidden.device, wide) for x in g] if gradients is None else list(gradients)
    with fa.backend(backend):
        out = _reward_heads(hidden, weight, bias, index, reduce, 0.7)
        rest = (hidden, weight, index, out[0], reduce, 0.7, True, True)
        return [*out, *_reward_heads_backward(*g, *rest)]


def compare(backend: str, inputs: tuple, reduce: str = "lcb") -> None:
    hidden, weight, bias, index = inputs
    truth = run("reference", (*(x.double() for x in inputs[:3]), index), reduce)
    eager = run("reference", inputs, reduce)
    kernel = run(backend, inputs, reduce)
    # The gradients of the kernel are those at its own scores; the spread is smooth in these.
    for place, (got, plain, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        assert got.dtype == plain.dtype
        assert_no_worse(got, plain, true, hidden.dtype, grad=place > 2)
