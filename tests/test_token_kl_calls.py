"""token_kl as callers meet it: layouts, instruction sets, opcheck, compile, bad input, GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kl_rows import (
    DTYPES,
    KERNELS,
    compare,
    device_of,
    for_backward,
    reference_of,
)
from torch import Tensor

import fastalign as fa
from fastalign.ops.token_kl import (
    kl_dlogits,
    kl_dlogits_out,
    kl_stats,
    token_kl,
)
from fastalign.ops.token_logprobs import row_stats
from fastalign.testing import assert_no_worse, peaked_logits


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
from kl_rows import DTYPES, against_all, compare, reference_of
from fastalign.testing import adversarial_logits, peaked_logits
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
    "reference device": (
        dict(ref_logits=torch.zeros(2, 5, device="meta")),
        "ref_logits on cpu.*on meta",
    ),
    "mask device": (
        dict(mask=torch.ones(2, dtype=torch.bool, device="meta")),
        "mask of shape.*on cpu, got.*on meta",
    ),
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
