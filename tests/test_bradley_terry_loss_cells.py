"""Which cells the Bradley-Terry loss counts, and how often: masks, NaN, extremes, views, none."""

from __future__ import annotations

import pytest
import torch
from bradley_terry import BACKENDS, KERNELS, compare, device_of, make
from torch import Tensor

import fastalign as fa
from fastalign.ops.bradley_terry_loss import bradley_terry_loss
from fastalign.testing import TOLERANCES, assert_no_worse


def test_a_pair_drawn_twice_counts_twice() -> None:
    """Head 0 draws pair 0 twice and pair 1 once: (2 log(1 + e^-1) + log 2) / 3 = .439890."""
    chosen, rejected = torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1)
    loss = bradley_terry_loss(chosen, rejected, head_mask=torch.tensor([[2], [1]]))
    assert round(loss.item(), 6) == 0.43989


def test_full_mask_is_no_mask() -> None:
    chosen, rejected = torch.randn(9, 4).double(), torch.randn(9, 4).double()
    masked = bradley_terry_loss(chosen, rejected, head_mask=torch.ones(9, 4).bool())
    plain = bradley_terry_loss(chosen, rejected)
    assert abs(float(masked - plain)) <= TOLERANCES[torch.float64].floor


@pytest.mark.parametrize("size", [1e4, 200.0, float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_gaps(backend: str, size: float) -> None:
    """-log sigmoid(g) is 0 for a huge gap and -g for a hugely negative one; gradients 0 and -1."""
    device = device_of(backend)
    chosen = torch.tensor([[size], [-size]], device=device, requires_grad=True)
    with fa.backend(backend):
        loss = bradley_terry_loss(chosen, torch.zeros(2, 1, device=device))
    assert loss.item() == size / 2
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert gradient.tolist() == [[0.0], [-0.5]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_masked_cells_does_not_leak(backend: str) -> None:
    chosen, rejected = torch.randn(2, 6, 2, device=device_of(backend))
    head_mask = torch.rand(6, 2, device=chosen.device) < 0.5
    head_mask[0] = True
    losses, gradients = [], []
    for fill in (0.0, float("nan"), float("inf")):
        leaf = chosen.masked_fill(~head_mask, fill).requires_grad_()
        with fa.backend(backend):
            loss = bradley_terry_loss(leaf, rejected, head_mask=head_mask)
        (gradient,) = torch.autograd.grad(loss, leaf)
        losses.append(loss.item())
        gradients.append(gradient)
    assert losses[0] == losses[1] == losses[2] > 0.0
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert gradients[0][~head_mask].tolist() == [0.0] * int((~head_mask).sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_cell_that_counts_is_seen(backend: str) -> None:
    chosen = torch.randn(6, 2, device=device_of(backend))
    chosen[4, 1] = float("nan")
    chosen.requires_grad_()
    with fa.backend(backend):
        loss = bradley_terry_loss(chosen, torch.zeros_like(chosen))
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert loss.isnan() and gradient[4, 1].isnan() and int(gradient.isnan().sum()) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_kept_is_zero_with_a_gradient(backend: str) -> None:
    device = device_of(backend)
    empty = torch.empty(0, 3, device=device, requires_grad=True)
    with fa.backend(backend):
        loss = bradley_terry_loss(empty, empty.detach())
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, empty)
    assert gradient.shape == (0, 3)
    full = torch.randn(4, 3, device=device, requires_grad=True)
    head_mask = torch.zeros(4, 3, device=device).bool()
    with fa.backend(backend):
        masked = bradley_terry_loss(full, full.detach(), head_mask=head_mask)
    assert masked.item() == 0.0
    (gradient,) = torch.autograd.grad(masked, full)
    assert gradient.tolist() == [[0.0] * 3] * 4


def test_gradient_and_non_contiguous() -> None:
    chosen = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    rejected = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    margin = torch.rand(5, dtype=torch.float64, requires_grad=True)
    head_mask = torch.rand(5, 3) < 0.6

    def loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        return bradley_terry_loss(chosen.t(), rejected[:, ::2], margin=margin, head_mask=head_mask)

    assert torch.autograd.gradcheck(loss, (chosen, rejected, margin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_margins_and_totals_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    scores = torch.randn(4, 2, device=device_of(backend))
    margin = torch.tensor([1, 0, 2, 3], device=scores.device)
    totals = torch.tensor([3, 7], device=scores.device)
    with fa.backend(backend):
        found, wanted = (
            bradley_terry_loss(scores, -scores, margin=margin.to(d), totals=totals.to(d))
            for d in (dtype, torch.float32)
        )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_tensor_may_be_a_view(backend: str) -> None:
    inputs = make(10, 8, torch.float32, device_of(backend))
    views = {name: x[::2, 1:7:2] for name, x in inputs.items()}
    views["rejected"] = views["rejected"].t().contiguous().t()
    views["totals"] = torch.arange(2.0, 8.0, device=device_of(backend))[::2]
    results = []
    for given in (views, {name: x.contiguous() for name, x in views.items()}):
        leaves = [given[name].requires_grad_() for name in ("chosen", "rejected", "margin")]
        with fa.backend(backend):
            loss = bradley_terry_loss(
                *leaves[:2],
                margin=leaves[2],
                head_mask=given["head_mask"],
                totals=given["totals"],
                label_smoothing=0.1,
            )
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert results[0][0] > 0.0


def test_gradients_have_the_dtypes_of_their_inputs() -> None:
    chosen = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    rejected = torch.randn(4, 3, requires_grad=True)
    margin = torch.rand(4, dtype=torch.float16, requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected, margin=margin)
    gradients = torch.autograd.grad(loss, (chosen, rejected, margin))
    assert [x.dtype for x in gradients] == [torch.bfloat16, torch.float32, torch.float16]
    want = gradients[1].sum(1)
    assert_no_worse(gradients[2], want.half(), want.double(), torch.float16, grad=True)


INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_counts_of_any_integer_dtype(backend: str, dtype: torch.dtype) -> None:
    """In C++: counts that several tasks add up, a number of heads that no register holds."""
    inputs = make(9001 if backend == "cpp" else 11, 7, torch.float32, device_of(backend))
    if not dtype.is_signed:
        inputs["head_mask"].clamp_(min=0)
    compare(backend, inputs | {"head_mask": inputs["head_mask"].to(dtype)})


@pytest.mark.parametrize("backend", KERNELS)
def test_counts_past_the_range_of_int32(backend: str) -> None:
    """Head 0 drew its pairs 3e9 times in all: (2e9 log(1 + e^-1) + 1e9 log 2) / 3e9 = .439890."""
    device = device_of(backend)
    chosen, rejected = torch.tensor([[1.0], [0.0]]).to(device), torch.zeros(2, 1, device=device)
    head_mask = torch.tensor([[2_000_000_000], [1_000_000_000]], device=device)
    with fa.backend(backend):
        loss = bradley_terry_loss(chosen, rejected, head_mask=head_mask)
    assert round(loss.item(), 6) == 0.43989


def test_a_second_derivative_is_an_error() -> None:
    """dL/dgap is a constant to autograd: the slope of a gradient would lack that of dL/dgap."""
    chosen = torch.randn(4, 3, requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(4, 3)).square()
    (gradient,) = torch.autograd.grad(loss, chosen, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
