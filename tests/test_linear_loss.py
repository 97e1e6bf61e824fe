"""linear_loss: any loss on log-probs in one pass equals linear_logprobs and the same loss.

Groups and gradients: tests/test_linear_loss_groups.py, tests/test_linear_loss_gradients.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from heads import (
    H,
    N,
    V,
    gradients,
    likelihood,
    make,
    policy_loss,
    rows,
)
from torch import Tensor

import fastalign as fa
from fastalign.ops.linear_logprobs import linear_logprobs
from fastalign.ops.linear_loss import LossOutput, linear_loss, linear_loss_reference
from fastalign.testing import TOLERANCES, assert_no_worse, peaked_head

CUDA = torch.cuda.is_available()
SLABS = [None, 16, 5]
SLAB_IDS = ["1 slab", "3 slabs", "8 slabs"]


@pytest.mark.parametrize("slab", SLABS, ids=SLAB_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ["plain", "bias, soft-cap, temperatures"])
def test_against_float64(head: str, dtype: torch.dtype, slab: int | None) -> None:
    hidden, weight, targets, inputs = make(dtype)
    features = head != "plain"
    softcap = 5.0 if features else None
    bias = torch.randn(V).to(dtype).requires_grad_()
    temperature = 0.5 + torch.rand(N) if features else torch.ones(1)

    def leaves_of(wide: bool) -> list[Tensor]:
        tensors = [hidden, weight, bias, inputs["values"], inputs["cost"]]
        return [
            (x.detach().double() if wide else x.detach().clone()).requires_grad_() for x in tensors
        ]

    def reference(leaves: list[Tensor]) -> list[Tensor]:
        h, w, b, values, cost = leaves
        given = inputs | {"values": values, "cost": cost}
        t = temperature.to(cost.dtype)
        loss = linear_loss_reference(
            h, w, targets, policy_loss, given, b if features else None, t, softcap or 0.0
        )
        used = [x for x in leaves if features or x is not b]
        return [loss, *gradients(loss, *used)]

    def own(leaves: list[Tensor]) -> list[Tensor]:
        h, w, b, values, cost = leaves
        given = inputs | {"values": values, "cost": cost}
        out = linear_loss(
            h,
            w,
            targets,
            policy_loss,
            given,
            bias=b if features else None,
            temperature=temperature,
            softcap=softcap,
            workspace=rows(slab, dtype),
        )
        used = [x for x in leaves if features or x is not b]
        return [out.loss, *gradients(out.loss, *used)]

    kernel, eager, truth = (
        own(leaves_of(False)),
        reference(leaves_of(False)),
        reference(leaves_of(True)),
    )
    for index, (got, rough, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        assert_no_worse(got, rough, true, dtype, grad=index > 0)


@pytest.mark.parametrize("slab", SLABS, ids=SLAB_IDS)
def test_equals_linear_logprobs_and_the_same_loss(slab: int | None) -> None:
    """The central promise: fusing changes the order of work, not the result."""
    hidden, weight, targets, inputs = make()
    leaves = (hidden, weight, inputs["values"], inputs["cost"])
    settings: dict[str, Any] = {"temperature": 0.8, "workspace": rows(slab)}
    fused = linear_loss(hidden, weight, targets, policy_loss, inputs, **settings)
    logp, entropy = linear_logprobs(hidden, weight, targets, return_entropy=True, **settings)
    kept = targets != -100
    cut: dict[str, Any] = {
        k: x[kept] if isinstance(x, Tensor) and x.dim() else x for k, x in inputs.items()
    }
    apart = policy_loss(logp[kept], entropy[kept], **cut).sum() / kept.sum()
    assert torch.equal(fused.logp, logp.detach())
    assert torch.equal(fused.entropy, entropy.detach())
    pairs = zip(gradients(fused.loss, *leaves), gradients(apart, *leaves), strict=True)
    for got, want in ((fused.loss, apart), *pairs):
        assert_no_worse(got, want, want.double(), torch.float32, grad=got is not fused.loss)


@pytest.mark.parametrize("slab", [None, 5], ids=["1 slab", "8 slabs"])
def test_triton_rows_in_the_slabs(slab: int | None) -> None:
    hidden, weight, targets, inputs = make(device="cuda" if CUDA else "cpu")
    results = []
    for backend in ("triton", "reference"):
        with fa.backend(backend):
            out = linear_loss(hidden, weight, targets, policy_loss, inputs, workspace=rows(slab))
        results.append([out.loss, *gradients(out.loss, hidden, weight)])
    for index, (got, want) in enumerate(zip(*results, strict=True)):
        assert_no_worse(got, want, want.double(), torch.float32, grad=index > 0)


@pytest.mark.parametrize("normalizer", [8.0, torch.tensor(8.0)], ids=["number", "tensor"])
def test_normalizer(normalizer: float | Tensor) -> None:
    hidden, weight, targets, inputs = make()
    count = (targets != -100).sum().item()
    default = linear_loss(hidden, weight, targets, policy_loss, inputs).loss
    loss = linear_loss(hidden, weight, targets, policy_loss, inputs, normalizer=normalizer).loss
    assert loss.item() == pytest.approx(default.item() * count / 8.0, rel=1e-5)
    (a,), (b,) = gradients(default, hidden), gradients(loss, hidden)
    assert_no_worse(b * (8.0 / count), a, a.double(), torch.float32, grad=True)


def test_a_narrow_normalizer_is_not_rounded_once_more() -> None:
    """1 / 29 in float16 is 0.03449, off by 2e-4: with float16 the division comes last."""
    hidden, weight, targets, _ = make(torch.float16)
    own, given = (
        gradients(
            linear_loss(hidden, weight, targets, likelihood, normalizer=normalizer).loss,
            hidden,
            weight,
        )
        for normalizer in (29, torch.tensor(29.0, dtype=torch.float16))
    )
    for got, want in zip(given, own, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("ignored", ["all", "no rows at all"])
def test_no_rows(ignored: str) -> None:
    hidden, weight, targets, inputs = make()
    if ignored == "all":
        targets[:] = -100
    else:
        targets, hidden = targets[:0], hidden.detach()[:0].requires_grad_()
        inputs = {k: x[:0] if isinstance(x, Tensor) and x.dim() else x for k, x in inputs.items()}
        inputs["values"] = inputs["values"].detach().requires_grad_()
    out = linear_loss(hidden, weight, targets, policy_loss, inputs)
    assert out.loss.item() == 0.0
    for grad in gradients(out.loss, hidden, weight, inputs["values"], inputs["cost"]):
        assert grad.abs().sum().item() == 0.0
    assert out.metrics["entropy"].item() == 0.0


def test_nan_in_ignored_rows_stays_there() -> None:
    hidden, weight, targets, inputs = make()
    clean = linear_loss(hidden, weight, targets, policy_loss, inputs)
    expected = gradients(clean.loss, hidden, weight)
    with torch.no_grad():
        hidden[targets == -100] = float("nan")
        inputs["advantages"][targets == -100] = float("nan")
    dirty = linear_loss(hidden, weight, targets, policy_loss, inputs)
    assert torch.equal(clean.loss, dirty.loss) and torch.equal(clean.logp, dirty.logp)
    for got, want in zip(gradients(dirty.loss, hidden, weight), expected, strict=True):
        assert torch.equal(got, want)


def test_metrics_are_the_means_they_say() -> None:
    hidden, weight, targets, inputs = make()
    ref = inputs["old_logp"] + 0.3

    def with_ref(logp: Tensor, entropy: Tensor, ref_logp: Tensor, old_logp: Tensor) -> Tensor:
        return logp - ref_logp - old_logp

    out = linear_loss(
        hidden, weight, targets, with_ref, {"ref_logp": ref, "old_logp": inputs["old_logp"]}
    )
    kept = targets != -100
    gap = (ref - out.logp)[kept].double()
    expected = {
        "entropy": out.entropy[kept].mean(),
        "ref_k1": -gap.mean(),
        "ref_k3": (gap.exp() - 1 - gap).mean(),
    }
    assert set(out.metrics) == {"entropy", "top1", "ref_k1", "ref_k3", "old_k1", "old_k3"}
    for name, value in expected.items():
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-4)
        assert out.metrics[name].dim() == 0 and not out.metrics[name].requires_grad
    assert isinstance(out, LossOutput)


@pytest.mark.parametrize("slab", [None, 8], ids=["1 slab", "5 slabs"])
def test_same_bits_again(slab: int | None) -> None:
    hidden, weight, targets, inputs = make()
    runs = []
    for _ in range(2):
        out = linear_loss(hidden, weight, targets, policy_loss, inputs, workspace=rows(slab))
        runs.append([out.loss, out.logp, *gradients(out.loss, hidden, weight)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_log_prob_does_not_depend_on_the_other_rows() -> None:
    hidden, weight, targets, _ = make()
    first = linear_loss(hidden, weight, targets, likelihood, workspace=rows(8))
    others = hidden.detach().clone()
    others[11:] = torch.randn(N - 11, H)
    second = linear_loss(others, weight, targets, likelihood, workspace=rows(8))
    assert torch.equal(first.logp[:11], second.logp[:11])
    assert not torch.equal(first.logp[11:], second.logp[11:])


def test_a_loss_without_entropy_pays_nothing_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fastalign.ops.linear_loss_walk")
    hidden, weight, targets, inputs = make()
    asked: list[bool] = []
    plain = module.dlogits_out

    def spy(out: Tensor, g: Tensor, e: Tensor | None, *rest: Any) -> None:
        asked.append(e is not None)
        plain(out, g, e, *rest)

    monkeypatch.setattr(module, "dlogits_out", spy)
    linear_loss(hidden, weight, targets, likelihood)
    linear_loss(hidden, weight, targets, policy_loss, inputs)
    assert asked == [False, True]


def test_autocast_is_followed() -> None:
    hidden, weight, targets, inputs = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_loss(hidden, weight, targets, policy_loss, inputs)
    direct = linear_loss(hidden.bfloat16(), weight.bfloat16(), targets, policy_loss, inputs)
    assert torch.equal(out.loss, direct.loss)
    for got, want in zip(
        gradients(out.loss, hidden, weight), gradients(direct.loss, hidden, weight), strict=True
    ):
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_a_loss_may_call_the_loss_head_itself() -> None:
    """The workspace that a thread keeps must not be shared by two calls at work."""
    hidden, weight, targets, _ = make()
    other = torch.randn(5, H)  # fits in the workspace that the outer call has taken

    def nested(logp: Tensor, entropy: Tensor) -> Tensor:
        with torch.no_grad():
            linear_logprobs(other, weight, targets[:5].clamp(min=0))
        return -logp

    results = []
    for loss in (likelihood, nested):
        out = linear_loss(hidden, weight, targets, loss, workspace=rows(16))
        results.append([out.loss, *gradients(out.loss, hidden, weight)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_inference_mode_leaves_nothing_behind() -> None:
    """A workspace made under inference_mode could not be written to outside of it."""
    hidden, weight, _ = peaked_head(N, H, 4001)
    targets = torch.zeros(N, dtype=torch.int64)
    with torch.inference_mode():
        quiet = linear_loss(hidden, weight, targets, likelihood).loss
    loud = linear_loss(hidden, weight.requires_grad_(), targets, likelihood).loss
    loud.backward()
    assert torch.equal(quiet, loud) and weight.grad is not None


def test_hand_worked_likelihood() -> None:
    """One token, hidden 1, weights 0 and ln 3: p = (1/4, 3/4), target 1, loss = -ln(3/4).

    dh = sum_j (p_j - onehot_j) w_j = (3/4 - 1) ln 3; dW = (1/4, -1/4).
    """
    weight = torch.tensor([[0.0], [1.0986123]], requires_grad=True)
    hidden = torch.ones(1, 1, requires_grad=True)
    out = linear_loss(hidden, weight, torch.tensor([1]), likelihood)
    dh, dw = gradients(out.loss, hidden, weight)
    assert out.loss.item() == pytest.approx(0.2876821, rel=1e-5)
    assert dh.item() == pytest.approx(-0.25 * 1.0986123, rel=1e-5)
    assert dw[:, 0].tolist() == pytest.approx([0.25, -0.25], rel=1e-5)


def test_losses_of_the_library_fit() -> None:
    hidden, weight, targets, inputs = make()
    out = linear_loss(hidden, weight, targets, fa.losses.MLE())
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)
    assert out.loss.item() == pytest.approx(
        expected.item(), abs=10 * TOLERANCES[torch.float32].floor
    )


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [None, 64 << 20], ids=["default", "64 MiB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gpu_at_real_sizes(dtype: torch.dtype, workspace: int | None) -> None:
    n = 2048
    hidden, weight, targets = peaked_head(n, 1024, 32_000, dtype=dtype, device="cuda")
    targets[::3] = -100
    advantages = torch.randn(n, device="cuda")

    def loss(logp: Tensor, entropy: Tensor, advantages: Tensor) -> Tensor:
        return -advantages * logp - 0.01 * entropy

    def results(kind: str) -> list[Tensor]:
        wide = torch.float64 if kind == "truth" else dtype
        h, w = (x.detach().to(wide).requires_grad_() for x in (hidden, weight))
        given = {"advantages": advantages}
        if kind == "kernel":
            value = linear_loss(h, w, targets, loss, given, workspace=workspace).loss
        else:
            t = torch.ones(1, device="cuda", dtype=torch.float64 if kind == "truth" else None)
            value = linear_loss_reference(h, w, targets, loss, given, None, t)
        return [value.detach(), *gradients(value, h, w)]

    outcomes = (results("kernel"), results("eager"), results("truth"))
    for index, (got, rough, true) in enumerate(zip(*outcomes, strict=True)):
        assert_no_worse(got, rough, true, dtype, grad=index > 0)
