"""linear_loss and autograd: products, upstream gradients, accumulation, tied weights, gradcheck."""

from __future__ import annotations

import pytest
import torch
from heads import (
    N,
    V,
    gradients,
    likelihood,
    make,
    policy_loss,
    products,
    rows,
)
from torch import Tensor

from fastalign.ops.linear_loss import linear_loss, linear_loss_reference
from fastalign.testing import assert_no_worse, peaked_head


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "slab", "expected"),
    [
        (True, True, None, 3),
        (True, False, None, 2),
        (False, True, None, 2),
        (False, False, None, 1),
        (True, True, 32, 6),  # two slabs
    ],
)
def test_number_of_products(
    hidden_grad: bool, weight_grad: bool, slab: int | None, expected: int
) -> None:
    hidden, weight, targets, inputs = make()
    targets = targets.clamp(min=0)
    h, w = hidden.detach().requires_grad_(hidden_grad), weight.detach().requires_grad_(weight_grad)

    def step() -> None:
        loss = linear_loss(h, w, targets, likelihood, workspace=rows(slab)).loss
        if loss.requires_grad:
            loss.backward()

    assert products(step) == expected


def test_no_gradient_under_no_grad_and_the_same_loss() -> None:
    hidden, weight, targets, inputs = make()
    with torch.no_grad():
        out = linear_loss(hidden, weight, targets, policy_loss, inputs)
    assert not out.loss.requires_grad
    again = linear_loss(hidden, weight, targets, policy_loss, inputs)
    assert torch.equal(out.loss, again.loss) and again.loss.requires_grad
    assert not again.logp.requires_grad and not again.entropy.requires_grad


def test_upstream_gradient_and_retained_graph() -> None:
    hidden, weight, targets, inputs = make()
    loss = linear_loss(hidden, weight, targets, policy_loss, inputs).loss
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    kept = once.clone()
    (thrice,) = torch.autograd.grad(3.0 * loss, weight, retain_graph=True)
    (last,) = torch.autograd.grad(loss, weight)
    assert torch.equal(thrice, 3.0 * kept)
    assert torch.equal(last, kept)
    assert torch.equal(once, kept)


def test_gradient_accumulation_over_micro_batches() -> None:
    """Two halves with the whole batch's normalizer add up to the whole."""
    hidden, weight, targets, inputs = make()
    count = int((targets != -100).sum())
    whole = linear_loss(hidden, weight, targets, policy_loss, inputs)
    want = gradients(whole.loss, hidden, weight)
    hidden.grad = weight.grad = None
    total = 0.0
    for part in (slice(0, 20), slice(20, N)):
        cut = {k: x[part] if isinstance(x, Tensor) and x.dim() else x for k, x in inputs.items()}
        loss = linear_loss(
            hidden[part], weight, targets[part], policy_loss, cut, normalizer=count
        ).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-5)
    for got, true in zip((hidden.grad, weight.grad), want, strict=True):
        assert got is not None
        assert_no_worse(got, true, true.double(), torch.float32, grad=True)


def test_tied_embeddings() -> None:
    """The same weight makes the hidden states and reads them: both gradients add up."""
    _, weight, targets, _ = make(torch.float64)
    tokens = torch.randint(V, (N,))
    results = []
    for fused in (True, False):
        w = weight.detach().clone().requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(tokens, w))
        if fused:
            loss = linear_loss(hidden, w, targets, likelihood, workspace=rows(8, w.dtype)).loss
        else:
            t = torch.ones(1, dtype=torch.float64)
            loss = linear_loss_reference(hidden, w, targets, likelihood, {}, None, t)
        results.append(gradients(loss, w)[0])
    assert_no_worse(results[0], results[1], results[1], torch.float64, grad=True)


def test_second_derivatives_are_refused() -> None:
    hidden, weight, targets, _ = make()
    loss = linear_loss(hidden, weight, targets, likelihood).loss * weight.sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradcheck() -> None:
    hidden, weight, targets = peaked_head(4, 3, 9, dtype=torch.float64)
    targets[1] = -100
    values = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def f(h: Tensor, w: Tensor, v: Tensor) -> Tensor:
        def loss(logp: Tensor, entropy: Tensor, values: Tensor) -> Tensor:
            return logp * values + entropy**2

        return linear_loss(h, w, targets, loss, {"values": v}, softcap=4.0, workspace=2 * 72).loss

    assert torch.autograd.gradcheck(f, (hidden.requires_grad_(), weight.requires_grad_(), values))


def test_a_float16_number_has_its_gradient_summed_wide() -> None:
    """Before it is divided by the number of rows the sum is 190,000, infinite in float16."""
    dtype = torch.float16
    n, vocab, slab = 2048, 7, 64
    hidden, weight = torch.randn(n, 4).to(dtype), torch.randn(vocab, 4).to(dtype)
    targets = torch.arange(n) % vocab
    scale = torch.ones((), dtype=dtype, requires_grad=True)

    def scaled(logp: Tensor, entropy: Tensor, scale: Tensor) -> Tensor:
        return -30.0 * scale * logp

    given = {"scale": scale}
    out = linear_loss(
        hidden, weight, targets, scaled, given, workspace=slab * vocab * dtype.itemsize
    )
    (got,) = gradients(out.loss, scale)
    want = -30.0 * out.logp.double().mean()
    assert got.dtype == dtype and got.item() == pytest.approx(want.item(), rel=2**-8)
