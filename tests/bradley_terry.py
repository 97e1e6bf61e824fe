"""Scores, margins and bootstrap counts to test with, and how a backend is judged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.bradley_terry_loss import (
    _bradley_terry_loss,
    bradley_terry_loss_reference,
    dgap_reference,
)
from fastalign.testing import assert_no_worse

BACKENDS = ["reference", "cpp", "triton"]

KERNELS = ["cpp", "triton"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make(n: int, heads: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Scores, margins, and how often each head drew each pair (head 0 none)."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margin = (3.0 * torch.randn(3, n, heads, generator=generator)).unbind()
    head_mask = torch.randint(-1, 4, (n, heads), generator=generator)
    head_mask[:, 0] = 0
    inputs = dict(chosen=chosen.to(dtype), rejected=rejected.to(dtype), margin=margin / 10)
    return {name: x.to(device) for name, x in (inputs | {"head_mask": head_mask}).items()}


def compare(backend: str, inputs: dict[str, Any], **settings: Any) -> None:
    """Loss and dL/dgap against the reference in float64 and in the same dtype."""
    names = ("chosen", "rejected", "margin", "offset", "head_mask", "totals", "label_smoothing")
    given: dict[str, Any] = {"margin": None, "offset": 0.0, "head_mask": None, "totals": None}
    given |= {"label_smoothing": 0.0} | inputs | settings
    args = [given[name] for name in names]
    wide: list[Any] = [
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args
    ]
    with fa.backend(backend):
        loss, dgap = _bradley_terry_loss(*args)
    assert loss.dtype == dgap.dtype == torch.float32
    eager = bradley_terry_loss_reference(*args), dgap_reference(*args)
    truth = bradley_terry_loss_reference(*wide), dgap_reference(*wide)
    dtype = given["chosen"].dtype
    assert_no_worse(loss, eager[0], truth[0], dtype)
    # dgap is kept in float32 whatever the inputs.
    assert_no_worse(dgap, eager[1], truth[1], torch.float32, grad=True)
