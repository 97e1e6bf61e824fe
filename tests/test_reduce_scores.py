"""Ensemble statistics: published values, three backends against float64, ties, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.reduce_scores import (
    STATISTICS,
    _reduce_scores,
    _reduce_scores_backward,
    dscores_reference,
    reduce_scores,
    reduce_scores_reference,
)
from fastalign.testing import assert_no_worse

BACKENDS = ["reference", "cpp", "triton"]
KERNELS = ["cpp", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Three heads (rows) on two samples (columns).
HEADS = torch.tensor([[1.0, 0.5], [1.2, 2.5], [0.8, 3.0]], dtype=torch.float64)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def gradient_of(backend: str, scores: Tensor, reduce: str, coef: float = 1.0) -> list:
    leaf = scores.to(device_of(backend)).requires_grad_()
    with fa.backend(backend):
        (gradient,) = torch.autograd.grad(reduce_scores(leaf, reduce, coef).sum(), leaf)
    return gradient.tolist()


@pytest.mark.parametrize(
    "reduce, coef, want",
    [
        ("mean", None, [1.0, 2.0]),
        ("min", None, [0.8, 0.5]),
        ("median", None, [1.0, 2.5]),
        ("uwo", 1.0, [0.96, 0.25]),
        ("lcb", 1.0, [0.8, 0.677124]),
        ("uwo", 0.5, [0.98, 1.125]),
        ("uwo", 2.0 / 3.0, [0.973333, 0.833333]),
        ("lcb", (2.0 / 3.0) ** 0.5, [0.836701, 0.919877]),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_published_statistics(
    backend: str, reduce: str, coef: float | None, want: list[float]
) -> None:
    """Sample 2: mean 2, deviations -1.5, .5, 1, squares 2.25 + .25 + 1 = 3.5, variance 3.5/2 =
    1.75, std 1.322876. uwo(1) = .25, lcb(1) = .677124, uwo(.5) = 2 - .875 = 1.125. With ddof 0 the
    variance is 2/3 of that: 2 - 1.166667 = .833333 and 2 - 1.080123 = .919877.
    """
    truth = reduce_scores(HEADS.t(), reduce, coef)
    assert [round(x, 6) for x in truth.tolist()] == want
    scores = HEADS.t().float().to(device_of(backend))
    with fa.backend(backend):
        got = reduce_scores(scores, reduce, coef)
    eager = reduce_scores_reference(scores, reduce, coef or 0.0)[0]
    assert_no_worse(got, eager, truth, torch.float32)


@pytest.mark.parametrize(
    "reduce, coef, want",
    [("uwo", 0.5, [1.083333, 0.083333, -0.166667]), ("lcb", 1.0, [0.900280, 0.144351, -0.044631])],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_worked_by_hand(
    backend: str, reduce: str, coef: float, want: list[float]
) -> None:
    """Sample 2, deviations c = (-1.5, .5, 1): uwo 1/3 - 2 * .5 c / 2; lcb 1/3 - c / (2 * 1.322876)
    = 1/3 - .377964 c."""
    got = gradient_of(backend, HEADS.t()[1:].float(), reduce, coef)[0]
    assert got == pytest.approx(want, abs=2e-6)


@pytest.mark.parametrize(
    "heads, dtype",
    [(heads, torch.float32) for heads in (1, 2, 16, 33, 64)] + [(5, dtype) for dtype in DTYPES],
    ids=str,
)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_against_float64(backend: str, heads: int, dtype: torch.dtype) -> None:
    """The Triton kernel takes 16 samples or fewer at once: 19 leave a tail. Every third sample has
    ties."""
    scores = (2.0 + torch.randn(19, heads)).to(dtype).to(device_of(backend))
    scores[::3] = scores[::3].round()
    g, e = torch.randn(2, 19).to(scores.device)
    for reduce in STATISTICS:
        truth = reduce_scores_reference(scores.double(), reduce, 0.7)
        eager = reduce_scores_reference(scores, reduce, 0.7)
        with fa.backend(backend):
            got = _reduce_scores(scores, reduce, 0.7)
            d = _reduce_scores_backward(g, e, scores, reduce, 0.7)
        for one, plain, true in zip(got, eager, truth, strict=True):
            assert one.dtype == torch.float32
            assert_no_worse(one, plain, true, dtype)
        true = dscores_reference(g.double(), e.double(), scores.double(), reduce, 0.7)
        plain = dscores_reference(g, e, scores, reduce, 0.7).to(dtype)
        assert d.dtype == dtype
        assert_no_worse(d, plain, true, dtype, grad=True)


@pytest.mark.parametrize("reduce", STATISTICS)
def test_closed_form_gradient_is_autograds(reduce: str) -> None:
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    g, e = torch.randn(2, 3, dtype=torch.float64)
    reduced, std = reduce_scores_reference(scores, reduce, 0.7)
    (want,) = torch.autograd.grad((g * reduced + e * std).sum(), scores)
    got = dscores_reference(g, e, scores.detach(), reduce, 0.7)
    assert_no_worse(got, want, want, torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda s: reduce_scores(s, reduce, 0.7), (scores,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_coef_zero_is_zero(backend: str) -> None:
    scores = HEADS.t().float().to(device_of(backend))
    scores[0, 0] = float("inf")  # 0 times an infinite spread must not be NaN
    with fa.backend(backend):
        mean = reduce_scores(scores, "mean")
        for reduce in ("lcb", "uwo"):
            assert torch.equal(reduce_scores(scores, reduce, 0.0), mean)
    assert mean[0] == float("inf")
    third = pytest.approx(1 / 3, rel=1e-6)
    for reduce in ("mean", "lcb", "uwo"):
        assert gradient_of(backend, scores, reduce, 0.0) == [[third] * 3] * 2


@pytest.mark.parametrize("reduce", STATISTICS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_head_is_its_own_statistic(backend: str, reduce: str) -> None:
    """The spread of a single head is taken as 0, and so is its gradient."""
    scores = torch.randn(5, 1, device=device_of(backend))
    with fa.backend(backend):
        reduced, std = _reduce_scores(scores, reduce, 3.0)
    assert torch.equal(reduced, scores[:, 0])
    assert std.tolist() == [0.0] * 5
    assert gradient_of(backend, scores, reduce, 3.0) == [[1.0]] * 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_heads_share_the_gradient(backend: str) -> None:
    """The derivative of the standard deviation at 0 is taken as 0.

    Scores (1, 3, 1, 1, 3, 7): three heads at the minimum get 1/3 each. In order 1, 1, 1, 3, 3, 7
    the middle two are 1 and 3: half to the three 1s, half to the two 3s.
    """
    for reduce in STATISTICS:
        assert gradient_of(backend, torch.full((1, 4), 2.0), reduce) == [[0.25] * 4]
    ties = torch.tensor([[1.0, 3.0, 1.0, 1.0, 3.0, 7.0]])
    third, sixth, quarter = (pytest.approx(1 / n, rel=1e-6) for n in (3, 6, 4))
    assert gradient_of(backend, ties, "min") == [[third, 0.0, third, third, 0.0, 0.0]]
    assert gradient_of(backend, ties, "median") == [[sixth, quarter, sixth, sixth, quarter, 0.0]]


@pytest.mark.parametrize(
    "backend, dtype",
    [*((backend, torch.float32) for backend in BACKENDS), ("reference", torch.float64)],
    ids=str,
)
def test_equal_heads_have_no_spread(backend: str, dtype: torch.dtype) -> None:
    """Also where the mean of the scores is rounded, so that it is none of them."""
    for heads in (3, 5, 7, 64):
        scores = torch.linspace(-3.0, 3.0, 37, dtype=dtype)[:, None].expand(37, heads)
        with fa.backend(backend):
            _, std = _reduce_scores(scores.to(device_of(backend)), "lcb", 1.0)
        assert std.abs().max() == 0.0
        got = torch.tensor(gradient_of(backend, scores.contiguous(), "lcb"))
        torch.testing.assert_close(got, torch.full_like(got, 1.0 / heads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_even_median_is_the_mean_of_the_middle_two(backend: str) -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 100.0]])
    with fa.backend(backend):
        assert reduce_scores(scores.to(device_of(backend)), "median").tolist() == [3.5]
    assert gradient_of(backend, scores, "median") == [[0.5, 0.0, 0.5, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_seen_by_every_statistic(backend: str) -> None:
    scores = torch.tensor([[1.0, float("nan"), 3.0], [1.0, 2.0, 3.0]], device=device_of(backend))
    for reduce in STATISTICS:
        with fa.backend(backend):
            reduced, std = _reduce_scores(scores, reduce, 1.0)
        assert reduced[0].isnan() and std[0].isnan() and reduced[1].isfinite() and std[1] == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(backend: str) -> None:
    device = device_of(backend)
    scores = torch.randn(3, 4, 5, device=device).transpose(0, 2)
    with fa.backend(backend):
        got = reduce_scores(scores, "lcb", 1.0)
        assert torch.equal(got, reduce_scores(scores.contiguous(), "lcb", 1.0))
        assert got.shape == (5, 4)
        assert reduce_scores(scores[0, 0], "min") == scores[0, 0].min()
        none = torch.empty(0, 3, device=device, requires_grad=True)
        reduce_scores(none, "median").sum().backward()
    assert none.grad is not None and none.grad.shape == (0, 3)


@pytest.mark.parametrize("reduce", STATISTICS)
def test_opcheck_and_compile(reduce: str) -> None:
    scores = torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(_reduce_scores, (scores, reduce, 0.5))
    g = torch.ones(2)
    torch.library.opcheck(_reduce_scores_backward, (g, None, scores.detach(), reduce, 0.5))

    def f(scores: Tensor) -> Tensor:
        return reduce_scores(scores * 2.0, reduce, 0.5)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(f(scores).sum(), scores)
    (got,) = torch.autograd.grad(compiled(scores).sum(), scores)
    assert torch.equal(got, want)


S = torch.zeros(4, 2)


@pytest.mark.parametrize(
    "args, message",
    [
        ((S, "max"), "mean, min, lcb, uwo, median, got 'max'"),
        ((S, "lcb"), "finite coef >= 0 for 'lcb', got None"),
        ((S, "uwo", -1.0), "coef >= 0 for 'uwo', got -1.0"),
        ((S, "uwo", float("inf")), "coef >= 0 for 'uwo', got inf"),
        ((S[:, :0], "mean"), r"scores .*1 <= K <= 64, got \(4, 0\)"),
        ((torch.zeros(4, 65), "mean"), r"1 <= K <= 64, got \(4, 65\)"),
        ((torch.zeros(()), "mean"), r"got \(\)"),
        ((S.long(), "mean"), "floating dtype, got torch.int64"),
    ],
)
def test_bad_input(args: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"reduce_scores: .*{message}"):
        reduce_scores(*args)
