"""Which rows reward heads read and give a gradient: the index, repeats, views, NaN, none."""

from __future__ import annotations

import pytest
import torch
from reward_ensembles import BACKENDS, DTYPES, KERNELS, compare, device_of, make, run

import fastalign as fa
from fastalign.ops.reduce_scores import statistic
from fastalign.ops.reward_heads import _reward_heads_backward, reward_heads
from fastalign.testing import assert_no_worse


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_named_by_all_samples(backend: str) -> None:
    """Every sample's gradient reaches the one row, in the same order each time."""
    device = device_of(backend)
    hidden, weight, bias, _ = make(3, 1, 20, 4, torch.float32, device)
    index = torch.full((200,), 1, device=device)
    inputs = (hidden, weight, bias, index)
    first, second = (run(backend, inputs, "uwo") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    truth = run("reference", tuple(x.double() for x in inputs[:3]) + (index,), "uwo")
    assert_no_worse(first[3], run("reference", inputs, "uwo")[3], truth[3], torch.float32, True)
    assert first[3][[0, 2]].abs().max() == 0.0 < first[3][1].abs().max()


def test_triton_groups_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with thousands of samples: one program goes through several blocks of rows."""
    from fastalign.kernels import reward_heads as kernels

    inputs = make(150, 200, 70, 5, torch.float32, device_of("triton"))
    monkeypatch.setattr(kernels, "PROGRAMS", 15)
    compare("triton", inputs)
    compare("triton", (*inputs[:3], None))


def test_cpp_gives_the_same_bits_with_any_number_of_threads() -> None:
    inputs = make(300, 400, 600, 5, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpp", inputs, "median"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_outside_the_index_do_not_matter(backend: str) -> None:
    hidden, weight, bias, _ = make(4, 1, 40, 2, torch.float32, device_of(backend))
    index = torch.tensor([3, 1], device=hidden.device)
    clean = run(backend, (hidden, weight, bias, index), "mean")
    hidden[[0, 2]] = float("nan")
    dirty = run(backend, (hidden, weight, bias, index), "mean")
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))
    assert dirty[3][[0, 2]].abs().max() == 0.0 and dirty[3][[1, 3]].abs().max() > 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_named_row_is_seen(backend: str) -> None:
    hidden, weight, bias, _ = make(4, 1, 40, 2, torch.float32, device_of(backend))
    hidden[2, 7] = float("nan")
    out = run(backend, (hidden, weight, bias, None), "min")
    assert out[0][2].isnan().all() and out[1][2].isnan() and out[4][:, 7].isnan().all()
    assert out[0][[0, 1, 3]].isfinite().all() and out[1][[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_needs_a_gradient_is_computed(backend: str) -> None:
    hidden, weight, bias, index = make(5, 7, 40, 3, torch.float32, device_of(backend))
    whole = run(backend, (hidden, weight, bias, index), "mean")
    for needs in [(True, False), (False, True)]:
        with fa.backend(backend):
            generator = torch.Generator().manual_seed(7)
            g = [torch.randn(*s, generator=generator).to(hidden) for s in [(7, 3), (7,), (7,)]]
            rest = (hidden, weight, index, whole[0], "mean", 0.7, *needs)
            parts = _reward_heads_backward(*g, *rest)
        for part, full, needed in zip(
            parts, whole[3:], (needs[0], needs[1], needs[1]), strict=True
        ):
            assert torch.equal(part, full) if needed else part.numel() == 0
        # A frozen encoder, or frozen heads, through autograd.
        h, w = hidden.clone().requires_grad_(needs[0]), weight.clone().requires_grad_(needs[1])
        with fa.backend(backend):
            reward_heads(h, w, index=index).sum().backward()
        assert (h.grad is not None, w.grad is not None) == needs


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_samples(backend: str) -> None:
    device = device_of(backend)
    hidden, weight, bias, _ = make(4, 1, 5, 3, torch.float32, device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    none = torch.empty(0, dtype=torch.int64, device=device)
    with fa.backend(backend):
        scores, reduced = reward_heads(*leaves, index=none, reduce="lcb", coef=1.0)
        gradients = torch.autograd.grad(scores.sum() + reduced.sum(), leaves)
        assert reward_heads(torch.empty(0, 5, device=device), weight).shape == (0, 3)
    assert scores.shape == (0, 3) and reduced.shape == (0,)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous(backend: str) -> None:
    """Every tensor a view: transposed, a slice of columns (read where it lies), every other one."""
    device = device_of(backend)
    hidden, weight, bias, index = make(8, 10, 12, 6, torch.float32, device)
    copies = (hidden[:, 2:9], weight[::2, 2:9], bias[::2], index[::2])
    want = run(backend, tuple(x.contiguous() for x in copies), "lcb")
    for views in (copies, (hidden.t().contiguous().t()[:, 2:9], *copies[1:])):
        got = run(backend, views, "lcb")
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
        assert got[3].is_contiguous()


def test_an_index_outside_the_rows_is_never_a_number() -> None:
    hidden, weight, _, _ = make(4, 1, 5, 3, torch.float32)
    for wrong in (4, -1):
        index = torch.tensor([1, wrong])
        message = rf"index in \[0, 4\), got {wrong} at place 1"
        with fa.backend("cpp"), pytest.raises(RuntimeError, match=message):
            reward_heads(hidden, weight, index=index)
        with fa.backend("reference"), pytest.raises((IndexError, RuntimeError)):
            reward_heads(hidden, weight, index=index)
        device = device_of("triton")
        inputs = (hidden.to(device), weight.to(device), None, index.to(device))
        g = tuple(torch.ones(shape, device=device) for shape in ((2, 3), 2, 2))
        scores, reduced, std, *gradients = run("triton", inputs, "min", g)
        assert scores[1].isnan().all() and reduced[1].isnan() and std[1].isnan()
        assert scores[0].isfinite().all() and reduced[0].isfinite()
        known = (*inputs[:3], index[:1].to(device))
        of_known = run("triton", known, "min", tuple(x[:1] for x in g))[3:]
        assert of_known[0].abs().max() > 0.0
        for got, want in zip(gradients, of_known, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("index", [[1, 2, 5], [5, 1, 2], [0, 7, 7, 3], [4]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_gradient_is_written(backend: str, dtype: torch.dtype, index: list[int]) -> None:
    """Rows not named before, between and after those named; whatever stood in the memory."""
    hidden, weight, bias, _ = make(8, 1, 37, 3, dtype, device_of(backend))
    rows = torch.tensor(index, device=hidden.device)
    want = run(backend, (hidden, weight, bias, rows), "lcb")
    scores, g = want[0], torch.randn(len(index), 3, device=hidden.device)
    wide = torch.empty(3, 37, device=hidden.device)
    out = (torch.empty_like(hidden), torch.empty_like(weight), torch.empty_like(wide[:, 0]))
    chosen = statistic("mean", 0.0, 3)
    for part in out:
        part.fill_(float("nan"))
    if backend == "triton":
        from fastalign.kernels.reward_heads import reward_heads_bwd

        reward_heads_bwd(*out, g, None, None, hidden, weight, rows, scores, chosen)
    else:
        out = (out[0], wide.fill_(float("nan")), out[2])
        torch.ops.fastalign_cpp.reward_heads_backward(
            *out, g, None, None, hidden, weight.float(), rows, scores, *chosen
        )
    with fa.backend("reference"):
        plain = _reward_heads_backward(
            g, None, None, hidden, weight, rows, scores, "mean", 0.0, True, True
        )
        true = _reward_heads_backward(
            g.double(), None, None, hidden.double(), weight.double(), rows, scores.double(),
            "mean", 0.0, True, True,
        )  # fmt: skip
    for got, eager, truth in zip(out, plain, true, strict=True):
        assert_no_worse(got, eager, truth, dtype, grad=True)
    others = [row for row in range(8) if row not in index]
    assert out[0][others].abs().max() == 0.0


def test_a_second_derivative_is_an_error() -> None:
    """The gradient is a constant to autograd: its slope would lack the part through the scores."""
    hidden, weight, _, _ = make(4, 1, 5, 3, torch.float32)
    hidden.requires_grad_()
    _, reduced = reward_heads(hidden, weight, reduce="uwo", coef=1.0)
    (gradient,) = torch.autograd.grad(reduced.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
