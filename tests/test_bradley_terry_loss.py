"""Bradley-Terry loss: published values, three backends against float64, gradients, bad input."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bradley_terry import BACKENDS, DTYPES, KERNELS, compare, device_of, make
from torch import Tensor

import fastalign as fa
from fastalign.ops.bradley_terry_loss import (
    _bradley_terry_loss,
    bradley_terry_loss,
    bradley_terry_loss_reference,
    dgap_reference,
)
from fastalign.testing import assert_no_worse

SHAPES = [
    (1, 1),  # one cell
    (7, 5),  # fewer cells than a block
    (129, 16),  # one pair past a block of the Triton kernel: the loss is the sum of two parts
    (300, 7),  # several blocks in both kernels, cut in the middle of a pair in C++
    (40, 64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_against_float64(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = make(*shape, dtype, device_of(backend))
    compare(backend, inputs, label_smoothing=0.1, offset=0.25)
    compare(backend, {name: inputs[name] for name in ("chosen", "rejected")})


@pytest.mark.parametrize("backend", KERNELS)
def test_features_against_float64(backend: str) -> None:
    inputs = make(150, 16, torch.float32, device_of(backend))
    totals = torch.randint(500, (16,), device=inputs["chosen"].device)
    totals[1] = 0  # is taken as 1
    compare(backend, inputs, totals=totals)
    compare(backend, inputs, totals=totals, head_mask=None)
    compare(backend, inputs, margin=inputs["margin"][:, :1], head_mask=None)
    compare(backend, inputs, head_mask=inputs["head_mask"] > 0)
    compare(backend, inputs, head_mask=inputs["head_mask"].to(torch.int8))


@pytest.mark.parametrize("kept", [torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_many_programs_share_the_totals(backend: str, kept: torch.dtype) -> None:
    """The Triton kernel takes 32 pairs of 64 heads at once: 1030 pairs are 33 programs, from where
    on none of them adds up the mask."""
    inputs = make(1030, 64, torch.float32, device_of(backend))
    compare(backend, inputs | {"head_mask": inputs["head_mask"].clamp(min=0).to(kept)})
    compare(backend, inputs)


@pytest.mark.parametrize(
    "margin, eps, want",
    [(None, 0.0, 0.341153875), (0.5, 0.0, 0.513015252), (None, 0.1, 0.431153875)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_published_values(backend: str, margin: float | None, eps: float, want: float) -> None:
    """Gap 1.3 - .4 = .9: log(1 + e^-.9) = .341153875; with margin .5: log(1 + e^-.4); with label
    smoothing .1: .341153875 + .1 * .9."""
    chosen, rejected = torch.tensor([[[1.3]], [[0.4]]], dtype=torch.float64)
    truth = bradley_terry_loss(chosen, rejected, margin=margin, label_smoothing=eps)
    assert round(float(truth), 9) == want
    device = device_of(backend)
    with fa.backend(backend):
        got = bradley_terry_loss(
            chosen.float().to(device),
            rejected.float().to(device),
            margin=margin,
            label_smoothing=eps,
        )
    assert got.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_closed_form_gradient_is_autograds(label_smoothing: float) -> None:
    inputs = make(6, 3, torch.float64, "cpu")
    chosen = inputs["chosen"].requires_grad_()
    for head_mask in (None, inputs["head_mask"]):
        for totals in (None, torch.tensor([4, 0, 9])):
            args = (chosen, inputs["rejected"], inputs["margin"], 0.3, head_mask, totals)
            loss = bradley_terry_loss_reference(*args, label_smoothing)
            (want,) = torch.autograd.grad(loss, chosen)
            got = dgap_reference(*args, label_smoothing).detach()
            assert_no_worse(got, want, want, torch.float64, grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_batch_add_up(backend: str) -> None:
    """With the totals of the whole, losses and gradients of 5 and 4 pairs are those of 9."""
    inputs = make(9, 4, torch.float32, device_of(backend))
    chosen, rejected, head_mask = (inputs[k] for k in ("chosen", "rejected", "head_mask"))
    chosen.requires_grad_()
    with fa.backend(backend):
        whole = bradley_terry_loss(chosen, rejected, head_mask=head_mask)
        totals = head_mask.clamp(min=0).sum(0)
        first, second = (
            bradley_terry_loss(
                chosen[rows], rejected[rows], head_mask=head_mask[rows], totals=totals
            )
            for rows in (slice(0, 5), slice(5, 9))
        )
        parts = first + second
        (want,) = torch.autograd.grad(whole, chosen)
        (got,) = torch.autograd.grad(parts, chosen)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_pairs_keep_their_digits(backend: str) -> None:
    """-log sigmoid(16) = log(1 + e^-16) = 1.125351e-7, to float32's relative precision."""
    gaps = torch.tensor([[16.0], [8.0], [-16.0]], device=device_of(backend))
    for gap in gaps:
        with fa.backend(backend):
            loss = bradley_terry_loss(gap[None], torch.zeros_like(gap)[None])
        want = math.log1p(math.exp(-gap.item()))
        assert loss.item() == pytest.approx(want, rel=1e-6)


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


def test_cpp_gives_the_same_bits_with_any_number_of_threads() -> None:
    inputs = make(9000, 5, torch.float32, "cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with fa.backend("cpp"):
                results.append(bradley_terry_loss(**inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


ISA_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from bradley_terry import DTYPES, compare, make
for dtype in DTYPES:
    compare("cpp", make(300, 7, dtype, "cpu"), label_smoothing=0.1)
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
    chosen, rejected = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    margin, head_mask = torch.rand(4, 1, requires_grad=True), torch.rand(4, 3) < 0.5
    totals = torch.tensor([3, 2, 4])
    for args in [
        (chosen, rejected, None, 0.0, None, None, 0.0),
        (chosen, rejected, margin, 0.5, head_mask, totals, 0.1),
    ]:
        torch.library.opcheck(_bradley_terry_loss, args)

    def loss(chosen: Tensor) -> Tensor:
        return bradley_terry_loss(chosen, rejected, margin=0.5, head_mask=head_mask)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(chosen), loss(chosen))
    (want,) = torch.autograd.grad(loss(chosen), chosen)
    (got,) = torch.autograd.grad(compiled(chosen), chosen)
    assert torch.equal(got, want)


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
        ((S, S), {"totals": torch.ones(4)}, r"totals \[K\] = \(2,\), got \(4,\)"),
        ((S, S), {"label_smoothing": 0.5}, r"label_smoothing in \[0, 0.5\), got 0.5"),
        ((S, S), {"label_smoothing": -0.1}, r"label_smoothing in \[0, 0.5\), got -0.1"),
        ((S, S.to("meta")), {}, "rejected on the device of chosen, cpu, got meta"),
    ],
)
def test_bad_input(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match="bradley_terry_loss: .*" + message):
        bradley_terry_loss(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 16), (100_000, 5)], ids=str)
def test_gpu_at_real_sizes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    compare("triton", make(*shape, dtype, "cuda"), label_smoothing=0.1)
