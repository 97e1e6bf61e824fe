"""Whitening: published vector, hand-worked rows, degenerate counts, NaN in masked cells."""

from __future__ import annotations

import pytest
import torch

from fastalign.ops.whiten import whiten, whiten_reference
from fastalign.testing import TOLERANCES, assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_published_batch() -> None:
    """GAE advantages of the batch in test_gae.py; the padded 0 counts, as in the authors' code."""
    x = torch.tensor([[0.82675, 0.765, 0.7], [-0.48, -0.4, 0.0]], dtype=torch.float64)
    assert [[round(y, 6) for y in row] for row in whiten(x).tolist()] == [
        [0.981150, 0.878715, 0.770889],
        [-1.186573, -1.053864, -0.390317],
    ]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_worked_by_hand(shift_mean: bool) -> None:
    """Kept cells 1, 3, 5, 7: mean 4, squares 9 + 1 + 1 + 9 = 20, variance 20 / 3 = 6.666667,
    standard deviation 2.581989; y = -3/2.581989 = -1.161895, -1/2.581989 = -.387298, and back.
    """
    x = torch.tensor([1.0, 100.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 1])
    if shift_mean:
        want = [-1.161895, 0.0, -0.387298, 0.387298, 1.161895]
    else:
        want = [2.838105, 0.0, 3.612702, 4.387298, 5.161895]
    assert [round(y, 6) for y in whiten(x, mask, shift_mean=shift_mean).tolist()] == want


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_no_worse_than_eager(dtype: torch.dtype, shift_mean: bool, masked: bool) -> None:
    """Eager: the textbook line in float32 on the kept cells alone."""
    x = (100.0 + torch.randn(31, 17)).to(dtype)
    mask = torch.rand(31, 17) < 0.7 if masked else torch.ones(31, 17, dtype=torch.bool)
    truth = whiten(x.double(), mask, shift_mean=shift_mean)
    kept = x[mask].float()
    eager = torch.zeros(31, 17)
    eager[mask] = (kept - kept.mean()) * torch.rsqrt(kept.var() + 1e-8)
    if not shift_mean:
        eager[mask] += kept.mean()
    got = whiten(x, mask if masked else None, shift_mean=shift_mean)
    assert got.dtype == torch.float32
    assert_no_worse(got, eager, truth, dtype)


def test_moments_come_out_as_promised() -> None:
    x = 5.0 + 3.0 * torch.randn(64, 9, dtype=torch.float64)
    mask = torch.rand(64, 9) < 0.5
    floor = TOLERANCES[torch.float64].floor
    y = whiten(x, mask)[mask]
    # eps = 1e-8 beside a variance of 9 takes 1e-9 / 2 off the deviation.
    assert abs(float(y.mean())) <= floor
    assert abs(float(y.var()) - float(x[mask].var() / (x[mask].var() + 1e-8))) <= floor
    kept_mean = whiten(x, mask, shift_mean=False)[mask].mean()
    assert abs(float(kept_mean - x[mask].mean())) <= floor


def test_zero_and_one_kept_cell() -> None:
    x = torch.tensor([[3.0, -2.0]])
    none = torch.zeros(1, 2, dtype=torch.bool)
    one = torch.tensor([[False, True]])
    for shift_mean in (True, False):
        assert whiten(x, none, shift_mean=shift_mean).tolist() == [[0.0, 0.0]]
        assert whiten(torch.empty(0, 4), shift_mean=shift_mean).shape == (0, 4)
    assert whiten(x, one).tolist() == [[0.0, 0.0]]
    assert whiten(x, one, shift_mean=False).tolist() == [[0.0, -2.0]]
    assert whiten(torch.full((3, 3), 7.0)).tolist() == [[0.0] * 3] * 3  # no spread


@pytest.mark.parametrize("value", [0.1, 3.7, 10000.1, -1e6 / 3])
@pytest.mark.parametrize("count", [2, 7, 1000, 4097])
def test_equal_cells_come_out_as_zero(count: int, value: float) -> None:
    """The rounding of their mean, one part in 2^24 of it, is not taken for spread."""
    largest = whiten(torch.full((count,), value)).abs().max().item()
    assert largest <= TOLERANCES[torch.float32].floor


def test_nan_in_masked_cells_does_not_leak() -> None:
    x = torch.randn(5, 6)
    mask = torch.rand(5, 6) < 0.5
    dirty = x.masked_fill(~mask, float("nan")).requires_grad_()
    clean = x.masked_fill(~mask, 0.0).requires_grad_()
    upstream = torch.randn(5, 6)
    for tensor in (dirty, clean):
        whiten(tensor, mask).backward(upstream)
    assert torch.equal(whiten(dirty, mask), whiten(clean, mask))
    assert dirty.grad is not None and clean.grad is not None
    assert torch.equal(dirty.grad, clean.grad)
    assert dirty.grad[~mask].tolist() == [0.0] * int((~mask).sum())


def test_non_contiguous_input() -> None:
    x = torch.randn(7, 12)
    mask = torch.rand(12, 7) < 0.5
    got = whiten(x.t()[::2], mask[::2])
    assert torch.equal(got, whiten(x.t()[::2].contiguous(), mask[::2].contiguous()))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_gradient(shift_mean: bool) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 5) < 0.7
    assert torch.autograd.gradcheck(lambda x: whiten(x, mask, shift_mean=shift_mean), (x,))


def test_opcheck_and_compile() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    mask = torch.rand(4, 5) < 0.7
    for args in [(x, None, True), (x, mask, False)]:
        torch.library.opcheck(torch.ops.fastalign.whiten.default, args)
    compiled = torch.compile(whiten, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, mask), whiten_reference(x, mask, True))


@pytest.mark.parametrize(
    "x, mask, message",
    [
        (torch.zeros(2, 3), torch.ones(3, 2).bool(), r"whiten: .*\(2, 3\), got \(3, 2\)"),
        (torch.zeros(2), torch.ones(2), "whiten: .*bool or integer mask, got torch.float32"),
        (torch.zeros(2).long(), None, "whiten: .*floating dtype, got torch.int64"),
        (torch.zeros(2), torch.ones(2).bool().to("meta"), "whiten: .*device of x, cpu, got meta"),
    ],
)
def test_bad_input(x: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whiten(x, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_equals_cpu(dtype: torch.dtype) -> None:
    x = (5.0 + torch.randn(300, 70)).to(dtype)
    mask = torch.rand(300, 70) < 0.5
    truth = whiten(x.double(), mask)
    assert_no_worse(whiten(x.cuda(), mask.cuda()).cpu(), whiten(x, mask), truth, dtype)
