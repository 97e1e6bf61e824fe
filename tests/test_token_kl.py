"""token_kl: three backends against float64, near the reference, infinities, gradients, compile."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.token_kl import (
    kl_dlogits,
    kl_dlogits_out,
    kl_stats,
    kl_stats_reference,
    token_kl,
)
from fastalign.ops.token_logprobs import row_stats
from fastalign.testing import adversarial_logits, assert_no_worse, peaked_logits

CUDA = torch.cuda.is_available()
KERNELS = ["cpp", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1),  # one token that is certain
    (3, 7),  # fewer columns than lanes
    (5, 16),  # exactly the lanes of the C++ kernel
    (4, 1031),  # a prime: a tail in every kernel
    (2, 4097),  # one column past two blocks of the Triton kernel
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and CUDA else "cpu"


def reference_of(logits: Tensor, seed: int = 11) -> Tensor:
    """Another model's logits: like these, with noise and some tokens quite different."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(logits.shape, generator=generator)
    far = torch.rand(logits.shape, generator=generator) < 0.02
    return (logits.float() + torch.where(far, 6.0 * noise, 0.3 * noise)).to(logits.dtype)


def against_all(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One adversarial case as the policy, once with each of the cases as the reference."""
    cases = adversarial_logits(75, dtype)
    logits, targets = cases[name]
    ref_logits = torch.cat([ref for ref, _ in cases.values()])
    return logits.repeat(len(cases), 1), ref_logits, targets.repeat(len(cases))


def for_backward(stats: Any) -> list[Tensor]:
    """What kl_dlogits wants of the statistics: all but ref_logp."""
    return [*stats[:5], *stats[6:]]


def run(
    backend: str,
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float = 0.0,
    with_entropy: bool = True,
) -> list[Tensor]:
    """logp, entropy, kl, ref_logp, and the gradient of sum(g logp + e entropy + k kl)."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(7)
    g, e, k = torch.randn(3, len(targets), generator=generator)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x, r, y = (v.to(device) for v in (logits, ref_logits, targets))
    t, g, e, k = (v.to(device, wide) for v in (temperature, g, e, k))
    with fa.backend(backend):
        stats = kl_stats(x, r, y, t, softcap, -100)
        e_or_none = e if with_entropy else None
        dx = kl_dlogits(g, e_or_none, k, x, r, y, t, softcap, -100, for_backward(stats))
    assert all(x.dtype == wide and x.shape == targets.shape for x in stats)
    return [v.cpu() for v in (stats[0], stats[1], stats[4], stats[5], dx)]


def compare(
    backend: str, logits: Tensor, ref_logits: Tensor, targets: Tensor, temperature: Tensor, *args
) -> None:
    rest = (targets, temperature, *args)
    kernel = run(backend, logits, ref_logits, *rest)
    eager = run("reference", logits, ref_logits, *rest)
    truth = run("reference", logits.double(), ref_logits.double(), *rest)
    for index, (got, plain, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        assert_no_worse(got, plain, true, logits.dtype, grad=index == 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_against_float64(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, targets = peaked_logits(*shape, dtype=dtype)
    compare(backend, logits, reference_of(logits), targets, torch.full((1,), 0.7))


@pytest.mark.parametrize("ref_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_any_two_dtypes(backend: str, dtype: torch.dtype, ref_dtype: torch.dtype) -> None:
    logits, targets = peaked_logits(3, 100, dtype=dtype)
    ref_logits = reference_of(logits).to(ref_dtype)
    compare(backend, logits, ref_logits, targets, torch.ones(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 128_256), (70_000, 5)], ids=["long rows", "many rows"])
def test_cpp_at_real_lengths(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, targets = peaked_logits(*shape, dtype=dtype)
    compare("cpp", logits, reference_of(logits), targets, torch.full((1,), 1.3))


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["no cap", "cap"])
@pytest.mark.parametrize("with_entropy", [True, False], ids=["entropy", "no entropy"])
@pytest.mark.parametrize("backend", KERNELS)
def test_features_against_float64(backend: str, with_entropy: bool, softcap: float) -> None:
    logits, targets = peaked_logits(6, 501)
    targets[2] = -100
    temperature = 0.5 + torch.rand(6)
    compare(backend, logits, reference_of(logits), targets, temperature, softcap, with_entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", adversarial_logits(8, torch.float32))
@pytest.mark.parametrize("backend", KERNELS)
def test_adversarial_rows_against_each_other(backend: str, name: str, dtype: torch.dtype) -> None:
    """Each hard policy against each hard reference, infinite divergences among them."""
    compare(backend, *against_all(name, dtype), torch.ones(1))


@pytest.mark.parametrize("backend", KERNELS)
def test_the_maxima_rise_from_block_to_block(backend: str) -> None:
    """Running sums are shifted with every new maximum: together, apart, a little, and far."""
    logits = 0.3 * torch.randn(4, 9000)
    ref_logits = logits + 0.1 * torch.randn(4, 9000)
    logits[0, 5000], logits[0, 8500] = 2.0, 5.0
    ref_logits[0, 5000], ref_logits[0, 8500] = 2.1, 5.2
    logits[1, 3000], ref_logits[1, 6000] = 7.0, 6.0
    logits[2, 4500], ref_logits[2, 7000] = 150.0, 140.0
    logits[3, 8999], ref_logits[3, 8999] = 300.0, 90.0
    compare(backend, logits, ref_logits, torch.tensor([5000, 3, 4500, 8999]), torch.tensor([1.0]))


@pytest.mark.parametrize("whose", ["policy", "reference", "both"])
@pytest.mark.parametrize("backend", KERNELS)
def test_first_block_at_minus_infinity(backend: str, whose: str) -> None:
    """A running maximum that starts at 0, or exp(-inf - -inf), would show here."""
    logits, targets = peaked_logits(3, 4500)
    ref_logits = reference_of(logits)
    if whose != "policy":
        ref_logits[:, :4200] = float("-inf")
    if whose != "reference":
        logits[:, :4200] = float("-inf")
    logits[:, 4200:] -= 120.0
    targets[:] = 4300
    kl = run(backend, logits, ref_logits, targets, torch.ones(1))[2]
    assert kl.isinf().all() if whose == "reference" else kl.isfinite().all()
    compare(backend, logits, ref_logits, targets, torch.ones(1))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("noise", [1e-3, 1e-2])
@pytest.mark.parametrize("backend", KERNELS)
def test_near_the_reference_no_digits_are_lost(
    backend: str, noise: float, temperature: float
) -> None:
    """KL near 1e-6 (noise 1e-3) and 1e-4: float32 log-probs differ by their last digit there.

    The error is bounded by 1e-6 times the noise, a thousandth of the KL and less.
    """
    x, targets = peaked_logits(64, 5000)
    x = 0.5 * x  # entropies of several nats: log-sums with few digits after the point
    ref = x + noise * torch.randn(x.shape)
    t = torch.full((1,), temperature)
    kl = run(backend, x, ref, targets, t)[2]
    truth = run("reference", x.double(), ref.double(), targets, t)[2]
    assert 0.2 * noise**2 < truth.mean() < 2.0 * noise**2
    assert (kl.double() - truth).abs().max() <= 1e-6 * noise
    eager = run("reference", x, ref, targets, t)[2]
    assert (eager.double() - truth).abs().max() > 20e-6 * noise  # so the test can fail


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_near_the_reference_gradients_keep_their_digits(backend: str) -> None:
    """The gradient is p times a difference from its mean, so its sum is 0 to the last digit.

    The mean comes from its own statistic: made of two log-sums it would have lost four digits.
    """
    device = device_of(backend)
    x, _ = peaked_logits(64, 5000)
    x = (0.5 * x).to(device).requires_grad_()
    ref = x.detach() + 1e-3 * torch.randn(x.shape).to(device)
    with fa.backend(backend):
        (dx,) = torch.autograd.grad(token_kl(x, ref).sum(), x)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(token_kl(wide, ref.double()).sum(), wide)
    assert (dx.double() - truth).abs().max() <= 2e-5 * truth.abs().max()
    assert dx.double().sum(-1).abs().max() <= 1e-4 * truth.abs().max()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_equal_logits_give_exactly_zero(backend: str) -> None:
    device = device_of(backend)
    logits, _ = peaked_logits(5, 4500, device=device)
    x = logits.requires_grad_()
    with fa.backend(backend):
        kl = token_kl(x, x.detach(), temperature=0.7)
        (dx,) = torch.autograd.grad(kl.sum(), x)
    assert kl.abs().max() == 0.0 and dx.abs().max() == 0.0


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_hand_worked_row(backend: str) -> None:
    """Logits (0, ln 3) give p = (1/4, 3/4), equal ones r = (1/2, 1/2).

    KL = 1/4 ln(1/2) + 3/4 ln(3/2) = ln 2 - (ln 4 - 3/4 ln 3), and dKL/dx_1 = 3/4 (ln(3/2) - KL);
    with temperature 2 and logits doubled p is the same and the gradient is halved.
    """
    kl = 0.75 * math.log(3) - math.log(2)
    slope = 0.75 * (math.log(1.5) - kl)
    device = device_of(backend)
    for temperature in (1.0, 2.0):
        logits = torch.tensor([[0.0, temperature * math.log(3)]], device=device, requires_grad=True)
        ref_logits = torch.full((1, 2), 5.0, device=device)
        with fa.backend(backend):
            got = token_kl(logits, ref_logits, temperature=temperature)
        assert got.item() == pytest.approx(kl, rel=1e-6)
        (dx,) = torch.autograd.grad(got.sum(), logits)
        slopes = [-slope / temperature, slope / temperature]
        assert dx[0].tolist() == pytest.approx(slopes, rel=1e-5)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_what_the_reference_excludes(backend: str) -> None:
    """p = 0 adds nothing whatever r is; p > 0 with r = 0 is +inf, without gradient or NaN."""
    device = device_of(backend)
    none = float("-inf")
    logits = torch.tensor([[0.0, 1.0, none], [0.0, 1.0, none], [0.0, 1.0, 2.0]], device=device)
    ref = torch.tensor([[1.0, 0.0, 3.0], [1.0, 0.0, none], [1.0, none, 2.0]], device=device)
    x = logits.requires_grad_()
    with fa.backend(backend):
        kl = token_kl(x, ref)
        (dx,) = torch.autograd.grad(kl.sum(), x)
    p = 1 / (1 + math.e)
    between = (1 - 2 * p) * 1.0  # both differences of logits are 1, of opposite sign
    r_of_the_two = (1 + math.e) / (1 + math.e + math.e**3)
    assert kl[0].item() == pytest.approx(between - math.log(r_of_the_two), rel=1e-6)
    assert kl[1].item() == pytest.approx(between, rel=1e-6)
    assert kl[2].item() == float("inf")
    assert dx.isfinite().all() and dx[2].abs().max() == 0.0
    assert dx[:2, 2].abs().max() == 0.0 and dx[:2, :2].abs().min() > 0.1


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_an_excluded_token_that_fades(backend: str) -> None:
    """p > 0 with r = 0 as far as one block goes, but p = 0 beside a later block's maximum."""
    logits, targets = peaked_logits(2, 9000)
    ref_logits = reference_of(logits)
    ref_logits[0, 17] = ref_logits[1, 17] = float("-inf")
    logits[0, 8500] = 400.0
    kl = run(backend, logits, ref_logits, targets, torch.ones(1))[2]
    log_r = torch.log_softmax(ref_logits[0].double(), -1)
    assert kl[0].item() == pytest.approx(-log_r[8500].item(), rel=1e-6)
    assert kl[1].isinf()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_an_infinite_kl_leaves_the_other_gradients(backend: str) -> None:
    """With kl = inf the gradient is that of logp and entropy alone."""
    logits, targets = peaked_logits(3, 50)
    ref_logits = reference_of(logits)
    ref_logits[1, 7] = float("-inf")
    got = run(backend, logits, ref_logits, targets, torch.ones(1))
    assert got[2].isinf().tolist() == [False, True, False]
    generator = torch.Generator().manual_seed(7)
    g, e, _ = torch.randn(3, 3, generator=generator)
    x = logits.clone().requires_grad_()
    logp, entropy, *_ = row_stats(x, targets, torch.ones(1), 0.0, -100)
    (dx,) = torch.autograd.grad((g * logp + e * entropy).sum(), x)
    assert_no_worse(got[4][1], dx[1], dx[1].double(), torch.float32, grad=True)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_ignored_rows_are_zero_whatever_they_hold(backend: str) -> None:
    logits, _ = peaked_logits(5, 33, device=device_of(backend))
    ref_logits = reference_of(logits.cpu()).to(logits.device)
    logits[1], ref_logits[2], logits[3] = float("nan"), float("nan"), float("inf")
    mask = torch.tensor([True, False, False, False, True], device=logits.device)
    x = logits.requires_grad_()
    with fa.backend(backend):
        kl = token_kl(x, ref_logits, mask=mask)
        (dx,) = torch.autograd.grad(kl.sum(), x)
        stats = kl_stats(x, ref_logits, mask.long() * 100 - 100, torch.ones(1).to(x), 0.0, -100)
    for value in (kl, dx, *stats):
        assert value[1:4].abs().max() == 0.0
        assert value[[0, 4]].abs().max() > 0.0
        assert value.isfinite().all()


@pytest.mark.parametrize("whose", ["policy", "reference"])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nan_in_a_row_that_counts_is_seen(backend: str, whose: str) -> None:
    logits, targets = peaked_logits(2, 100)
    ref_logits = reference_of(logits)
    (logits if whose == "policy" else ref_logits)[1, 57] = float("nan")
    targets[1] = 3
    kl, dx = (run(backend, logits, ref_logits, targets, torch.ones(1))[i] for i in (2, 4))
    assert kl[0].isfinite() and kl[1].isnan() and dx[1].isnan().any() and dx[0].isfinite().all()


def test_the_reference_is_torchs_kl_div() -> None:
    logits, targets = peaked_logits(5, 23, dtype=torch.float64)
    ref_logits = reference_of(logits)
    log_p, log_r = (torch.log_softmax(x / 0.7, -1) for x in (logits, ref_logits))
    expected = torch.nn.functional.kl_div(log_r, log_p, reduction="none", log_target=True).sum(-1)
    kl = kl_stats_reference(
        logits, ref_logits, targets, torch.full((1,), 0.7, dtype=torch.float64)
    )[4]
    assert_no_worse(kl, expected, expected, torch.float64)


@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["no cap", "cap"])
def test_closed_form_gradient_is_autograds(softcap: float) -> None:
    logits, targets = peaked_logits(5, 23, dtype=torch.float64)
    ref_logits = reference_of(logits)
    targets[4] = -100
    temperature = 0.5 + torch.rand(5, dtype=torch.float64)

    def chosen(stats: Any) -> Tensor:
        return torch.stack((stats[0], stats[1], stats[4]))

    def own(x: Tensor) -> Tensor:
        return chosen(kl_stats(x, ref_logits, targets, temperature, softcap, -100))

    def plain(x: Tensor) -> Tensor:
        return chosen(kl_stats_reference(x, ref_logits, targets, temperature, softcap, -100))

    x = logits.clone().requires_grad_()
    weights = torch.randn(3, 5, dtype=torch.float64)
    gradients = [torch.autograd.grad((f(x) * weights).sum(), x)[0] for f in (own, plain)]
    assert_no_worse(gradients[0], gradients[1], gradients[1], torch.float64, grad=True)
    assert torch.autograd.gradcheck(own, (x,))


@pytest.mark.parametrize("backend", KERNELS)
def test_the_first_four_statistics_are_row_stats(backend: str) -> None:
    device = device_of(backend)
    logits, targets = peaked_logits(4, 4500, device=device)
    ref_logits = reference_of(logits.cpu()).to(device)
    t = torch.full((1,), 0.8, device=device)
    with fa.backend(backend):
        stats = kl_stats(logits, ref_logits, targets, t, 5.0, -100)
        own = row_stats(logits, targets, t, 5.0, -100)
        ref = row_stats(ref_logits, targets, t, 5.0, -100)
    for got, want in zip((*stats[:4], *stats[5:7]), (*own, ref[0], ref[2]), strict=True):
        assert_no_worse(got, want, want.double(), torch.float32)
    assert torch.equal(stats[2], own[2]) and torch.equal(stats[6], ref[2])


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_gradient_in_place(backend: str) -> None:
    device = device_of(backend)
    logits, targets = peaked_logits(4, 300, device=device)
    ref_logits = reference_of(logits.cpu()).to(device)
    g, e, k = torch.randn(3, 4, device=device)
    settings = (targets, torch.ones(1, device=device), 4.0, -100)
    with fa.backend(backend):
        rest = for_backward(kl_stats(logits, ref_logits, *settings))
        apart = torch.empty_like(logits)
        kl_dlogits_out(apart, g, e, k, logits, ref_logits, *settings, *rest)
        kl_dlogits_out(logits, g, e, k, logits, ref_logits, *settings, *rest)
    assert torch.equal(logits, apart) and apart.abs().max() > 0.0


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_non_contiguous_and_many_dimensions(backend: str) -> None:
    device = device_of(backend)
    wide, _ = peaked_logits(24, 40, device=device)
    logits, ref_logits = (
        x.reshape(2, 3, 4, 40)[:, :, :-1, ::2].transpose(1, 2)  # every stride odd
        for x in (wide, wide.flip(0))
    )
    mask = torch.rand(2, 3, 3, device=device) < 0.8
    with fa.backend(backend):
        got = token_kl(logits, ref_logits, mask=mask)
        same = token_kl(logits.contiguous(), ref_logits.contiguous(), mask=mask.contiguous())
    assert got.shape == (2, 3, 3)
    assert torch.equal(got, same)
    log_p, log_r = (torch.log_softmax(x, -1) for x in (logits, ref_logits))
    expected = (log_p.exp() * (log_p - log_r)).sum(-1) * mask
    assert_no_worse(got, expected, expected.double(), torch.float32)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_a_slice_of_a_batch_is_read_where_it_lies(backend: str) -> None:
    """Policy logits[:, :-1] against a reference that is dense, or a slice with other strides."""
    device = device_of(backend)
    logits, _ = peaked_logits(12, 33, device=device)
    whole = logits.reshape(3, 4, 33).clone().requires_grad_()
    other = reference_of(logits.cpu()).to(device).reshape(3, 4, 33)[:, 1:]
    results = []
    for x, r in (
        (whole[:, :-1], other),
        (whole[:, :-1], other.contiguous()),
        (whole[:, :-1].contiguous(), other),
    ):
        with fa.backend(backend):
            kl = token_kl(x, r, temperature=0.9)
            (dx,) = torch.autograd.grad((kl * torch.arange(1.0, 4.0).to(kl)).sum(), whole)
        results.append((kl, dx))
    for kl, dx in results[1:]:
        assert torch.equal(kl, results[0][0]) and torch.equal(dx, results[0][1])
    assert dx[:, -1].abs().max() == 0.0 and dx[:, :-1].abs().max() > 0.0


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_tokens(backend: str, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape, device=device_of(backend), requires_grad=True)
    with fa.backend(backend):
        kl = token_kl(logits, torch.ones_like(logits))
        kl.sum().backward()
    assert kl.shape == shape[:-1]
    assert logits.grad is not None and logits.grad.shape == shape


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_temperature_per_token_is_the_float_of_that_token(backend: str) -> None:
    logits, _ = peaked_logits(3, 50)
    ref_logits = reference_of(logits)
    temperatures = [0.3, 1.0, 2.5]
    with fa.backend(backend):
        together = token_kl(logits, ref_logits, temperature=torch.tensor(temperatures))
        apart = [
            token_kl(logits[i], ref_logits[i], temperature=t) for i, t in enumerate(temperatures)
        ]
    assert torch.equal(together, torch.stack(apart))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_row_does_not_depend_on_its_neighbours(backend: str) -> None:
    device = device_of(backend)
    logits, _ = peaked_logits(7, 1031, device=device)
    ref_logits = reference_of(logits.cpu()).to(device)
    with fa.backend(backend):
        together = token_kl(logits, ref_logits)
        again = token_kl(logits, ref_logits)
        alone = [token_kl(logits[i : i + 1], ref_logits[i : i + 1]) for i in range(7)]
    assert torch.equal(together, again)
    assert torch.equal(together, torch.cat(alone))


def test_the_reference_model_gets_no_gradient() -> None:
    logits, _ = peaked_logits(3, 50)
    ref_logits = reference_of(logits).requires_grad_()
    assert not token_kl(logits, ref_logits).requires_grad
    x = logits.requires_grad_()
    token_kl(x, ref_logits).sum().backward()
    assert x.grad is not None and ref_logits.grad is None


ISA_PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_token_kl import DTYPES, adversarial_logits, against_all, compare, peaked_logits
from test_token_kl import reference_of
for dtype in DTYPES:
    logits, targets = peaked_logits(4, 1031, dtype=dtype)
    compare("cpp", logits, reference_of(logits), targets, 0.5 + torch.rand(4), 5.0)
    for name in adversarial_logits(75, dtype):
        compare("cpp", *against_all(name, dtype), torch.ones(1))
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


def test_the_ops_pass_opcheck() -> None:
    logits, targets = peaked_logits(3, 11)
    ref_logits = reference_of(logits)
    targets[1] = -100
    settings = (targets, torch.ones(1), 0.0, -100)
    rest = for_backward(kl_stats(logits, ref_logits, *settings))
    g = torch.ones(3)
    batch, ref_batch = logits.reshape(1, 3, 11), ref_logits.reshape(1, 3, 11)
    for x, r in ((logits, ref_logits), (batch, ref_batch)):
        torch.library.opcheck(kl_stats, (x.clone().requires_grad_(), r, *settings))
        for e in (g, None):
            torch.library.opcheck(kl_dlogits, (g, e, g, x, r, *settings, rest))


def test_compiles_whole_with_gradients() -> None:
    logits, _ = peaked_logits(4, 40)
    ref_logits = reference_of(logits)
    mask = torch.tensor([True, False, True, True])

    def f(x: Tensor) -> Tensor:
        return token_kl(x * 1.5, ref_logits, temperature=0.8, mask=mask).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    gradients = []
    for g in (f, compiled):
        x = logits.clone().requires_grad_()
        g(x).backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "logits dtype": (dict(logits=torch.zeros(2, 5, dtype=torch.int64)), "float logits.*int64"),
    "no columns": (dict(logits=torch.zeros(2, 0)), r"V >= 1.*\(2, 0\)"),
    "other vocabulary": (dict(ref_logits=torch.zeros(2, 6)), r"\(2, 5\), got \(2, 6\)"),
    "reference dtype": (dict(ref_logits=torch.zeros(2, 5).int()), "float ref_logits.*got.*int32"),
    "one float64": (dict(ref_logits=torch.zeros(2, 5).double()), "float64 beside torch.float32"),
    "mask shape": (dict(mask=torch.ones(3, dtype=torch.bool)), r"mask of shape \(2,\).*got.*\(3,"),
    "mask dtype": (dict(mask=torch.ones(2)), "bool.*got.*float32"),
    "temperature zero": (dict(temperature=0.0), "temperature > 0, got 0.0"),
    "temperature shape": (dict(temperature=torch.ones(3)), r"\(2,\).*got shape \(3,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    changed, message = BAD[name]
    kwargs: dict[str, Any] = {"logits": torch.zeros(2, 5), "ref_logits": torch.zeros(2, 5)}
    kwargs.update(changed)
    with pytest.raises(ValueError, match=f"token_kl: .*{message}"):
        token_kl(**kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 128_256), (70_000, 257)], ids=str)
def test_gpu_at_real_sizes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, targets = peaked_logits(*shape, dtype=dtype)
    targets[::7] = -100
    compare("triton", logits, reference_of(logits), targets, torch.full((1,), 0.9))


@pytest.mark.gpu
def test_gpu_capture_means_no_wait_for_the_device() -> None:
    logits, _ = peaked_logits(32, 32_000, dtype=torch.bfloat16, device="cuda")
    ref_logits = logits.flip(0)
    logits.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        kl = token_kl(logits, ref_logits, temperature=0.7)
        (dx,) = torch.autograd.grad(kl.sum(), logits)
        return kl.detach(), dx

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)
