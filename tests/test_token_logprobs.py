"""token_logprobs: three backends against float64, gradients, adversarial rows, compile, capture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.token_logprobs import (
    dlogits,
    row_stats,
    row_stats_reference,
    token_logprobs,
)
from fastalign.testing import adversarial_logits, assert_no_worse, peaked_logits

CUDA = torch.cuda.is_available()
KERNELS = ["cpp", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1),  # one token that is certain
    (3, 7),  # fewer columns than lanes
    (5, 16),  # exactly the lanes of the C++ kernel
    (4, 1031),  # a prime: a tail in every kernel
    (2, 4097),  # one column past a block of the Triton kernel
]
Outputs = tuple[Tensor, Tensor, Tensor]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and CUDA else "cpu"


def run(
    backend: str,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float = 0.0,
    with_entropy: bool = True,
) -> Outputs:
    """logp, entropy, and the gradient of sum(g logp + e entropy) for fixed g and e."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(7)
    g = torch.randn(len(targets), generator=generator)
    e = torch.randn(len(targets), generator=generator)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x, y, t, g, e = (v.to(device) for v in (logits, targets, temperature.to(wide), g, e))
    with fa.backend(backend):
        stats = row_stats(x, y, t, softcap, -100)
        e_or_none = e.to(wide) if with_entropy else None
        dx = dlogits(g.to(wide), e_or_none, x, y, t, softcap, -100, *stats)
    return stats[0].cpu(), stats[1].cpu(), dx.cpu()


def compare(backend: str, logits: Tensor, targets: Tensor, temperature: Tensor, *args) -> None:
    kernel = run(backend, logits, targets, temperature, *args)
    eager = run("reference", logits, targets, temperature, *args)
    truth = run("reference", logits.double(), targets, temperature, *args)
    for index, (got, plain, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        assert_no_worse(got, plain, true, logits.dtype, grad=index == 2)


@pytest.mark.parametrize("backend", KERNELS)
def test_the_maximum_rises_from_block_to_block(backend: str) -> None:
    """The running sums of the entropy must be shifted with every new maximum."""
    logits = 0.3 * torch.randn(2, 9000)
    logits[:, 5000], logits[:, 8500] = 2.0, 5.0
    compare(backend, logits, torch.tensor([5000, 3]), torch.tensor([1.0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_against_float64(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, targets = peaked_logits(*shape, dtype=dtype)
    compare(backend, logits, targets, torch.full((1,), 0.7))


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["no cap", "cap"])
@pytest.mark.parametrize("with_entropy", [True, False], ids=["entropy", "no entropy"])
@pytest.mark.parametrize("backend", KERNELS)
def test_features_against_float64(backend: str, with_entropy: bool, softcap: float) -> None:
    logits, targets = peaked_logits(6, 501)
    targets[2] = -100
    compare(backend, logits, targets, 0.5 + torch.rand(6), softcap, with_entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", adversarial_logits(8, torch.float32))
@pytest.mark.parametrize("backend", KERNELS)
def test_adversarial_rows(backend: str, name: str, dtype: torch.dtype) -> None:
    logits, targets = adversarial_logits(75, dtype)[name]
    compare(backend, logits, targets, torch.ones(1))


@pytest.mark.parametrize("backend", KERNELS)
def test_first_block_at_minus_infinity(backend: str) -> None:
    """A running maximum that starts at 0, or exp(-inf - -inf), would show here."""
    logits, targets = peaked_logits(3, 4500)
    logits[:, :4200] = float("-inf")
    logits[:, 4200:] -= 120.0
    targets[:] = 4300
    compare(backend, logits, targets, torch.ones(1))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_ignored_rows_are_zero_whatever_they_hold(backend: str) -> None:
    logits, targets = peaked_logits(4, 33)
    logits[1], logits[2] = float("nan"), float("inf")
    targets[1:3] = -100
    logp, entropy, dx = run(backend, logits, targets, torch.ones(1))
    for x in (logp, entropy, dx):
        assert x[1:3].abs().max() == 0.0
        assert x[[0, 3]].abs().max() > 0.0
        assert x.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nan_in_a_row_that_counts_is_seen(backend: str) -> None:
    logits, targets = peaked_logits(2, 100)
    logits[1, 57] = float("nan")
    targets[1] = 3
    logp, entropy, dx = run(backend, logits, targets, torch.ones(1))
    assert logp[0].isfinite() and logp[1].isnan() and entropy[1].isnan() and dx[1].isnan().any()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_hand_worked_row(backend: str) -> None:
    """Logits (0, ln 3) give p = (1/4, 3/4): logp = ln(3/4) for target 1, H = ln 4 - 3/4 ln 3.

    d logp / dx = (-1/4, 1/4); with temperature 2 and logits doubled p is the same and the gradient
    is halved. dH/dx_j = -p_j (log p_j + H).
    """
    entropy = math.log(4) - 0.75 * math.log(3)
    slope = -0.75 * (math.log(0.75) + entropy)
    device = device_of(backend)
    for temperature in (1.0, 2.0):
        logits = torch.tensor([[0.0, temperature * math.log(3)]], device=device, requires_grad=True)
        with fa.backend(backend):
            logp, h = token_logprobs(
                logits,
                torch.tensor([1], device=device),
                temperature=temperature,
                return_entropy=True,
            )
        assert logp.item() == pytest.approx(math.log(0.75), rel=1e-6)
        assert h.item() == pytest.approx(entropy, rel=1e-6)
        (dx,) = torch.autograd.grad(logp.sum(), logits, retain_graph=True)
        assert dx[0].tolist() == pytest.approx([-0.25 / temperature, 0.25 / temperature], rel=1e-6)
        (dx,) = torch.autograd.grad(h.sum(), logits)
        assert dx[0].tolist() == pytest.approx(
            [-slope / temperature, slope / temperature], rel=1e-5
        )


@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["no cap", "cap"])
def test_closed_form_gradient_is_autograds(softcap: float) -> None:
    logits, targets = peaked_logits(5, 23, dtype=torch.float64)
    targets[4] = -100
    temperature = 0.5 + torch.rand(5, dtype=torch.float64)

    def own(x: Tensor) -> tuple[Tensor, Tensor]:
        return row_stats(x, targets, temperature, softcap, -100)[:2]

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        return row_stats_reference(x, targets, temperature, softcap, -100)[:2]

    x = logits.clone().requires_grad_()
    weights = torch.randn(2, 5, dtype=torch.float64)
    gradients = []
    for f in (own, plain):
        logp, entropy = f(x)
        gradients.append(torch.autograd.grad((torch.stack((logp, entropy)) * weights).sum(), x)[0])
    assert_no_worse(gradients[0], gradients[1], gradients[1], torch.float64, grad=True)
    assert torch.autograd.gradcheck(own, (x,))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_non_contiguous_and_many_dimensions(backend: str) -> None:
    device = device_of(backend)
    wide, targets = peaked_logits(12, 40, device=device)
    logits = wide.reshape(3, 4, 40)[:, :-1, ::2].transpose(0, 1)  # every stride odd
    y = targets.reshape(3, 4)[:, :-1].t() % 20
    with fa.backend(backend):
        got = token_logprobs(logits, y)
        same = token_logprobs(logits.contiguous(), y.contiguous())
    assert got.shape == (3, 3)
    assert torch.equal(got, same)
    expected = torch.log_softmax(logits, -1).gather(-1, y[..., None])[..., 0]
    assert_no_worse(got, expected, expected.double(), torch.float32)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_a_slice_of_a_batch_is_read_where_it_lies(backend: str) -> None:
    """logits[:, :-1] against targets[:, 1:], the usual shift, gives the same bits as its copy."""
    device = device_of(backend)
    logits, targets = peaked_logits(12, 33, device=device)
    whole = logits.reshape(3, 4, 33).clone().requires_grad_()
    y = targets.reshape(3, 4)[:, 1:]
    y[1, 1] = -100
    results = []
    for x in (whole[:, :-1], whole[:, :-1].contiguous()):
        with fa.backend(backend):
            logp, entropy = token_logprobs(x, y, return_entropy=True)
            (dx,) = torch.autograd.grad((logp * 2.0 - entropy).sum(), whole)
        results.append((logp, entropy, dx))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert dx[:, -1].abs().max() == 0.0 and dx[:, :-1].abs().max() > 0.0


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_tokens(backend: str, shape: tuple[int, ...]) -> None:
    device = device_of(backend)
    logits = torch.zeros(shape, device=device, requires_grad=True)
    targets = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    with fa.backend(backend):
        logp, entropy = token_logprobs(logits, targets, return_entropy=True)
        (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == shape[:-1]
    assert logits.grad is not None and logits.grad.shape == shape


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_temperature_per_token_is_the_float_of_that_token(backend: str) -> None:
    logits, targets = peaked_logits(3, 50)
    temperatures = [0.3, 1.0, 2.5]
    with fa.backend(backend):
        together = token_logprobs(logits, targets, temperature=torch.tensor(temperatures))
        apart = [
            token_logprobs(logits[i], targets[i], temperature=t) for i, t in enumerate(temperatures)
        ]
    assert torch.equal(together, torch.stack(apart))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_row_does_not_depend_on_its_neighbours(backend: str) -> None:
    device = device_of(backend)
    logits, targets = peaked_logits(7, 1031, device=device)
    with fa.backend(backend):
        together = token_logprobs(logits, targets)
        again = token_logprobs(logits, targets)
        alone = torch.cat([token_logprobs(logits[i : i + 1], targets[i : i + 1]) for i in range(7)])
    assert torch.equal(together, again)
    assert torch.equal(together, alone)


def test_the_ops_pass_opcheck() -> None:
    logits, targets = peaked_logits(3, 11)
    targets[1] = -100
    temperature = torch.ones(1)
    args = (logits.requires_grad_(), targets, temperature, 0.0, -100)
    torch.library.opcheck(row_stats, args)
    stats = row_stats(*args)
    g = torch.ones(3)
    rest = tuple(x.detach() for x in stats)
    batch = logits.detach().reshape(1, 3, 11).requires_grad_()
    torch.library.opcheck(row_stats, (batch, *args[1:]))
    torch.library.opcheck(dlogits, (g, g, batch.detach(), *args[1:], *rest))
    torch.library.opcheck(dlogits, (g, g, logits.detach(), *args[1:], *rest))
    torch.library.opcheck(dlogits, (g, None, logits.detach(), *args[1:], *rest))


def test_compiles_whole_with_gradients() -> None:
    logits, targets = peaked_logits(4, 40)

    def f(x: Tensor) -> Tensor:
        logp, entropy = token_logprobs(x * 1.5, targets, temperature=0.8, return_entropy=True)
        return (logp + 0.1 * entropy).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    gradients = []
    for g in (f, compiled):
        x = logits.clone().requires_grad_()
        g(x).backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "targets shape": (
        dict(targets=torch.zeros(3, dtype=torch.int64)),
        r"shape \(2,\).*got.*\(3,\)",
    ),
    "targets dtype": (dict(targets=torch.zeros(2, dtype=torch.int32)), "int64.*got.*int32"),
    "targets device": (
        dict(targets=torch.zeros(2, dtype=torch.int64, device="meta")),
        "on cpu, got.*on meta",
    ),
    "logits dtype": (dict(logits=torch.zeros(2, 5, dtype=torch.int64)), "float logits.*int64"),
    "no columns": (dict(logits=torch.zeros(2, 0)), r"V >= 1.*\(2, 0\)"),
    "temperature zero": (dict(temperature=0.0), "temperature > 0, got 0.0"),
    "temperature NaN": (dict(temperature=float("nan")), "temperature > 0, got nan"),
    "temperature shape": (dict(temperature=torch.ones(3)), r"\(2,\).*got shape \(3,\)"),
    "temperature gradient": (dict(temperature=torch.ones(2, requires_grad=True)), "no gradient"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    changed, message = BAD[name]
    kwargs: dict[str, Any] = {
        "logits": torch.zeros(2, 5),
        "targets": torch.zeros(2, dtype=torch.int64),
    }
    kwargs.update(changed)
    with pytest.raises(ValueError, match=f"token_logprobs: .*{message}"):
        token_logprobs(**kwargs)


def test_a_target_outside_the_row_is_never_a_number() -> None:
    logits = torch.zeros(2, 5)
    targets = torch.tensor([1, 5])
    with fa.backend("cpp"), pytest.raises(RuntimeError, match=r"\[0, 5\) or -100, got 5 in row 1"):
        token_logprobs(logits, targets)
    device = device_of("triton")
    with fa.backend("triton"):
        logp = token_logprobs(logits.to(device), targets.to(device))
    assert logp[0].isfinite() and logp[1].isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 128_256), (70_000, 257)], ids=str)
def test_gpu_at_real_sizes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, targets = peaked_logits(*shape, dtype=dtype)
    targets[::7] = -100
    compare("triton", logits, targets, torch.full((1,), 0.9))


@pytest.mark.gpu
def test_gpu_capture_means_no_wait_for_the_device() -> None:
    logits, targets = peaked_logits(32, 32_000, dtype=torch.bfloat16, device="cuda")
    logits.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        logp, entropy = token_logprobs(logits, targets, temperature=0.7, return_entropy=True)
        (dx,) = torch.autograd.grad(logp.sum() + entropy.sum(), logits)
        return logp.detach(), dx

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
