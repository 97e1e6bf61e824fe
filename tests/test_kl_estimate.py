"""KL estimates: formulas by hand, exact expectation, gradients, small and large differences."""

from __future__ import annotations

import math

import pytest
import torch

from fastalign.ops.kl_estimate import KINDS, kl_estimate
from fastalign.testing import TOLERANCES, assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


def test_k3_keeps_its_digits_near_the_reference() -> None:
    """d = 2^-10: d^2/2 + d^3/6 = 4.77e-7, of which exp(d) - 1 - d keeps one digit in float32."""
    d = 2.0**-10
    true = math.expm1(d) - d
    got = float(kl_estimate(torch.tensor([-1.0 - d]), torch.tensor([-1.0]), "k3"))
    naive = float(torch.tensor(d).exp() - 1 - torch.tensor(d))
    assert abs(got - true) < abs(naive - true)
    assert f"{got:.3e}" == f"{true:.3e}" == "4.770e-07"


def test_extremes() -> None:
    """Differences of +-1e4: k3 is inf above (documented) and -d - 1 below; no NaN anywhere."""
    logp = torch.tensor([-1e4, 0.0, -1e4], requires_grad=True)
    ref = torch.tensor([0.0, -1e4, -1e4])
    assert kl_estimate(logp, ref, "k1").tolist() == [-1e4, 1e4, 0.0]
    assert kl_estimate(logp, ref, "k2").tolist() == [5e7, 5e7, 0.0]
    k3 = kl_estimate(logp, ref, "k3")
    assert k3.tolist() == [math.inf, 9999.0, 0.0]
    (gradient,) = torch.autograd.grad(k3.sum(), logp)
    assert gradient.tolist() == [-math.inf, 1.0, 0.0]


def test_empty_non_contiguous_and_mixed() -> None:
    for kind in KINDS:
        assert kl_estimate(torch.empty(0, 3), torch.empty(0, 3), kind).shape == (0, 3)
        logp, ref = torch.randn(6, 8).t(), torch.randn(8, 12)[:, ::2]
        views = kl_estimate(logp, ref, kind)
        assert torch.equal(views, kl_estimate(logp.contiguous(), ref.contiguous(), kind))
    assert kl_estimate(torch.zeros(2).bfloat16(), torch.zeros(2)).dtype == torch.float32
    assert kl_estimate(torch.zeros(2).double(), torch.zeros(2)).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_compile(kind: str) -> None:
    logp, ref = torch.randn(5, requires_grad=True), torch.randn(5)
    torch.library.opcheck(torch.ops.fastalign.kl_estimate.default, (logp, ref, kind))
    compiled = torch.compile(kl_estimate, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logp, ref, kind), kl_estimate(logp, ref, kind))


@pytest.mark.parametrize(
    "logp, ref, kind, message",
    [
        (torch.zeros(2), torch.zeros(2), "k4", "kl_estimate: .*k1, k2, k3, got 'k4'"),
        (torch.zeros(2, 1), torch.zeros(2), "k1", r"kl_estimate: .*\(2, 1\), got \(2,\)"),
        (torch.zeros(2).long(), torch.zeros(2), "k1", "logp of a floating dtype, got torch.int64"),
        (torch.zeros(2), torch.zeros(2).to("meta"), "k1", "device of logp, cpu, got meta"),
    ],
)
def test_bad_input(logp: torch.Tensor, ref: torch.Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl_estimate(logp, ref, kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_equals_cpu(dtype: torch.dtype, kind: str) -> None:
    logp, ref = torch.randn(400, 9).to(dtype), torch.randn(400, 9).to(dtype)
    truth = kl_estimate(logp.double(), ref.double(), kind)
    got = kl_estimate(logp.cuda(), ref.cuda(), kind).cpu()
    assert_no_worse(got, kl_estimate(logp, ref, kind), truth, dtype)
