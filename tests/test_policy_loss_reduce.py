"""policy_loss: reductions, masks, what overflows, and the message for each wrong input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from policies import (
    ALL,
    GSPO,
    LOSSES,
    batch,
    call,
    compare,
    critic,
    device_of,
    inputs_of,
    run,
)

import fastalign as fa
from fastalign.losses import AWR, GRPO, MLE, PPO, ValueLoss
from fastalign.ops.policy_loss import actor_critic_loss, policy_loss, value_loss


@pytest.mark.parametrize("backend", ALL)
def test_reductions_worked_by_hand(backend: str) -> None:
    """MLE on -1, -2 | -3 | none | -4, -5, -6: losses 1..6, the last one masked: 15 of five tokens;
    sequence means 1.5, 3 and 4.5.
    """
    device = device_of(backend)
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], device=device)
    mask = torch.tensor([1, 1, 1, 1, 1, 0], device=device)
    offsets = torch.tensor([0, 2, 3, 3, 6], device=device)
    half = torch.tensor(0.5, device=device)
    cases = [
        ("token_mean", None, 3.0, [1 / 5] * 5),
        ("token_mean", 10, 1.5, [1 / 10] * 5),
        ("sequence_mean", None, 3.0, [1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6]),
        ("sequence_mean", 4.0, 2.25, [1 / 8, 1 / 8, 1 / 4, 1 / 8, 1 / 8]),
        ("sum", None, 15.0, [1.0] * 5),
        ("sum", half, 30.0, [2.0] * 5),
    ]
    for reduction, normalizer, want, slopes in cases:
        leaf = logp.clone().requires_grad_()
        with fa.backend(backend):
            loss, _ = policy_loss(
                MLE(),
                leaf,
                {},
                mask=mask,
                cu_seqlens=offsets.int(),
                reduction=reduction,
                normalizer=normalizer,
            )
            (3.0 * loss).backward()
        assert leaf.grad is not None
        assert loss.item() == pytest.approx(want, rel=1e-6)
        assert leaf.grad.tolist() == pytest.approx([-3.0 * x for x in slopes] + [0.0], rel=1e-6)


@pytest.mark.parametrize("n", [7, 8, 2047, 2049, 5003])
@pytest.mark.parametrize("backend", ALL)
def test_the_mean_counts_the_tokens_of_any_mask(backend: str, n: int) -> None:
    """All losses are 1, and so is their mean, with any number of tokens kept."""
    device = device_of(backend)
    for mask in (torch.ones(n), torch.arange(n) % 3 > 0, torch.arange(n) == n - 1):
        leaf = torch.full((n,), -1.0, device=device, requires_grad=True)
        with fa.backend(backend):
            loss, _ = policy_loss(MLE(), leaf, {}, mask=mask.bool().to(device))
            loss.backward(retain_graph=True)
            loss.backward()
        assert leaf.grad is not None and loss.item() == pytest.approx(1.0, rel=1e-6)
        assert leaf.grad.sum().item() == pytest.approx(-2.0, rel=1e-5)


def test_the_losss_own_reduction_is_the_default() -> None:
    b = batch(7, 9)
    mask = torch.rand(7, 9) < 0.5
    for variant in ("grpo", "dr_grpo", "dapo"):
        loss = GRPO(variant)
        own, _ = policy_loss(loss, b["logp"], inputs_of(loss, b), mask=mask)
        named, _ = policy_loss(
            loss, b["logp"], inputs_of(loss, b), mask=mask, reduction=loss.reduction
        )
        assert torch.equal(own, named)
    mean, _ = policy_loss(PPO(), b["logp"], inputs_of(PPO(), b), reduction="token_mean")
    assert torch.equal(policy_loss(PPO(), b["logp"], inputs_of(PPO(), b))[0], mean)


@pytest.mark.parametrize("name", [*LOSSES, "gspo"])
@pytest.mark.parametrize("backend", ALL)
def test_masked_cells_do_not_leak(backend: str, name: str) -> None:
    loss, b = LOSSES.get(name, GSPO), batch(5, 300)
    mask = torch.rand(5, 300) < 0.5
    mask[2] = False
    clean = run(backend, critic(loss, 0.3, mask=mask), b)
    for poison in (math.nan, math.inf, -math.inf):
        poisoned = {name: x.masked_fill(~mask, poison) for name, x in b.items()}
        found = run(backend, critic(loss, 0.3, mask=mask), poisoned)
        for key, x in found.items():
            assert torch.equal(x, clean[key]), key
        assert found["dlogp"][~mask].abs().max() == found["dvalues"][~mask].abs().max() == 0.0
    none = run(backend, critic(loss, 0.3, mask=torch.zeros_like(mask)), b)
    assert all(x.isfinite().all() for x in none.values()) and none["loss"] == 0.0


@pytest.mark.parametrize("backend", ALL)
def test_nan_in_a_token_that_counts_is_seen(backend: str) -> None:
    for loss in (*LOSSES.values(), GSPO):
        b = batch(1, 60)
        b["logp"][0, 17] = math.nan
        assert run(backend, call(loss), b)["loss"].isnan()


@pytest.mark.parametrize("name", [*LOSSES, "gspo"])
@pytest.mark.parametrize("backend", ALL)
def test_nothing_overflows(backend: str, name: str) -> None:
    """Log-ratios and gaps of +-1e4 and +-30, advantages of both signs and 0."""
    loss = LOSSES.get(name, GSPO)
    far = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4])
    grid = torch.cartesian_prod(far, far, torch.tensor([-1.0, 0.0, 1.0]))
    b = batch(75)
    b["logp"] = torch.full((75,), -2e4)
    b |= {"old_logp": -2e4 - grid[:, 0], "ref_logp": -2e4 - grid[:, 1], "advantages": grid[:, 2]}
    found = run(backend, call(loss, cu_seqlens=torch.arange(76)), b)
    assert all(x.isfinite().all() for x in found.values())
    compare(backend, call(loss, cu_seqlens=torch.arange(76)), b)


@pytest.mark.parametrize("backend", ALL)
def test_weights_may_be_infinite_without_a_cap(backend: str) -> None:
    b = batch(3)
    b["advantages"] = torch.tensor([0.0, 50.0, 1e4])
    found = run(backend, call(AWR(0.5, weight_cap=None)), b)
    assert found["loss"] == math.inf
    assert found["dlogp"].tolist() == [pytest.approx(-1 / 3), -math.inf, -math.inf]


X = torch.zeros(2, 3)
PPO_INPUTS = {"old_logp": X, "advantages": X}
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "loss": (
        lambda: policy_loss(ValueLoss(), X, {}),
        r"policy_loss: expected a policy loss object of fastalign.losses, got ValueLoss",
    ),
    "missing": (lambda: policy_loss(PPO(), X, {"old_logp": X}), "PPO: missing inputs: advantages"),
    "unknown": (lambda: policy_loss(MLE(), X, {"weight": X}), "MLE: unknown inputs: weight"),
    "shape": (
        lambda: policy_loss(PPO(), X, {"old_logp": X, "advantages": X[0]}),
        r"PPO: expected advantages of the shape of logp, \(2, 3\), got \(3,\)",
    ),
    "device": (
        lambda: policy_loss(PPO(), X, {"old_logp": X, "advantages": X.to("meta")}),
        "policy_loss: expected advantages on cpu, got meta",
    ),
    "logp dtype": (
        lambda: policy_loss(MLE(), X.long(), {}),
        r"expected logp \[N\] or \[B, T\] of a floating dtype, got shape \(2, 3\), torch.int64",
    ),
    "logp shape": (
        lambda: policy_loss(MLE(), X, {}, cu_seqlens=torch.tensor([0, 2])),
        r"expected logp \[N\] with cu_seqlens .* got shape \(2, 3\)",
    ),
    "entropy": (
        lambda: policy_loss(MLE(), X, {}, entropy=X[:1]),
        r"policy_loss: expected entropy like logp, \(2, 3\) on cpu, got \(1, 3\) on cpu",
    ),
    "no entropy": (
        lambda: policy_loss(PPO(entropy_coef=0.1), X, PPO_INPUTS),
        "policy_loss: missing entropy",
    ),
    "mask shape": (
        lambda: policy_loss(MLE(), X, {}, mask=torch.ones(2)),
        r"expected mask like logp, \(2, 3\) on cpu, got \(2,\)",
    ),
    "mask dtype": (lambda: policy_loss(MLE(), X, {}, mask=X), "bool or integer mask, got torch.fl"),
    "offsets end": (
        lambda: policy_loss(MLE(), X[0], {}, cu_seqlens=torch.tensor([0, 2])),
        r"cu_seqlens to rise from 0 to N = 3, got \[0, 2\]..2",
    ),
    "offsets fall": (
        lambda: policy_loss(MLE(), X[0], {}, cu_seqlens=torch.tensor([0, 2, 1, 3])),
        "cu_seqlens to rise from 0 to N = 3",
    ),
    "offsets dtype": (
        lambda: policy_loss(MLE(), X[0], {}, cu_seqlens=torch.tensor([0.0, 3.0])),
        r"cu_seqlens \[S \+ 1\] of int32 or int64 on cpu, got shape \(2,\), torch.float32",
    ),
    "no sequences": (
        lambda: policy_loss(MLE(), X[0], {}, reduction="sequence_mean"),
        r"expected cu_seqlens or \[B, T\] for sequence_mean",
    ),
    "gspo without sequences": (
        lambda: policy_loss(GSPO, X[0], {}, entropy=X[0]),
        r"policy_loss: expected cu_seqlens or logp \[B, T\] for GRPO",
    ),
    "reduction": (
        lambda: policy_loss(MLE(), X, {}, reduction="mean"),
        "reduction to be one of token_mean, sequence_mean, sum, got 'mean'",
    ),
    "normalizer": (
        lambda: policy_loss(MLE(), X, {}, normalizer=0),
        "normalizer > 0 and finite, got 0",
    ),
    "normalizer tensor": (
        lambda: policy_loss(MLE(), X, {}, normalizer=torch.ones(2)),
        r"0-d tensor without gradient, got shape \(2,\)",
    ),
    "normalizer tensor of 0": (
        lambda: policy_loss(MLE(), X, {}, normalizer=torch.tensor(0.0)),
        "normalizer > 0 and finite, got 0.0",
    ),
    "normalizer tensor of NaN": (
        lambda: value_loss(ValueLoss(), X.double(), X, normalizer=torch.tensor(float("nan"))),
        "value_loss: expected normalizer > 0 and finite, got nan",
    ),
    "gspo's advantages alone may be one a sequence": (
        lambda: policy_loss(
            GRPO("gspo"), torch.zeros(2, 2), {"old_logp": X[:, 0], "advantages": X[:, 0]}
        ),
        r"GRPO: expected old_logp of the shape of logp, \(2, 2\), got \(2,\)",
    ),
    "critic": (
        lambda: value_loss(PPO(), X, X),  # type: ignore[arg-type]
        "value_loss: expected a ValueLoss of fastalign.losses, got PPO",
    ),
    "values": (
        lambda: actor_critic_loss(MLE(), X, {}, X[0], X),
        r"actor_critic_loss: expected values like logp, \(2, 3\) on cpu, got \(3,\)",
    ),
    "returns": (
        lambda: value_loss(ValueLoss(), X, X[0]),
        r"value_loss: expected returns like values, \(2, 3\) on cpu, got \(3,\)",
    ),
    "old values": (
        lambda: value_loss(ValueLoss(0.2), X, X),
        "value_loss: missing old_values",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    f, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        f()
