"""KL estimates: formulas by hand, three backends against float64, gradients, small and large
differences."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.kl_estimate import (
    KINDS,
    _kl_estimate_backward,
    kl_estimate,
    kl_estimate_reference,
)
from fastalign.testing import TOLERANCES, assert_no_worse

BACKENDS = ["reference", "cpp", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One token, fewer than a register, one past a block of the Triton kernel, more than one thread's.
SIZES = [1, 7, 2049, 40_003]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make(n: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Log-probs and those of a reference: near, far and very far."""
    generator = torch.Generator().manual_seed(0)
    logp = -3.0 * torch.rand(n, generator=generator)
    distance = torch.randn(n, generator=generator)
    distance[1::3] *= 1e-3
    distance[2::3] *= 8.0
    return logp.to(dtype).to(device), (logp - distance).to(dtype).to(device)


def gradients(logp: Tensor, ref_logp: Tensor, kind: str, upstream: Tensor) -> list[Tensor]:
    """The estimates and both gradients."""
    leaves = (logp.clone().requires_grad_(), ref_logp.clone().requires_grad_())
    kl = kl_estimate(*leaves, kind)
    return [kl.detach(), *torch.autograd.grad(kl, leaves, upstream.to(kl.dtype))]


def compare(backend: str, n: int, dtype: torch.dtype, kind: str) -> None:
    logp, ref = make(n, dtype, device_of(backend))
    upstream = torch.linspace(-1.0, 2.0, n, device=logp.device)
    with fa.backend(backend):
        found = gradients(logp, ref, kind, upstream)
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype]
    truth = gradients(logp.double(), ref.double(), kind, upstream)
    # Plain PyTorch in float32, rounded to the inputs' dtype.
    leaves = (logp.float().requires_grad_(), ref.float().requires_grad_())
    kl = kl_estimate_reference(*leaves, kind)
    eager = [kl.detach(), *torch.autograd.grad(kl, leaves, upstream)]
    assert_no_worse(found[0], eager[0], truth[0], dtype)
    for i in (1, 2):
        assert_no_worse(found[i], eager[i].to(dtype), truth[i], dtype, grad=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str, n: int, dtype: torch.dtype, kind: str) -> None:
    compare(backend, n, dtype, kind)


def test_worked_by_hand() -> None:
    """logp = log 2 higher than ref: k1 = log 2, k2 = (log 2)^2 / 2, k3 = 1/2 - 1 + log 2.
    logp = log 2 lower: k1 = -log 2, k2 the same, k3 = 2 - 1 - log 2. Equal: all 0.
    """
    log2 = math.log(2.0)
    logp = torch.tensor([-1.0, -1.0 - log2, -3.0], dtype=torch.float64)
    ref = torch.tensor([-1.0 - log2, -1.0, -3.0], dtype=torch.float64)
    want = {
        "k1": [log2, -log2, 0.0],
        "k2": [log2**2 / 2, log2**2 / 2, 0.0],
        "k3": [log2 - 0.5, 1.0 - log2, 0.0],
    }
    for kind in KINDS:
        got = kl_estimate(logp, ref, kind)
        assert [round(x, 12) for x in got.tolist()] == [round(x, 12) for x in want[kind]]
    assert torch.equal(kl_estimate(logp, ref), kl_estimate(logp, ref, "k1"))


def test_expectations_are_exact_over_a_small_alphabet() -> None:
    """k1 and k3 average to the KL itself under pi; k2's gradient averages to the KL's."""
    scores = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    logp = scores.log_softmax(0)
    ref = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
    pi = logp.exp()
    divergence = (pi * (logp - ref)).sum()
    floor = TOLERANCES[torch.float64].floor
    for kind in ("k1", "k3"):
        mean = (pi * kl_estimate(logp, ref, kind)).sum()
        assert abs((mean - divergence).item()) <= floor
    (true_gradient,) = torch.autograd.grad(divergence, scores, retain_graph=True)
    surrogate = (pi.detach() * kl_estimate(logp, ref, "k2")).sum()
    (gradient,) = torch.autograd.grad(surrogate, scores)
    assert float((gradient - true_gradient).abs().max()) <= floor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_no_worse_than_eager(dtype: torch.dtype, kind: str) -> None:
    logp = (-3.0 * torch.rand(40, 9)).to(dtype)
    ref = (logp.float() + 0.5 * torch.randn(40, 9)).to(dtype)
    truth = kl_estimate(logp.double(), ref.double(), kind)
    d = ref.float() - logp.float()
    eager = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[kind]
    got = kl_estimate(logp, ref, kind)
    assert got.dtype == torch.float32 and got.shape == (40, 9)
    assert_no_worse(got, eager, truth, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_documented_one(kind: str) -> None:
    """1, -d and 1 - exp(d) with d = ref - logp; the opposite for ref_logp."""
    logp = torch.randn(20, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(20, dtype=torch.float64, requires_grad=True)
    gradient, ref_gradient = torch.autograd.grad(kl_estimate(logp, ref, kind).sum(), (logp, ref))
    d = (ref - logp).detach()
    want = {"k1": torch.ones_like(d), "k2": -d, "k3": 1.0 - d.exp()}[kind]
    assert float((gradient - want).abs().max()) <= TOLERANCES[torch.float64].grad_floor
    assert torch.equal(gradient, -ref_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_k3_keeps_its_digits_near_the_reference(backend: str) -> None:
    """d = 2^-10: d^2/2 + d^3/6 = 4.77e-7, of which exp(d) - 1 - d keeps one digit in float32; the
    slope 1 - exp(d) = -9.770396e-4 likewise keeps four."""
    d, device = 2.0**-10, device_of(backend)
    true = math.expm1(d) - d
    logp = torch.tensor([-1.0 - d], device=device, requires_grad=True)
    with fa.backend(backend):
        kl = kl_estimate(logp, torch.tensor([-1.0], device=device), "k3")
        (slope,) = torch.autograd.grad(kl, logp)
    naive = float(torch.tensor(d).exp() - 1 - torch.tensor(d))
    assert abs(kl.item() - true) < abs(naive - true)
    assert f"{kl.item():.3e}" == f"{true:.3e}" == "4.770e-07"
    assert f"{slope.item():.6e}" == f"{-math.expm1(d):.6e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend: str) -> None:
    """Differences of +-1e4: k3 is inf above (documented) and -d - 1 below; no NaN anywhere."""
    device = device_of(backend)
    logp = torch.tensor([-1e4, 0.0, -1e4], device=device, requires_grad=True)
    ref = torch.tensor([0.0, -1e4, -1e4], device=device)
    with fa.backend(backend):
        assert kl_estimate(logp, ref, "k1").tolist() == [-1e4, 1e4, 0.0]
        assert kl_estimate(logp, ref, "k2").tolist() == [5e7, 5e7, 0.0]
        k3 = kl_estimate(logp, ref, "k3")
        (gradient,) = torch.autograd.grad(k3.sum(), logp)
    assert k3.tolist() == [math.inf, 9999.0, 0.0]
    assert gradient.tolist() == [-math.inf, 1.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_k3_is_finite_as_far_as_float32_is(backend: str) -> None:
    """exp(88.5) = 2.7e38 is a float32, exp(89) is not; a token impossible for the reference costs
    inf; NaN is seen."""
    device, inf, nan = device_of(backend), math.inf, math.nan
    logp = torch.tensor([-88.5, -89.0, 0.0, -inf, nan], device=device)
    ref = torch.tensor([0.0, 0.0, -inf, -inf, 0.0], device=device)
    with fa.backend(backend):
        got = kl_estimate(logp, ref, "k3").tolist()
    assert got[0] == pytest.approx(math.exp(88.5), rel=1e-5)
    assert got[1:3] == [inf, inf]
    assert all(math.isnan(x) for x in got[3:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_non_contiguous(kind: str, backend: str) -> None:
    device = device_of(backend)
    with fa.backend(backend):
        empty = torch.empty(0, 3, device=device, requires_grad=True)
        kl = kl_estimate(empty, empty.detach(), kind)
        assert kl.shape == (0, 3)
        assert torch.autograd.grad(kl.sum(), empty)[0].shape == (0, 3)
        logp, ref = torch.randn(6, 8, device=device).t(), torch.randn(8, 12, device=device)[:, ::2]
        upstream = torch.randn(6, 8, device=device).t()
        views = gradients(logp, ref, kind, upstream)
        dense = gradients(logp.contiguous(), ref.contiguous(), kind, upstream.contiguous())
    assert all(torch.equal(x, y) for x, y in zip(views, dense, strict=True))


def test_mixed_dtypes_are_promoted() -> None:
    assert kl_estimate(torch.zeros(2).bfloat16(), torch.zeros(2)).dtype == torch.float32
    assert kl_estimate(torch.zeros(2).double(), torch.zeros(2)).dtype == torch.float64
    third = torch.tensor([1.0]) / 3.0
    logp = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    kl = kl_estimate(logp, third, "k2")
    assert kl.item() == pytest.approx(1 / 18, rel=1e-6)  # 1/3 is not rounded to bfloat16
    (gradient,) = torch.autograd.grad(kl.sum(), logp)
    assert gradient.dtype == torch.bfloat16 and gradient.item() == pytest.approx(-1 / 3, rel=4e-3)


ISA_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from test_kl_estimate import DTYPES, KINDS, compare
for dtype in DTYPES:
    for kind in KINDS:
        compare("cpp", 40_003, dtype, kind)
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


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_compile(kind: str) -> None:
    logp, ref = torch.randn(5, requires_grad=True), torch.randn(5)
    torch.library.opcheck(torch.ops.fastalign.kl_estimate.default, (logp, ref, kind))
    if kind != "k1":
        grad = torch.randn(5)
        torch.library.opcheck(_kl_estimate_backward, (grad, logp.detach(), ref, kind))
    compiled = torch.compile(kl_estimate, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logp, ref, kind), kl_estimate(logp, ref, kind))
    (want,) = torch.autograd.grad(kl_estimate(logp, ref, kind).sum(), logp)
    (got,) = torch.autograd.grad(compiled(logp, ref, kind).sum(), logp)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "logp, ref, kind, message",
    [
        (torch.zeros(2), torch.zeros(2), "k4", "kl_estimate: .*k1, k2, k3, got 'k4'"),
        (torch.zeros(2, 1), torch.zeros(2), "k1", r"kl_estimate: .*\(2, 1\), got \(2,\)"),
        (torch.zeros(2).long(), torch.zeros(2), "k1", "logp of a floating dtype, got torch.int64"),
        (torch.zeros(2), torch.zeros(2).to("meta"), "k1", "device of logp, cpu, got meta"),
    ],
)
def test_bad_input(logp: Tensor, ref: Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl_estimate(logp, ref, kind)
