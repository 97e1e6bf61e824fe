"""How exact the loss head is: beside float64 and the honest computation in the same dtype.

The honest computation makes the logits in the input's dtype, as any model does, and everything
after them in float32. Its errors come from rounding the logits, dlogits and results once; a head
that does no worse than 1.1 times that has no rounding of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import gradients
from torch import Tensor

from fastalign import losses
from fastalign.ops import linear_logprobs, linear_loss
from fastalign.testing import assert_no_worse, peaked_head

N, H, V = 1024, 64, 4_099
DTYPES = [torch.bfloat16, torch.float16]


def loss_of(logp: Tensor, entropy: Tensor, factors: Tensor) -> Tensor:
    return factors * logp - 0.1 * entropy


def honest(hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor) -> dict[str, Tensor]:
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    z = h @ w.t()
    log_p = torch.log_softmax(z.to(torch.promote_types(z.dtype, torch.float32)), -1)
    logp = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    dh, dw = gradients(loss_of(logp, entropy, factors.to(logp.dtype)).sum(), h, w)
    return {"logp": logp.detach(), "entropy": entropy.detach(), "dhidden": dh, "dweight": dw}


def fused(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, slab: int | None
) -> dict[str, Tensor]:
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    workspace = slab and slab * V * h.element_size()
    out = linear_loss(
        h, w, targets, loss_of, {"factors": factors}, normalizer=1.0, workspace=workspace
    )
    dh, dw = gradients(out.loss, h, w)
    return {"logp": out.logp, "entropy": out.entropy, "dhidden": dh, "dweight": dw}


def differentiable_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, slab: int | None
) -> dict[str, Tensor]:
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    workspace = slab and slab * V * h.element_size()
    logp, entropy = linear_logprobs(h, w, targets, return_entropy=True, workspace=workspace)
    dh, dw = gradients(loss_of(logp, entropy, factors).sum(), h, w)
    return {"logp": logp.detach(), "entropy": entropy.detach(), "dhidden": dh, "dweight": dw}


def rms(x: Tensor, truth: Tensor) -> float:
    return (x.double() - truth).square().mean().sqrt().item()


@pytest.mark.parametrize("slab", [None, 128], ids=["1 slab", "8 slabs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [fused, differentiable_op])
def test_no_rounding_of_its_own(op: Any, dtype: torch.dtype, slab: int | None) -> None:
    hidden, weight, targets = peaked_head(N, H, V, dtype=dtype)
    factors = torch.randn(N, generator=torch.Generator().manual_seed(5))
    truth = honest(hidden.double(), weight.double(), targets, factors)
    plain = honest(hidden, weight, targets, factors)
    own = op(hidden, weight, targets, factors, slab)
    for name, true in truth.items():
        ours, theirs = rms(own[name], true), rms(plain[name], true)
        assert theirs > 0
        assert ours <= 1.1 * theirs, f"{name}: {ours:.3g} against {theirs:.3g}"


@pytest.mark.parametrize("slab", [None, 128], ids=["4 slabs", "8 slabs"])
@pytest.mark.parametrize("op", [fused, differentiable_op])
def test_float32_is_within_twice_eagers_error(op: Any, slab: int | None) -> None:
    hidden, weight, targets = peaked_head(N, H, V)
    factors = torch.randn(N, generator=torch.Generator().manual_seed(5))
    truth = honest(hidden.double(), weight.double(), targets, factors)
    plain = honest(hidden, weight, targets, factors)
    own = op(hidden, weight, targets, factors, slab)
    for name, true in truth.items():
        ours, theirs = rms(own[name], true), rms(plain[name], true)
        assert ours <= 2.0 * theirs, f"{name}: {ours:.3g} against {theirs:.3g}"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_the_weights_gradient_does_not_wear_with_the_number_of_slabs(dtype: torch.dtype) -> None:
    """All targets and factors alike, so that the parts of dW add up instead of cancelling: sums
    rounded to the input's dtype after each slab would lose most of the last ones."""
    hidden, weight, _ = peaked_head(N, H, V, dtype=dtype)
    targets = torch.arange(N) % 7
    factors = torch.ones(N)
    true = honest(hidden.double(), weight.double(), targets, factors)["dweight"]
    one = rms(fused(hidden, weight, targets, factors, N)["dweight"], true)
    many = rms(fused(hidden, weight, targets, factors, N // 32)["dweight"], true)
    assert many <= 1.05 * one


@pytest.mark.parametrize("into_buffer", [False, True], ids=["returned", "buffer"])
@pytest.mark.parametrize("slab", [None, 512], ids=["1 slab", "4 slabs"])
def test_a_mean_in_float16_under_a_gradient_scaler(slab: int | None, into_buffer: bool) -> None:
    """dlogits over the number of tokens would underflow before the scaler could multiply them."""
    n, scaler = 2048, 65536.0
    hidden, weight, targets = peaked_head(n, H, V, dtype=torch.float16)
    workspace = slab and slab * V * 2

    def mean(logp: Tensor) -> Tensor:
        return -logp.sum() / n

    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    true = gradients(mean(linear_logprobs(h, w, targets)), h, w)
    h, w = (x.clone().requires_grad_() for x in (hidden, weight))
    plain = gradients(scaler * mean(linear_logprobs(h, w, targets)), h, w)
    buffer = torch.zeros(V, H) if into_buffer else None
    out = linear_loss(
        h,
        w,
        targets,
        losses.MLE(),
        normalizer=n / scaler if into_buffer else None,
        weight_grad=buffer,
        workspace=workspace,
    )
    if buffer is not None:
        own = [*gradients(out.loss, h), buffer]
    else:
        own = gradients(scaler * out.loss, h, w)
    for got, theirs, want in zip(own, plain, true, strict=True):
        assert rms(got, scaler * want) <= 1.1 * rms(theirs, scaler * want)


def adversarial() -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (weight, bias): logits of the kinds that have broken published kernels."""
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(6)) / H**0.5
    zero = torch.zeros(V)
    return {
        "shifted by -120": (weight, zero - 120.0),
        "shifted by +1e4": (weight, zero + 1e4),
        "shifted by -1e4": (weight, zero - 1e4),
        "ties": (torch.zeros(V, H), torch.arange(V).remainder(3.0)),
        "all equal": (torch.zeros(V, H), zero + 3.0),
        "one certain token": (weight, zero.index_fill(0, torch.tensor([5]), 60.0)),
        "columns at -inf": (weight, zero.index_fill(0, torch.arange(9, V), float("-inf"))),
    }


@pytest.mark.parametrize("slab", [None, 16], ids=["1 slab", "4 slabs"])
@pytest.mark.parametrize("name", adversarial())
def test_adversarial_logits(name: str, slab: int | None) -> None:
    weight, bias = adversarial()[name]
    n = 64
    hidden = torch.randn(n, H, generator=torch.Generator().manual_seed(7))
    targets = torch.arange(n) % 9
    factors = torch.linspace(-1, 1, n)

    def whole(dtype: torch.dtype) -> list[Tensor]:
        h, w, b = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
        log_p = torch.log_softmax(torch.nn.functional.linear(h, w, b), -1)
        logp = log_p.gather(1, targets[:, None])[:, 0]
        p = log_p.exp()
        entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
        grads = gradients(loss_of(logp, entropy, factors.to(dtype)).sum(), h, w, b)
        return [logp.detach(), entropy.detach(), *grads]

    h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
    out = linear_loss(
        h,
        w,
        targets,
        loss_of,
        {"factors": factors},
        bias=b,
        normalizer=1.0,
        workspace=slab and slab * V * 4,
    )
    own = [out.logp, out.entropy, *gradients(out.loss, h, w, b)]
    for i, (got, eager, true) in enumerate(
        zip(own, whole(torch.float32), whole(torch.float64), strict=True)
    ):
        assert_no_worse(got, eager, true, torch.float32, grad=i > 1)
