"""Bradley-Terry loss: published values, head masks, extreme gaps, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastalign.ops.bradley_terry_loss import bradley_terry_loss
from fastalign.testing import TOLERANCES, assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("margin, want", [(None, 0.341153875), (0.5, 0.513015252)])
def test_published_values(margin: float | None, want: float) -> None:
    """Gap 1.3 - .4 = .9: log(1 + e^-.9) = .341153875; with margin .5: log(1 + e^-.4)."""
    chosen = torch.tensor([[1.3]], dtype=torch.float64)
    rejected = torch.tensor([[0.4]], dtype=torch.float64)
    assert round(float(bradley_terry_loss(chosen, rejected, margin=margin)), 9) == want


def test_mean_over_pairs_then_heads() -> None:
    """Gaps of 0 cost log 2 = .693147 each; head 0 keeps pairs 0 and 1, head 1 pair 2, head 2 none.

    Head 0: (log(1 + e^-1) + log 2) / 2 = (.313262 + .693147) / 2 = .503204
    Head 1: log(1 + e^2) = 2.126928; head 2: 0. Loss = (.503204 + 2.126928 + 0) / 3 = .876711
    """
    gap = torch.tensor([[1.0, 9.0, 9.0], [0.0, 9.0, 9.0], [9.0, -2.0, 9.0]], dtype=torch.float64)
    head_mask = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0]])
    chosen = gap.clone().requires_grad_()
    loss = bradley_terry_loss(chosen, torch.zeros_like(gap), head_mask=head_mask)
    assert round(loss.item(), 6) == 0.876711
    (gradient,) = torch.autograd.grad(loss, chosen)
    # -sigmoid(-gap) / pairs of the head / 3 heads
    assert [round(x, 6) for x in gradient[:, 0].tolist()] == [-0.044824, -0.083333, 0.0]
    assert [round(x, 6) for x in gradient[:, 1].tolist()] == [0.0, 0.0, -0.293599]
    assert gradient[:, 2].tolist() == [0.0, 0.0, 0.0]


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


@pytest.mark.parametrize("size", [1e4, 200.0])
def test_extreme_gaps(size: float) -> None:
    """-log sigmoid(g) is 0 for a huge gap and -g for a hugely negative one; gradients 0 and -1."""
    chosen = torch.tensor([[size], [-size]], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2, 1))
    assert loss.item() == size / 2
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert gradient.tolist() == [[0.0], [-0.5]]


@pytest.mark.parametrize("kind", ["none", "float", "pair", "cell"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_no_worse_than_eager(dtype: torch.dtype, kind: str) -> None:
    chosen, rejected = torch.randn(60, 3).to(dtype), torch.randn(60, 3).to(dtype)
    pair, cell = torch.rand(60), torch.rand(60, 3)
    margin, minus = {
        "none": (None, torch.zeros(())),
        "float": (0.25, torch.tensor(0.25)),
        "pair": (pair, pair[:, None]),
        "cell": (cell, cell),
    }[kind]
    gap = chosen.double() - rejected.double() - minus
    truth = torch.log1p(torch.exp(-gap)).mean()
    eager = -torch.sigmoid(gap.float()).log().mean()
    got = bradley_terry_loss(chosen, rejected, margin=margin)
    assert got.shape == () and got.dtype == torch.float32
    assert_no_worse(got, eager, truth, dtype)


def test_nan_in_masked_cells_does_not_leak() -> None:
    chosen, rejected = torch.randn(6, 2), torch.randn(6, 2)
    head_mask = torch.rand(6, 2) < 0.5
    head_mask[0] = True
    losses, gradients = [], []
    for fill in (0.0, float("nan"), float("inf")):
        leaf = chosen.masked_fill(~head_mask, fill).requires_grad_()
        loss = bradley_terry_loss(leaf, rejected, head_mask=head_mask)
        (gradient,) = torch.autograd.grad(loss, leaf)
        losses.append(loss.item())
        gradients.append(gradient)
    assert losses[0] == losses[1] == losses[2] > 0.0
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert gradients[0][~head_mask].tolist() == [0.0] * int((~head_mask).sum())


def test_nothing_kept_is_zero_with_a_gradient() -> None:
    empty = torch.empty(0, 3, requires_grad=True)
    loss = bradley_terry_loss(empty, torch.empty(0, 3))
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, empty)
    assert gradient.shape == (0, 3)
    full = torch.randn(4, 3, requires_grad=True)
    masked = bradley_terry_loss(full, full.detach(), head_mask=torch.zeros(4, 3).bool())
    assert masked.item() == 0.0
    (gradient,) = torch.autograd.grad(masked, full)
    assert gradient.tolist() == [[0.0] * 3] * 4


def test_heads_fit_the_ranking_they_are_shown() -> None:
    """Both heads see one preference, in opposite directions: the loss moves their scores apart."""
    scores = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)  # response x head
    for _ in range(50):
        gap = scores[0] - scores[1]
        loss = bradley_terry_loss(
            torch.stack([gap[0], -gap[1]])[None], torch.zeros(1, 2, dtype=torch.float64)
        )
        (gradient,) = torch.autograd.grad(loss, scores)
        with torch.no_grad():
            scores -= gradient
    assert scores[0, 0] > 1.0 > -1.0 > scores[0, 1]
    assert loss.item() < math.log(2.0) / 5


def test_gradient_and_non_contiguous() -> None:
    chosen = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    rejected = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    margin = torch.rand(5, dtype=torch.float64, requires_grad=True)
    head_mask = torch.rand(5, 3) < 0.6

    def loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        return bradley_terry_loss(chosen.t(), rejected[:, ::2], margin=margin, head_mask=head_mask)

    assert torch.autograd.gradcheck(loss, (chosen, rejected, margin))


def test_opcheck_and_compile() -> None:
    chosen, rejected = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    margin, head_mask = torch.rand(4, 1), torch.rand(4, 3) < 0.5
    op = torch.ops.fastalign.bradley_terry_loss.default
    for args in [(chosen, rejected, None, None), (chosen, rejected, margin, head_mask)]:
        torch.library.opcheck(op, args)

    def loss(chosen: Tensor) -> Tensor:
        return bradley_terry_loss(chosen, rejected, margin=0.5, head_mask=head_mask)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(chosen), loss(chosen))


S = torch.zeros(4, 2)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((S, S[:3]), {}, r"\[B, K >= 1\], got \(4, 2\) and \(3, 2\)"),
        ((S[:, 0], S[:, 0]), {}, r"got \(4,\) and \(4,\)"),
        ((S[:, :0], S[:, :0]), {}, r"got \(4, 0\) and \(4, 0\)"),
        ((S.long(), S), {}, "chosen of a floating dtype, got torch.int64"),
        ((S, S), {"margin": torch.zeros(2)}, r"\[B\] or \[B, K\] for \(4, 2\), got \(2,\)"),
        ((S, S), {"head_mask": S}, r"bool or integer head_mask \(4, 2\), got \(4, 2\) torch.float"),
        ((S, S), {"head_mask": torch.ones(4).bool()}, r"\(4, 2\), got \(4,\) torch.bool"),
        ((S, S.to("meta")), {}, "rejected on the device of chosen, cpu, got meta"),
    ],
)
def test_bad_input(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match="bradley_terry_loss: .*" + message):
        bradley_terry_loss(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_equals_cpu(dtype: torch.dtype) -> None:
    chosen, rejected = torch.randn(500, 3).to(dtype), torch.randn(500, 3).to(dtype)
    truth = bradley_terry_loss(chosen.double(), rejected.double())
    got = bradley_terry_loss(chosen.cuda(), rejected.cuda()).cpu()
    assert_no_worse(got, bradley_terry_loss(chosen, rejected), truth, dtype)
