"""token_kl: three backends against float64, near the reference, infinities, gradients.

What callers see of it beside its values: tests/test_token_kl_calls.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kl_rows import (
    DTYPES,
    KERNELS,
    against_all,
    compare,
    device_of,
    reference_of,
    run,
)
from torch import Tensor

import fastalign as fa
from fastalign.ops.token_kl import (
    kl_stats,
    kl_stats_reference,
    token_kl,
)
from fastalign.ops.token_logprobs import row_stats
from fastalign.testing import adversarial_logits, assert_no_worse, peaked_logits

SHAPES = [
    (1, 1),  # one token that is certain
    (3, 7),  # fewer columns than lanes
    (5, 16),  # exactly the lanes of the C++ kernel
    (4, 1031),  # a prime: a tail in every kernel
    (2, 4097),  # one column past two blocks of the Triton kernel
]


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
