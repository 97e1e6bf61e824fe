"""Reward heads: published ensemble statistics, scores against float64, gather, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastalign.ops.reward_heads import STATISTICS, reduce_scores, reward_heads
from fastalign.testing import TOLERANCES, assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Three heads (rows) on two samples (columns).
HEADS = torch.tensor([[1.0, 0.5], [1.2, 2.5], [0.8, 3.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "reduce, coef, want",
    [
        ("mean", None, [1.0, 2.0]),
        ("min", None, [0.8, 0.5]),
        ("median", None, [1.0, 2.5]),
        ("uwo", 1.0, [0.96, 0.25]),
        ("lcb", 1.0, [0.8, 0.677124]),
        ("uwo", 0.5, [0.98, 1.125]),
    ],
)
def test_published_statistics(reduce: str, coef: float | None, want: list[float]) -> None:
    """Sample 2: mean 2, deviations -1.5, .5, 1, squares 2.25 + .25 + 1 = 3.5, variance 3.5/2 =
    1.75, std 1.322876. uwo(1) = .25, lcb(1) = .677124, uwo(.5) = 2 - .875 = 1.125.
    """
    assert [round(x, 6) for x in reduce_scores(HEADS.t(), reduce, coef).tolist()] == want


def test_coef_zero_is_zero() -> None:
    for reduce in ("lcb", "uwo"):
        got = reduce_scores(HEADS.t(), reduce, 0.0)
        assert torch.equal(got, reduce_scores(HEADS.t(), "mean"))


@pytest.mark.parametrize("reduce", STATISTICS)
def test_one_head_is_its_own_statistic(reduce: str) -> None:
    scores = torch.randn(5, 1, requires_grad=True)
    reduced = reduce_scores(scores, reduce, 3.0)
    assert torch.equal(reduced, scores[:, 0])
    (gradient,) = torch.autograd.grad(reduced.sum(), scores)
    assert gradient.tolist() == [[1.0]] * 5


def test_equal_heads_have_finite_gradients() -> None:
    """The derivative of the standard deviation at 0 is taken as 0; equal minima share theirs."""
    scores = torch.full((1, 4), 2.0, requires_grad=True)
    for reduce, want in [("lcb", 0.25), ("uwo", 0.25), ("min", 0.25), ("mean", 0.25)]:
        (gradient,) = torch.autograd.grad(reduce_scores(scores, reduce, 1.0).sum(), scores)
        assert gradient.tolist() == [[want] * 4]


def test_even_median_is_the_mean_of_the_middle_two() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 100.0]], requires_grad=True)
    median = reduce_scores(scores, "median")
    assert median.tolist() == [3.5]
    (gradient,) = torch.autograd.grad(median.sum(), scores)
    assert gradient.tolist() == [[0.5, 0.0, 0.5, 0.0]]


@pytest.mark.parametrize("reduce", STATISTICS)
def test_reduce_gradient(reduce: str) -> None:
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: reduce_scores(s, reduce, 0.7), (scores,))


def test_scores_worked_by_hand() -> None:
    """Rows 2 and 0 of hidden; head 0 reads the first feature, head 1 the sum, biases 10 and 0.

    row 2 = (5, 6): 5 + 10 = 15 and 11; row 0 = (1, 2): 11 and 3. min = 11 and 3.
    """
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    scores, reduced = reward_heads(
        hidden, weight, torch.tensor([10.0, 0.0]), index=torch.tensor([2, 0]), reduce="min"
    )
    assert scores.tolist() == [[15.0, 11.0], [11.0, 3.0]]
    assert reduced.tolist() == [11.0, 3.0]


@pytest.mark.parametrize("index_dtype", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_no_worse_than_eager(
    dtype: torch.dtype, index_dtype: torch.dtype | None
) -> None:
    hidden, weight, bias = (torch.randn(*size).to(dtype) for size in [(50, 33), (3, 33), (3,)])
    index = None if index_dtype is None else torch.tensor([49, 0, 7, 7]).to(index_dtype)
    rows = hidden if index is None else hidden[index.long()]
    truth = rows.double() @ weight.double().t() + bias.double()
    eager = torch.nn.functional.linear(rows, weight, bias)
    got = reward_heads(hidden, weight, bias, index=index)
    assert got.dtype == torch.float32
    assert_no_worse(got, eager, truth, dtype)
    assert reward_heads(hidden.double(), weight, bias).dtype == torch.float64


def test_gradients_reach_all_inputs() -> None:
    """An index that names a row twice adds both gradients."""
    index = torch.tensor([4, 1, 4])
    inputs = tuple(
        torch.randn(*size, dtype=torch.float64, requires_grad=True)
        for size in [(6, 5), (3, 5), (3,)]
    )
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: reward_heads(
            hidden, weight, bias, index=index, reduce="uwo", coef=0.5
        ),
        inputs,
    )


def test_rows_outside_the_index_do_not_matter() -> None:
    hidden, weight = torch.randn(4, 5), torch.randn(2, 5)
    index = torch.tensor([3, 1])
    dirty = hidden.clone()
    dirty[[0, 2]] = float("nan")
    dirty.requires_grad_()
    scores = reward_heads(dirty, weight, index=index)
    assert torch.equal(scores, hidden[index] @ weight.t())
    (gradient,) = torch.autograd.grad(scores.sum(), dirty)
    assert gradient[[0, 2]].tolist() == [[0.0] * 5] * 2


def test_empty_and_non_contiguous() -> None:
    weight = torch.randn(5, 3).t()
    none = torch.empty(0, dtype=torch.int64)
    scores, reduced = reward_heads(torch.randn(4, 5), weight, index=none, reduce="lcb", coef=1.0)
    assert scores.shape == (0, 3) and reduced.shape == (0,)
    assert reward_heads(torch.empty(0, 5), weight).shape == (0, 3)
    hidden = torch.randn(5, 8).t()
    got = reward_heads(hidden, weight)
    want = reward_heads(hidden.contiguous(), weight.contiguous())
    assert float((got - want).abs().max()) <= TOLERANCES[torch.float32].floor


@pytest.mark.parametrize("reduce", STATISTICS)
def test_opcheck_and_compile(reduce: str) -> None:
    hidden = torch.randn(6, 4, requires_grad=True)
    weight, bias = torch.randn(3, 4, requires_grad=True), torch.randn(3)
    index = torch.tensor([5, 0])
    torch.library.opcheck(torch.ops.fastalign.reward_heads.default, (hidden, weight, bias, index))
    scores = torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.fastalign.reduce_scores.default, (scores, reduce, 0.5))

    def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return reward_heads(hidden, weight, bias, index=index, reduce=reduce, coef=0.5)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(hidden, weight)
    assert all(torch.equal(x, y) for x, y in zip(compiled, both(hidden, weight), strict=True))


H, W = torch.zeros(4, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        (
            (H, torch.zeros(2, 5)),
            {},
            r"hidden \[N, D\] and weight \[K, D\], got \(4, 3\) and \(2, 5",
        ),
        ((H[None], W), {}, r"got \(1, 4, 3\) and \(2, 3\)"),
        ((H, W[:0]), {}, r"K >= 1 heads, got weight \(0, 3\)"),
        ((H, W, torch.zeros(3)), {}, r"bias \[K\] = \(2,\), got \(3,\)"),
        ((H, W), {"index": torch.zeros(2)}, r"int32 or int64, got \(2,\) torch.float32"),
        ((H.long(), W), {}, "hidden of a floating dtype, got torch.int64"),
        ((H, W.to("meta")), {}, "weight on the device of hidden, cpu, got meta"),
        ((H, W), {"reduce": "max"}, "mean, min, lcb, uwo, median, got 'max'"),
        ((H, W), {"reduce": "lcb"}, "coef >= 0 for 'lcb', got None"),
        ((H, W), {"reduce": "uwo", "coef": -1.0}, "coef >= 0 for 'uwo', got -1.0"),
    ],
)
def test_bad_input(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_heads(*args, **kwargs)


def test_bad_scores() -> None:
    with pytest.raises(ValueError, match=r"reduce_scores: expected scores .*, got \(4, 0\)"):
        reduce_scores(torch.zeros(4, 0), "mean")
    with pytest.raises(ValueError, match="reduce_scores: .*floating dtype, got torch.int64"):
        reduce_scores(torch.zeros(4, 2).long(), "mean")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_equals_cpu(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(400, 64).to(dtype), torch.randn(5, 64).to(dtype)
    for reduce in STATISTICS:
        pairs = [
            reward_heads(hidden.to(kind), weight.to(kind), reduce=reduce, coef=0.5)
            for kind in ("cuda", dtype, torch.float64)
        ]
        for got, eager, truth in zip(*pairs, strict=True):
            assert_no_worse(got.cpu(), eager, truth, dtype)
