"""preference_loss: three backends against float64, the loss objects and autograd; masks, bounds."""

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
from fastalign.losses import DPO, KTO, RPO, XPO, SimPO
from fastalign.losses.preference import PreferenceLoss
from fastalign.ops.preference_loss import (
    _preference_loss,
    _preference_loss_backward,
    preference_loss,
)
from fastalign.testing import assert_no_worse

KERNELS = ["cpp", "triton"]
ALL = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOSSES: dict[str, PreferenceLoss] = {
    "dpo": DPO(),
    "conservative": DPO(0.2, label_smoothing=0.1),
    "robust": DPO(0.2, "robust", label_smoothing=0.2),
    "hinge": DPO(0.1, "hinge"),
    "ipo": DPO(0.1, "ipo"),
    "ipo, means": DPO(0.1, "ipo", average=True),
    "h-dpo": DPO(0.2, alpha=0.8),
    "r-dpo": DPO(length_coef=0.02),
    "all": DPO(0.3, label_smoothing=0.1, average=True, alpha=1.3, length_coef=-0.01),
    "rpo": RPO(eta=0.3),
    "rpo, means": RPO(eta=0.3, nll="mean"),
    "xpo": XPO(alpha=0.01),
    "simpo": SimPO(2.0, 0.7, label_smoothing=0.05),
    "kto": KTO(0.2, desirable_weight=1.2, undesirable_weight=0.7),
}
# An empty chosen, an empty rejected and an empty pair; one past a block of the Triton kernel, and
# more tokens than one task of the C++ kernel has.
LENGTHS = [7, 31, 0, 5, 40, 0, 0, 0, 1024, 1025, 1, 1, 2500, 130, 9000, 7000]
Batch = dict[str, Any]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def batch(lengths: list[int], dtype: torch.dtype = torch.float32) -> Batch:
    """Log-probs a little away from the reference's, one token in ten masked."""
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths)
    logp = -2.0 * torch.rand(n, generator=generator)
    shift = 0.02 * torch.randn(len(lengths), generator=generator)
    shift = shift.repeat_interleave(torch.tensor(lengths))
    return {
        "logp": logp.to(dtype),
        "ref_logp": (logp + 0.2 * torch.randn(n, generator=generator) + shift).to(dtype),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "mask": torch.rand(n, generator=generator) < 0.9,
        "chosen_is_ref": torch.rand(len(lengths) // 2, generator=generator) < 0.5,
        "desirable": torch.rand(len(lengths), generator=generator) < 0.5,
        "z0": torch.tensor(0.3),
        "weights": torch.rand(len(lengths), generator=generator) + 0.5,
    }


def inputs_of(loss: PreferenceLoss, b: Batch) -> Batch:
    return {name: b[name] for name in loss.required if name != "cu_seqlens"}


def run(backend: str, loss: PreferenceLoss, b: Batch, masked: bool = True) -> dict[str, Tensor]:
    """losses, statistics, and the gradient of a weighted sum of the losses."""
    given = {k: x.to(device_of(backend)) for k, x in b.items()}
    leaf = given["logp"].detach().clone().requires_grad_()
    with fa.backend(backend):
        losses, statistics = preference_loss(
            loss,
            leaf,
            given["cu_seqlens"],
            mask=given["mask"] if masked else None,
            **inputs_of(loss, given),
        )
        weights = given["weights"][: len(losses)].to(losses.dtype)
        (gradient,) = torch.autograd.grad((weights * losses).sum(), leaf)
    found = {"loss": losses, "gradient": gradient, **statistics}
    return {name: x.detach().cpu() for name, x in found.items()}


def compare(backend: str, loss: PreferenceLoss, b: Batch, masked: bool = True) -> None:
    kernel, eager = run(backend, loss, b, masked), run("reference", loss, b, masked)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in b.items()}
    truth = run("reference", loss, wide, masked)
    assert list(kernel) == list(truth)
    for name, true in truth.items():
        grad = name == "gradient"
        if name == "rewards/accuracies":  # a step: rounding may go either way at 0
            sure = ~(truth["rewards/margins"].abs() < 1e-4)
            assert torch.equal(kernel[name].nan_to_num(9)[sure], true.float().nan_to_num(9)[sure])
            continue
        assert_no_worse(kernel[name], eager[name], true, b["logp"].dtype, grad=grad)


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


@pytest.mark.parametrize("name", ["all", "rpo, means", "xpo", "kto"])
@pytest.mark.parametrize("backend", ALL)
def test_nan_under_a_mask_does_not_leak(backend: str, name: str) -> None:
    b = batch([40, 17, 0, 9, 6, 6])
    b["mask"][-12:] = False  # a pair that is masked whole
    plain = run(backend, LOSSES[name], b)
    for fill in (math.nan, math.inf):
        dirty = dict(b)
        for key in ("logp", "ref_logp"):
            dirty[key] = b[key].masked_fill(~b["mask"], fill)
        for key, x in run(backend, LOSSES[name], dirty).items():
            assert torch.equal(x.nan_to_num(9.0), plain[key].nan_to_num(9.0)), key
    assert plain["loss"][-1] == 0.0 and plain["rewards/chosen"][-1].isnan()
    assert plain["gradient"][~b["mask"]].tolist() == [0.0] * int((~b["mask"]).sum())


@pytest.mark.parametrize("backend", ALL)
def test_nan_where_it_counts_stays_in_its_pair(backend: str) -> None:
    b = batch([4, 5, 6, 7])
    b["mask"][:] = True
    b["logp"][2] = math.nan
    found = run(backend, LOSSES["dpo"], b)
    assert found["loss"].isnan().tolist() == [True, False]
    assert found["gradient"].isnan().tolist() == [True] * 9 + [False] * 13


@pytest.mark.parametrize("size", [1e4, math.inf])
@pytest.mark.parametrize("backend", ALL)
def test_extreme_log_ratios(backend: str, size: float) -> None:
    """h = +-size: the loss is 0 and size, the slope of the chosen token 0 and -1; no NaN from the
    coefficients that are 0."""
    device = device_of(backend)
    logp = torch.tensor([-size, 0.0, 0.0, -size], device=device, requires_grad=True)
    with fa.backend(backend):
        losses, _ = preference_loss(
            DPO(1.0),
            logp,
            torch.tensor([0, 1, 2, 3, 4], device=device),
            ref_logp=torch.zeros(4, device=device),
        )
        (gradient,) = torch.autograd.grad(losses.sum(), logp)
    assert losses.tolist() == [size, 0.0]
    assert gradient.tolist() == [-1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", ALL)
def test_confident_pairs_keep_their_digits(backend: str) -> None:
    """h = 16: log(1 + e^-16) = 1.125351e-7 to float32's relative precision."""
    device = device_of(backend)
    with fa.backend(backend):
        losses, _ = preference_loss(
            DPO(1.0),
            torch.tensor([-4.0, -20.0], device=device),
            torch.tensor([0, 1, 2], device=device),
            ref_logp=torch.full((2,), -1.0, device=device),
        )
    assert losses.item() == pytest.approx(math.log1p(math.exp(-16.0)), rel=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_nothing_at_all(backend: str) -> None:
    device = device_of(backend)
    for sequences in (0, 4):
        logp = torch.empty(0, device=device, requires_grad=True)
        with fa.backend(backend):
            losses, found = preference_loss(
                DPO(),
                logp,
                torch.zeros(sequences + 1, dtype=torch.int32, device=device),
                ref_logp=logp.detach(),
            )
            (gradient,) = torch.autograd.grad(losses.sum(), logp)
        assert losses.tolist() == [0.0] * (sequences // 2) and gradient.shape == (0,)
        assert [len(x) for x in found.values()] == [sequences // 2] * 6


@pytest.mark.parametrize("backend", ALL)
def test_every_tensor_may_be_a_view(backend: str) -> None:
    b = batch([300, 1000, 20, 7])
    b["cu_seqlens"] = b["cu_seqlens"].int()
    views = {k: torch.stack([x, x], -1)[..., 0] for k, x in b.items()}
    plain = run(backend, LOSSES["xpo"], b)
    for key, x in run(backend, LOSSES["xpo"], views).items():
        assert torch.equal(x, plain[key])


@pytest.mark.parametrize("backend", ALL)
def test_a_pair_does_not_depend_on_its_neighbours(backend: str) -> None:
    """And so neither on how a batch is cut into micro-batches."""
    b = batch([500, 1700, 900, 20])
    whole = run(backend, LOSSES["dpo"], b)
    tail = {k: x[2200:] if len(x.shape) and len(x) == 3120 else x for k, x in b.items()}
    tail["cu_seqlens"] = b["cu_seqlens"][2:] - 2200
    tail["weights"] = b["weights"][1:]
    part = run(backend, LOSSES["dpo"], tail)
    assert torch.equal(part["loss"], whole["loss"][1:])
    assert torch.equal(part["gradient"], whole["gradient"][2200:])


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
from test_preference_loss import DTYPES, LENGTHS, LOSSES, batch, compare
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


def test_a_second_derivative_is_refused() -> None:
    b = batch([4, 5])
    leaf = b["logp"].requires_grad_()
    losses, _ = preference_loss(DPO(), leaf, b["cu_seqlens"], ref_logp=b["ref_logp"])
    (gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


P, BOUNDS = torch.zeros(9), torch.tensor([0, 4, 9])
FLAGS = torch.tensor([True, False])


@pytest.mark.parametrize(
    "loss, args, kwargs, message",
    [
        (fa.losses.PPO(), (P, BOUNDS), {}, r"expected a preference loss .*, got PPO"),
        (
            DPO(),
            (P, BOUNDS),
            {},
            r"expected ref_logp for DPO.*, missing: ref_logp, not taken: none",
        ),
        (SimPO(), (P, BOUNDS), {"ref_logp": P}, r"expected no inputs .*, not taken: ref_logp"),
        (DPO(), (P, BOUNDS), {"ref_logp": P, "z0": 0.0}, r"missing: none, not taken: z0"),
        (KTO(), (P, BOUNDS), {"ref_logp": P, "z0": 0.0}, r"missing: desirable"),
        (
            SimPO(),
            (P.long(), BOUNDS),
            {},
            r"logp \[N\] .*floating dtype, got shape \(9,\), torch.i",
        ),
        (SimPO(), (P.view(3, 3), BOUNDS), {}, r"logp \[N\] with cu_seqlens .*got shape \(3, 3\)"),
        (
            SimPO(),
            (P, BOUNDS.double()),
            {},
            r"int32 or int64 on cpu, got shape \(3,\), torch.float",
        ),
        (SimPO(), (P, torch.tensor([0, 9, 4])), {}, r"rise from 0 to N = 9, got \[0, 9, 4\]\.\.4"),
        (SimPO(), (P, torch.tensor([1, 4, 9])), {}, r"rise from 0 to N = 9, got \[1, 4, 9\]\.\.9"),
        (SimPO(), (P, torch.tensor([0, 4, 8])), {}, r"rise from 0 to N = 9, got \[0, 4, 8\]\.\.8"),
        (SimPO(), (P, torch.tensor([0, 2, 4, 9])), {}, r"\[2P \+ 1\], .*in turn, got 3 sequences"),
        (DPO(), (P, BOUNDS), {"ref_logp": P[:8]}, r"ref_logp like logp, \(9,\) on cpu, got \(8,\)"),
        (DPO(), (P, BOUNDS), {"ref_logp": P.to("meta")}, r"ref_logp like logp, .* on meta"),
        (SimPO(), (P, BOUNDS), {"mask": P[:8].bool()}, r"mask like logp, .*got \(8,\)"),
        (SimPO(), (P, BOUNDS), {"mask": P}, r"bool or integer mask, got torch.float32"),
        (
            KTO(),
            (P, BOUNDS),
            {"ref_logp": P, "z0": 0.0, "desirable": FLAGS[:1]},
            r"desirable \(2,\), bool or integer, got \(1,\) torch.bool",
        ),
        (
            XPO(),
            (P, BOUNDS),
            {"ref_logp": P, "chosen_is_ref": P[:1]},
            r"chosen_is_ref \(1,\), bool or integer, got \(1,\) torch.float32",
        ),
        (
            XPO(),
            (P, BOUNDS),
            {"ref_logp": P, "chosen_is_ref": FLAGS[:1].to("meta")},
            r"chosen_is_ref on cpu, got meta",
        ),
        (
            KTO(),
            (P, BOUNDS),
            {"ref_logp": P, "z0": P[:2], "desirable": FLAGS},
            r"z0 as a 0-d tensor, got shape \(2,\)",
        ),
    ],
)
def test_bad_input(loss: Any, args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match="^preference_loss: .*" + message):
        preference_loss(loss, *args, **kwargs)


@pytest.mark.parametrize(
    "bounds, bad",
    [
        ([0, 4, 3, 7, 9], [True, False]),  # falling inside the first pair
        ([1, 4, 5, 7, 9], [True, False]),
        ([0, 4, 5, 7, 8], [False, True]),
        ([0, 4, 5, 7, 10], [False, True]),
        ([-1, 4, 5, 7, 9], [True, False]),
    ],
)
def test_bounds_that_make_no_sense_are_nan_in_the_triton_kernel(
    bounds: list[int], bad: list[bool]
) -> None:
    """The host does not wait for a GPU to look at them."""
    from fastalign.kernels.preference_loss import preference_loss_bwd, preference_loss_fwd

    device = device_of("triton")
    logp, cu_seqlens = torch.zeros(9, device=device), torch.tensor(bounds, device=device)
    given = (logp, None, cu_seqlens, None)
    losses, slopes, _ = preference_loss_fwd(SimPO().form, *given, None, None)
    assert losses.isnan().tolist() == bad
    dlogp = preference_loss_bwd(torch.ones(2, device=device), slopes, cu_seqlens, None, 9)
    assert dlogp.shape == (9,)
    single, flags = torch.tensor(bounds[2:], device=device) - 5, torch.ones(2, device=device).bool()
    z0 = torch.zeros((), device=device)
    losses, *_ = preference_loss_fwd(KTO().form, logp[:4], logp[:4], single, None, flags, z0)
    assert losses.isnan().any() == (bounds[2] != 5 or bounds[4] != 9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_gpu_at_real_sizes(name: str, dtype: torch.dtype) -> None:
    lengths = torch.randint(1, 4000, (256,)).tolist()
    compare("triton", LOSSES[name], batch(lengths, dtype))
