"""Whitening: published vector, hand-worked rows, three backends against float64, degenerate counts,
NaN in masked cells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.whiten import (
    _moments,
    _whiten,
    _whiten_backward,
    _whiten_by,
    merged_moments,
    moments_reference,
    whiten,
    whiten_reference,
)
from fastalign.testing import TOLERANCES, assert_no_worse

BACKENDS = ["reference", "cpp", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1,),  # one cell
    (5, 3),  # fewer than a register
    (31, 67),  # several registers, one of them not full
    (2, 2049),  # past a block of the Triton kernel, past one of C++
    (3, 13_001),  # several blocks, several threads
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Cells far from 0, and a mask that drops three in ten."""
    generator = torch.Generator().manual_seed(0)
    x = 100.0 + 3.0 * torch.randn(shape, generator=generator)
    return x.to(dtype).to(device), (torch.rand(shape, generator=generator) < 0.7).to(device)


def both_ways(x: Tensor, mask: Tensor | None, shift_mean: bool) -> tuple[Tensor, Tensor]:
    """The whitened cells and dx for one upstream gradient."""
    leaf = x.clone().requires_grad_()
    y = whiten(leaf, mask, shift_mean=shift_mean)
    upstream = torch.linspace(-1.0, 2.0, x.numel(), dtype=y.dtype, device=x.device).view(x.shape)
    (dx,) = torch.autograd.grad(y, leaf, upstream)
    return y.detach(), dx


def textbook(x: Tensor, mask: Tensor | None, shift_mean: bool) -> tuple[Tensor, Tensor]:
    """The same in float32, on the kept cells alone."""
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    leaf = x.float().requires_grad_()
    own = leaf[kept]
    variance = own.var() if own.numel() > 1 else torch.zeros_like(own.sum())
    whitened = (own - own.mean()) * torch.rsqrt(variance + 1e-8)
    y = torch.zeros_like(leaf).masked_scatter(
        kept, whitened if shift_mean else whitened + own.mean()
    )
    upstream = torch.linspace(-1.0, 2.0, x.numel(), device=x.device).view(x.shape)
    (dx,) = torch.autograd.grad(y, leaf, upstream)
    return y.detach(), dx.to(x.dtype)


def compare(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, masked: bool, shift_mean: bool
) -> None:
    x, mask = make(shape, dtype, device_of(backend))
    given = mask if masked else None
    with fa.backend(backend):
        y, dx = both_ways(x, given, shift_mean)
    assert y.dtype == torch.float32 and dx.dtype == dtype
    true_y, true_dx = both_ways(x.double(), given, shift_mean)
    eager_y, eager_dx = textbook(x, given, shift_mean)
    assert_no_worse(y, eager_y, true_y, dtype)
    assert_no_worse(dx, eager_dx, true_dx, dtype, grad=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, shift_mean: bool, masked: bool
) -> None:
    compare(backend, shape, dtype, masked, shift_mean)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_and_one_kept_cell(backend: str) -> None:
    device = device_of(backend)
    x = torch.tensor([[3.0, -2.0]], device=device)
    none = torch.zeros(1, 2, dtype=torch.bool, device=device)
    one = torch.tensor([[False, True]], device=device)
    with fa.backend(backend):
        for shift_mean in (True, False):
            assert both_ways(x, none, shift_mean)[0].tolist() == [[0.0, 0.0]]
            assert both_ways(x, none, shift_mean)[1].tolist() == [[0.0, 0.0]]
            empty, dx = both_ways(torch.empty(0, 4, device=device), None, shift_mean)
            assert empty.shape == dx.shape == (0, 4)
        y, dx = both_ways(x, one, True)
        assert y.tolist() == dx.tolist() == [[0.0, 0.0]]
        y, dx = both_ways(x, one, False)
        assert (y.tolist(), dx.tolist()) == ([[0.0, -2.0]], [[0.0, 2.0]])  # the cell itself
        assert whiten(torch.full((3, 3), 7.0, device=device)).tolist() == [[0.0] * 3] * 3


@pytest.mark.parametrize("value", [0.1, 3.7, 10000.1, -1e6 / 3])
@pytest.mark.parametrize("count", [2, 7, 1000, 4097])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_cells_come_out_as_zero(backend: str, count: int, value: float) -> None:
    """The rounding of their mean, one part in 2^24 of it, is not taken for spread."""
    with fa.backend(backend):
        y = whiten(torch.full((count,), value, device=device_of(backend)))
    assert y.abs().max().item() <= TOLERANCES[torch.float32].floor


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_spread_beside_a_large_mean(backend: str) -> None:
    """Cells 4096 + k / 1024, k = 0, 1, 3, 7: the mean of k is 2.75, for which float32 has no digit
    beside 4096; squares 7.5625 + 3.0625 + .0625 + 18.0625 = 28.75."""
    k = torch.tensor([0.0, 1.0, 3.0, 7.0], device=device_of(backend)).repeat(2500)
    want = (k.double() - 2.75) / (2500 * 28.75 / 9999 + 1e-8 * 1024**2) ** 0.5
    with fa.backend(backend):
        y = whiten(4096.0 + k / 1024.0)
    assert (y - want).abs().max().item() <= 3 * TOLERANCES[torch.float32].floor


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outlier_and_blocks_of_different_means(backend: str) -> None:
    x = torch.randn(5, 5000, generator=torch.Generator().manual_seed(1))
    x = (x + torch.arange(5.0)[:, None] * 100.0).to(device_of(backend))
    x[0, 0] = 1e4
    truth, eager = both_ways(x.double(), None, True)[0], textbook(x, None, True)[0]
    with fa.backend(backend):
        assert_no_worse(whiten(x), eager, truth, torch.float32)


def test_eps_is_added_to_the_variance() -> None:
    """Cells -1 and 1: variance 2; with eps 2 they come out as -+ 1 / 2."""
    x = torch.tensor([-1.0, 1.0])
    assert whiten(x, eps=2.0).tolist() == [-0.5, 0.5]
    assert whiten(x).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_masked_cells_does_not_leak(backend: str) -> None:
    x, mask = torch.randn(5, 600), torch.rand(5, 600) < 0.5
    mask[:, 512:] = False  # registers, and a block of Triton's, without a kept cell
    x, mask = x.to(device_of(backend)), mask.to(device_of(backend))
    results = []
    for fill in (0.0, float("nan"), float("inf")):
        with fa.backend(backend):
            y, dx = both_ways(x.masked_fill(~mask, fill), mask, True)
        results.append((y, dx))
        assert y[~mask].eq(0.0).all() and dx[~mask].eq(0.0).all()
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_kept_cell_is_seen(backend: str) -> None:
    x, mask = make((3, 5000), torch.float32, device_of(backend))
    x[1, 7], mask[1, 7] = float("nan"), True
    with fa.backend(backend):
        y = whiten(x, mask)
    assert y[mask].isnan().all() and y[~mask].eq(0.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_tokens_give_the_padded_ones_numbers(backend: str) -> None:
    x, _ = make((4, 50), torch.float32, device_of(backend))
    lengths = torch.tensor([50, 0, 17, 33], device=x.device)
    mask = torch.arange(50, device=x.device) < lengths[:, None]
    with fa.backend(backend):
        padded, packed = whiten(x, mask), whiten(x[mask])
    assert_no_worse(padded[mask], packed, whiten(x[mask].double()), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_input(backend: str) -> None:
    device = device_of(backend)
    x, mask = torch.randn(7, 12, device=device), torch.rand(12, 7, device=device) < 0.5
    with fa.backend(backend):
        views = both_ways(x.t()[::2], mask[::2], False)
        dense = both_ways(x.t()[::2].contiguous(), mask[::2].contiguous(), False)
    assert torch.equal(views[0], dense[0]) and torch.equal(views[1], dense[1])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_gradient(shift_mean: bool) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 5) < 0.7
    assert torch.autograd.gradcheck(lambda x: whiten(x, mask, shift_mean=shift_mean), (x,))
    (want,) = torch.autograd.grad(whiten_reference(x, mask, 1e-8, shift_mean)[0, :2].sum(), x)
    (got,) = torch.autograd.grad(whiten(x, mask, shift_mean=shift_mean)[0, :2].sum(), x)
    assert_no_worse(got, want, want, torch.float64, grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments(backend: str) -> None:
    """Cells 1, 3, 5, 7: 4 of them, mean 4, squares 9 + 1 + 1 + 9 = 20."""
    x = torch.tensor([1.0, 100.0, 3.0, 5.0, 7.0], device=device_of(backend))
    mask = torch.tensor([True, False, True, True, True], device=x.device)
    with fa.backend(backend):
        assert _moments(x, mask).tolist() == [4.0, 4.0, 20.0]
        assert _moments(x[:0], None).tolist() == [0.0, 0.0, 0.0]
        cells, kept = make((3, 13_001), torch.float32, x.device.type)
        got, true = _moments(cells, kept), moments_reference(cells.double(), kept)
    assert got.dtype == torch.float64
    assert (got / true - 1.0).abs().max().item() <= TOLERANCES[torch.float32].floor


def test_merged_moments_are_those_of_all_cells() -> None:
    x = torch.randn(100, dtype=torch.float64) + 1e3
    pieces = [x[:1], x[1:1], x[1:40], x[40:]]
    parts = torch.stack([moments_reference(piece, None) for piece in pieces])
    want = moments_reference(x, None)
    assert (merged_moments(parts) / want - 1.0).abs().max() <= TOLERANCES[torch.float64].floor
    assert merged_moments(parts[1:2].repeat(2, 1)).tolist() == [0.0, 0.0, 0.0]


def test_cpp_gives_the_same_bits_with_any_number_of_threads() -> None:
    x, mask = make((9, 13_001), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with fa.backend("cpp"):
                results.append(torch.stack(both_ways(x, mask, True)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


ISA_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from test_whiten import DTYPES, compare
for dtype in DTYPES:
    compare("cpp", (3, 13_001), dtype, True, True)
    compare("cpp", (31, 67), dtype, False, False)
print("passed")
"""


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    """The processor here may take another one: the others run in processes told to use them."""
    done = subprocess.run(
        [sys.executable, "-c", ISA_PROGRAM, Path(__file__).parent],
        env=os.environ | {"FASTALIGN_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "passed\n", done.stderr


def test_opcheck_and_compile() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    mask = torch.rand(4, 5) < 0.7
    for given in (None, mask):
        torch.library.opcheck(_whiten, (x, given, 1e-8, True))
        plain = x.detach()
        moments = _moments(plain, given)
        torch.library.opcheck(_moments, (plain, given))
        torch.library.opcheck(_whiten_by, (plain, given, moments, 1e-8, False))
        torch.library.opcheck(_whiten_backward, (plain, plain, given, moments, 1e-8, False))
    compiled = torch.compile(whiten, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, mask), whiten(x, mask))
    (want,) = torch.autograd.grad(whiten(x, mask)[0].sum(), x)
    (got,) = torch.autograd.grad(compiled(x, mask)[0].sum(), x)
    assert torch.equal(got, want)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "x, mask, eps, message",
    [
        (X, torch.ones(3, 2).bool(), 1e-8, r"whiten: .*\(2, 3\), got \(3, 2\)"),
        (X, torch.ones(2, 3), 1e-8, "whiten: .*bool or integer mask, got torch.float32"),
        (X.long(), None, 1e-8, "whiten: .*floating dtype, got torch.int64"),
        (X, X.bool().to("meta"), 1e-8, "whiten: .*device of x, cpu, got meta"),
        (X, None, 0.0, "whiten: expected eps > 0, got 0.0"),
        (X, None, float("nan"), "whiten: expected eps > 0, got nan"),
    ],
)
def test_bad_input(x: Tensor, mask: Tensor | None, eps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whiten(x, mask, eps=eps)
