"""preference_loss: three backends against float64, the loss objects and autograd; masks, bounds."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from preferences import (
    ALL,
    DTYPES,
    KERNELS,
    LENGTHS,
    LOSSES,
    batch,
    compare,
    device_of,
    inputs_of,
    run,
)
from torch import Tensor

import fastalign as fa
from fastalign.losses import DPO, KTO
from fastalign.ops.preference_loss import (
    _preference_loss,
    _preference_loss_backward,
    preference_loss,
)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_against_float64(backend: str, name: str) -> None:
    b = batch(LENGTHS)
    compare(backend, LOSSES[name], b)
    compare(backend, LOSSES[name], b, masked=False)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_narrow_log_probs(backend: str, dtype: torch.dtype) -> None:
    compare(backend, LOSSES["all"], batch([40, 17, 33, 1, 300, 2000], dtype))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_reference_of_another_dtype(backend: str) -> None:
    b = batch([40, 17], torch.bfloat16)
    b["ref_logp"] = b["ref_logp"].float() + 1e-3
    compare(backend, LOSSES["dpo"], b)
    for half in ("logp", "ref_logp"):
        mixed = batch([40, 17])
        mixed[half] = mixed[half].half()
        compare(backend, LOSSES["dpo"], mixed)


@pytest.mark.parametrize("lengths", [[65_536, 65_536], [3, 70_000, 200_000, 1]], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_long_sequences(backend: str, lengths: list[int]) -> None:
    for name in ("dpo", "simpo"):
        compare(backend, LOSSES[name], batch(lengths))


@pytest.mark.parametrize("backend", KERNELS)
def test_many_short_sequences(backend: str) -> None:
    few = backend == "triton" and not torch.cuda.is_available()
    lengths = torch.randint(0, 9, (100 if few else 20_000,)).tolist()
    compare(backend, LOSSES["dpo"], batch(lengths))
    compare(backend, LOSSES["kto"], batch(lengths))


@pytest.mark.parametrize("name", LOSSES)
def test_the_op_is_the_loss_object_and_its_autograd(name: str) -> None:
    """On the tokens that a mask keeps, cut out beforehand."""
    loss, b = LOSSES[name], batch([7, 31, 0, 5, 40, 0, 0, 0, 12, 9], torch.float64)
    found = run("reference", loss, b)
    kept = b["mask"]
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
    inputs = inputs_of(loss, b) | {"cu_seqlens": ends[b["cu_seqlens"]]}
    if "ref_logp" in inputs:
        inputs["ref_logp"] = inputs["ref_logp"][kept]
    leaf = b["logp"][kept].clone().requires_grad_()
    losses = loss(leaf, None, **inputs)
    (gradient,) = torch.autograd.grad((b["weights"][: len(losses)] * losses).sum(), leaf)
    torch.testing.assert_close(found["loss"], losses.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found["gradient"][kept], gradient, rtol=1e-12, atol=1e-13)
    assert found["gradient"][~kept].tolist() == [0.0] * int((~kept).sum())
    statistics = loss.statistics(leaf, None, **inputs)
    assert list(statistics) == list(found)[2:]
    for key, x in statistics.items():
        assert not x.requires_grad
        torch.testing.assert_close(found[key], x, rtol=1e-13, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("backend", ALL)
def test_worked_by_hand(backend: str) -> None:
    """beta .1. Pair 0: chosen log-ratios .5 + .5 = 1, rejected -.5: h = .1 + .05 = .15,
    loss log(1 + e^-.15) = .620957, slope -sigmoid(-.15) = -.462570 times beta = -.046257, and its
    opposite. Pair 1: chosen -1, rejected 1 (its NaN is masked): h = -.2, loss log(1 + e^.2) =
    .798139, slope -sigmoid(.2) beta = -.054983.
    """
    device = device_of(backend)
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -1.0, math.nan], device=device)
    gaps = torch.tensor([0.5, 0.5, -0.5, -1.0, 1.0, 0.0], device=device)
    leaf = logp.clone().requires_grad_()
    with fa.backend(backend):
        losses, found = preference_loss(
            DPO(0.1),
            leaf,
            torch.tensor([0, 2, 3, 4, 6], device=device),
            ref_logp=logp - gaps,
            mask=torch.tensor([1, 1, 1, 1, 1, 0], device=device),
        )
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    rounded = {name: [round(v, 6) for v in x.tolist()] for name, x in found.items()}
    assert [round(x, 6) for x in losses.tolist()] == [0.620957, 0.798139]
    want = [-0.046257, -0.046257, 0.046257, -0.054983, 0.054983, 0.0]
    assert [round(x, 6) for x in gradient.tolist()] == want
    assert rounded == {
        "rewards/chosen": [0.1, -0.1],
        "rewards/rejected": [-0.05, 0.1],
        "rewards/margins": [0.15, -0.2],
        "rewards/accuracies": [1.0, 0.0],
        "logps/chosen": [-3.0, -4.0],
        "logps/rejected": [-3.0, -1.0],
    }


@pytest.mark.parametrize("backend", ALL)
def test_kto_logs_each_kind_in_its_place(backend: str) -> None:
    device = device_of(backend)
    logp = torch.tensor([-1.0, -2.0, -3.0], device=device)
    with fa.backend(backend):
        losses, found = preference_loss(
            KTO(0.5),
            logp,
            torch.tensor([0, 2, 3, 3], device=device),
            ref_logp=torch.zeros_like(logp),
            desirable=torch.tensor([False, True, True], device=device),
            z0=0.0,
        )
    # sigmoid(-1.5), sigmoid(1.5), and nothing
    assert [round(x, 5) for x in losses.tolist()] == [0.18243, 0.81757, 0.0]
    nan = math.nan
    for name, want in {
        "rewards/chosen": [nan, -1.5, nan],
        "rewards/rejected": [-1.5, nan, nan],
        "logps/chosen": [nan, -3.0, nan],
        "logps/rejected": [-3.0, nan, nan],
    }.items():
        assert found[name].tolist() == pytest.approx(want, nan_ok=True)
    assert list(found) == ["rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"]


def test_cpp_gives_the_same_bits_with_any_number_of_threads() -> None:
    b = batch(LENGTHS)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpp", LOSSES["all"], b))
    finally:
        torch.set_num_threads(before)
    for key, x in results[0].items():
        assert all(torch.equal(x.nan_to_num(9), r[key].nan_to_num(9)) for r in results)


ISA_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from preferences import DTYPES, LENGTHS, LOSSES, batch, compare
for dtype in DTYPES:
    compare("cpp", LOSSES["all"], batch(LENGTHS, dtype))
    compare("cpp", LOSSES["dpo"], batch(LENGTHS, dtype), masked=False)
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


@pytest.mark.parametrize("name", ["all", "xpo", "simpo", "kto"])
def test_opcheck(name: str) -> None:
    loss, b = LOSSES[name], batch([4, 5, 0, 7])
    flags = b.get(loss.flags_name) if loss.flags_name else None
    form = loss.form
    args = (
        form.kind,
        form.average,
        list(form[2:]),
        b["logp"].requires_grad_(),
        b["ref_logp"] if "ref_logp" in loss.required else None,
        b["cu_seqlens"],
        b["mask"] if name == "all" else None,
        flags,
        b["z0"] if "z0" in loss.required else None,
    )
    # It takes two NaN for different; torch.compile is tested below.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    tests += [] if name == "kto" else ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(_preference_loss, args, test_utils=tests)
    grad, slopes = torch.rand(2 if form.paired else 4), torch.rand(4)
    torch.library.opcheck(_preference_loss_backward, (grad, slopes, b["cu_seqlens"], b["mask"], 16))


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_whole_with_gradients(name: str) -> None:
    torch._dynamo.reset()  # fourteen forms are more than it compiles of one function
    loss, b = LOSSES[name], batch([4, 5, 0, 7])
    leaf = b["logp"].requires_grad_()

    def f(logp: Tensor) -> Tensor:
        args = (loss, logp, b["cu_seqlens"])
        losses, statistics = preference_loss(*args, mask=b["mask"], **inputs_of(loss, b))
        return losses.mean() + statistics["rewards/chosen"].nansum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    got, want = compiled(leaf), f(leaf)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, leaf)[0], torch.autograd.grad(want, leaf)[0])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_second_derivative_is_refused(backend: str) -> None:
    """The slopes are constants to autograd: it would be wrong in silence."""
    b = batch([4, 5])
    leaf = b["logp"].requires_grad_()
    with fa.backend(backend):
        losses, _ = preference_loss(DPO(), leaf, b["cu_seqlens"], ref_logp=b["ref_logp"])
        (gradient,) = torch.autograd.grad(losses.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_gpu_at_real_sizes(name: str, dtype: torch.dtype) -> None:
    lengths = torch.randint(1, 4000, (256,)).tolist()
    compare("triton", LOSSES[name], batch(lengths, dtype))
