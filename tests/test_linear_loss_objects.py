"""linear_loss with the objects of fastalign.losses: the same as linear_logprobs and the object."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import gradients, make, rows
from torch import Tensor

from fastalign import losses
from fastalign.ops import linear_logprobs, linear_loss, policy_loss
from fastalign.testing import assert_no_worse

OBJECTS: list[tuple[Any, tuple[str, ...]]] = [
    (losses.MLE(), ()),
    (losses.MLE(), ("weights",)),
    (losses.APA(lambda_=0.5), ("advantages", "ref_logp")),
    (losses.APA(lambda_=0.5, form="repo"), ("advantages", "ref_logp")),
    (losses.AWR(beta=0.7, weight_cap=2.0), ("advantages",)),
    (losses.PPO(), ("advantages", "old_logp")),
    (
        losses.PPO(clip=0.1, clip_high=0.3, kl_coef=0.2, entropy_coef=0.05),
        ("advantages", "old_logp", "ref_logp"),
    ),
    (losses.GRPO("dapo", entropy_coef=0.05), ("advantages", "old_logp")),
    (losses.GRPO("cispo"), ("advantages", "old_logp")),
]
IDS = [f"{type(loss).__name__}-{i}" for i, (loss, _) in enumerate(OBJECTS)]


def given(names: tuple[str, ...], like: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    old = like["old_logp"].detach()
    drawn = 0.5 + torch.rand(len(old), generator=generator)
    known = {
        "advantages": like["advantages"],
        "old_logp": old,
        "ref_logp": old - 0.1,
        "weights": drawn.to(old.dtype),
    }
    return {name: known[name] for name in names}


@pytest.mark.parametrize("slab", [None, 16, 5], ids=["1 slab", "3 slabs", "8 slabs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("loss", "names"), OBJECTS, ids=IDS)
def test_equals_linear_logprobs_and_the_object(
    loss: Any, names: tuple[str, ...], dtype: torch.dtype, slab: int | None
) -> None:
    hidden, weight, targets, inputs = make(dtype)
    tensors = given(names, inputs)
    kept = targets != -100
    out = linear_loss(hidden, weight, targets, loss, tensors, workspace=rows(slab, dtype))
    own = [out.loss, *gradients(out.loss, hidden, weight)]

    def apart(wide: torch.dtype) -> list[Tensor]:
        h, w = (x.detach().to(wide).requires_grad_() for x in (hidden, weight))
        logp, entropy = linear_logprobs(h, w, targets, return_entropy=True)
        cut = {name: x[kept].to(logp.dtype) for name, x in tensors.items()}
        value = loss(logp[kept], entropy[kept], **cut).mean()
        return [value, *gradients(value, h, w)]

    for i, (got, plain, true) in enumerate(
        zip(own, apart(dtype), apart(torch.float64), strict=True)
    ):
        assert_no_worse(got, plain, true, dtype, grad=i > 0)


@pytest.mark.parametrize("slab", [None, 5], ids=["1 slab", "8 slabs"])
@pytest.mark.parametrize(("loss", "names"), OBJECTS, ids=IDS)
def test_metrics_are_those_of_policy_loss(
    loss: Any, names: tuple[str, ...], slab: int | None
) -> None:
    """Of all slabs, and the KL metrics also where the loss has no use for their inputs."""
    hidden, weight, targets, inputs = make()
    tensors = given((*names, *({"old_logp", "ref_logp"} - set(names))), inputs)
    kept = targets != -100
    out = linear_loss(hidden, weight, targets, loss, tensors, workspace=rows(slab))
    logp, entropy = linear_logprobs(hidden, weight, targets, return_entropy=True)
    cut = {name: x[kept] for name, x in tensors.items()}
    _, expected = policy_loss(loss, logp[kept], cut, entropy=entropy[kept], reduction="token_mean")
    shared = set(expected) & set(out.metrics)
    assert {"ref_k1", "ref_k3", "old_k1", "old_k3", "entropy"} <= shared
    if "old_logp" in names:
        assert {"ratio", "clip_fraction"} <= shared
    for name in shared:
        assert out.metrics[name].item() == pytest.approx(
            expected[name].item(), rel=1e-4, abs=1e-6
        ), name


def test_top1_is_the_share_of_likeliest_targets() -> None:
    hidden, weight, targets, _ = make()
    kept = targets != -100
    share = ((hidden @ weight.t()).argmax(-1) == targets)[kept].float().mean().item()
    out = linear_loss(hidden, weight, targets, losses.MLE(), workspace=rows(5))
    assert 0.2 < share < 0.9 and out.metrics["top1"].item() == pytest.approx(share)


def test_the_same_metrics_when_no_token_counts() -> None:
    hidden, weight, targets, inputs = make()
    loss, names = OBJECTS[6]
    tensors = given(names, inputs)
    some = linear_loss(hidden, weight, targets, loss, tensors).metrics
    none = linear_loss(hidden, weight, torch.full_like(targets, -100), loss, tensors)
    assert set(none.metrics) == set(some) and none.loss == 0
    assert all(value == 0 for value in none.metrics.values())


def test_two_stages_carry_the_entropys_gradient() -> None:
    hidden, weight, targets, _ = make(torch.float64)

    def spread(logp: Tensor, entropy: Tensor, cu_seqlens: Tensor) -> Tensor:
        return (logp.sum() + entropy.square().sum()).reshape(1)

    whole, cut = (
        linear_loss(hidden, weight, targets, spread, groups=(0, len(targets)), workspace=workspace)
        for workspace in (None, rows(7, torch.float64))
    )
    for got, true in zip(
        gradients(cut.loss, hidden, weight), gradients(whole.loss, hidden, weight), strict=True
    ):
        assert_no_worse(got, true, true, torch.float64, grad=True)


def test_the_kl_is_a_metric_for_any_object() -> None:
    hidden, weight, targets, _ = make()
    with torch.no_grad():
        reference = weight + 0.1 * torch.randn(weight.shape)
    out = linear_loss(
        hidden, weight, targets, losses.MLE(), ref_hidden=hidden, ref_weight=reference
    )
    plain = linear_loss(hidden, weight, targets, losses.MLE())
    assert out.metrics["kl"] > 0 and torch.equal(out.loss, plain.loss)


@pytest.mark.parametrize("dropped", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("groups", [None, (0, 20, 37)], ids=["tokens", "groups"])
def test_a_loss_may_change_its_arguments_in_place(
    groups: tuple[int, ...] | None, dropped: bool
) -> None:
    """They are its own: the caller's tensors, the outputs and the metrics stay as they are."""
    hidden, weight, targets, given = make()
    targets = targets if dropped else targets.clamp(min=0)
    inputs = {name: given[name] for name in ("advantages", "old_logp")}
    inputs |= {"cost": torch.tensor(0.5), "each": torch.rand(2 if groups else len(targets))}
    before = {name: x.clone() for name, x in inputs.items()}

    class Doubles:
        required = tuple(inputs)
        optional = ("ref_logp", "kl", "cu_seqlens")

        def __init__(self, in_place: bool) -> None:
            self.in_place = in_place

        def statistics(self, logp: Tensor, entropy: Tensor, **x: Tensor) -> dict[str, Tensor]:
            return {"gain": x["advantages"] - x["ref_logp"]}

        def __call__(self, logp: Tensor, entropy: Tensor, **x: Tensor) -> Tensor:
            for name in (*inputs, "ref_logp"):
                x[name] = x[name].mul_(2.0) if self.in_place else 2.0 * x[name]
            values = x["advantages"] * (logp - x["old_logp"]) + x["cost"] * entropy + x["kl"]
            values = values + x["ref_logp"]
            if groups is None:
                return values * x["each"]
            sums = [part.sum() for part in values.split(x["cu_seqlens"].diff().tolist())]
            return torch.stack(sums) * x["each"]

    reference = torch.randn(weight.shape)
    runs = []
    for in_place in (False, True):
        out = linear_loss(
            hidden,
            weight,
            targets,
            Doubles(in_place),
            inputs,
            groups=groups,
            ref_hidden=hidden,
            ref_weight=reference,
            workspace=rows(40),
        )
        assert "gain" in out.metrics
        tensors = (out.loss, out.ref_logp, *(out.metrics[k] for k in sorted(out.metrics)))
        runs.append([*tensors, *gradients(out.loss, hidden, weight)])
    assert all(torch.equal(inputs[name], x) for name, x in before.items())
    for got, want in zip(*runs, strict=True):
        assert torch.equal(got, want)
