"""Preference losses in the loss head: linear_loss is linear_logprobs and the loss, pairs whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.losses import DPO, GRPO, KTO, RPO, XPO, SimPO
from fastalign.losses.preference import PreferenceLoss
from fastalign.ops import linear_logprobs, linear_loss, preference_loss
from fastalign.testing import assert_no_worse, peaked_head

LENGTHS = [6, 9, 0, 5, 12, 3, 0, 0, 7, 8]
N, H, V = sum(LENGTHS), 8, 61
LOSSES: dict[str, PreferenceLoss] = {
    "dpo": DPO(0.3),
    "ipo, means": DPO(0.3, "ipo", average=True),
    "rpo": RPO(0.3, eta=0.2),
    "xpo": XPO(0.3, alpha=0.1),
    "simpo": SimPO(0.9, 0.2),
    "kto": KTO(0.3, desirable_weight=1.5),
}
SLABS = {"1 slab": None, "whole pairs": 16, "two stages": 7}


def make(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    hidden, weight, targets = peaked_head(N, H, V, dtype)
    generator = torch.Generator().manual_seed(2)
    targets[torch.rand(N, generator=generator) < 0.2] = -100
    targets[-15:] = -100  # a pair without a token that counts
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "targets": targets,
        "groups": torch.tensor([0, *LENGTHS]).cumsum(0),
        "ref_logp": -2.0 * torch.rand(N, generator=generator).to(dtype),
        "chosen_is_ref": torch.tensor([True, False, True, False, True]),
        "desirable": torch.tensor([True, False] * 5),
        "z0": torch.tensor(0.2, dtype=dtype),
    }


def workspace(slab: int | None, dtype: torch.dtype = torch.float64) -> int | None:
    return None if slab is None else slab * V * dtype.itemsize


def inputs_of(loss: PreferenceLoss, b: dict[str, Any]) -> dict[str, Tensor]:
    return {name: b[name] for name in loss.required if name != "cu_seqlens"}


def separately(loss: PreferenceLoss, b: dict[str, Any]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The mean over pairs, from all log-probs at once."""
    logp = linear_logprobs(b["hidden"], b["weight"], b["targets"])
    losses, statistics = preference_loss(
        loss, logp, b["groups"], mask=b["targets"] != -100, **inputs_of(loss, b)
    )
    return losses.mean(), statistics


@pytest.mark.parametrize("slab", SLABS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_head_is_log_probs_and_loss(name: str, slab: str) -> None:
    loss, b = LOSSES[name], make()
    leaves = (b["hidden"], b["weight"])
    want, statistics = separately(loss, b)
    out = linear_loss(
        *leaves,
        b["targets"],
        loss,
        inputs_of(loss, b),
        groups=b["groups"],
        workspace=workspace(SLABS[slab]),
    )
    assert_no_worse(out.loss, want, want, torch.float64)
    expected = torch.autograd.grad(want, leaves)
    for got, true in zip(torch.autograd.grad(out.loss, leaves), expected, strict=True):
        assert_no_worse(got, true, true, torch.float64, grad=True)
    for key, values in statistics.items():
        assert_no_worse(out.metrics[key], values.nanmean(), values.nanmean(), torch.float64)


@pytest.mark.parametrize("slab", SLABS)
def test_in_bfloat16(slab: str) -> None:
    b, loss = make(torch.bfloat16), LOSSES["dpo"]
    leaves = (b["hidden"], b["weight"])
    out = linear_loss(
        *leaves,
        b["targets"],
        loss,
        inputs_of(loss, b),
        groups=b["groups"].tolist(),
        workspace=workspace(SLABS[slab], torch.bfloat16),
    )
    eager, _ = separately(loss, b)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in b.items()}
    wide |= {k: wide[k].detach().requires_grad_() for k in ("hidden", "weight")}
    truth, _ = separately(loss, wide)
    assert_no_worse(out.loss, eager, truth, torch.bfloat16)
    results = (
        torch.autograd.grad(out.loss, leaves),
        torch.autograd.grad(eager, leaves),
        torch.autograd.grad(truth, (wide["hidden"], wide["weight"])),
    )
    for got, plain, true in zip(*results, strict=True):
        assert_no_worse(got, plain, true, torch.bfloat16, grad=True)


def test_slabs_hold_whole_pairs_and_their_inputs() -> None:
    """Kept rows of each sequence, and flags of each pair, as the loss sees them slab by slab."""
    b, seen, flags = make(), [], []

    class Recording(XPO):
        def __call__(self, logp: Tensor, entropy: Any = None, **inputs: Any) -> Tensor:
            offsets = inputs["cu_seqlens"]
            assert offsets[0] == 0 and offsets[-1] == len(logp) <= 16
            assert len(offsets) == 2 * len(inputs["chosen_is_ref"]) + 1
            seen.append(offsets.diff().tolist())
            flags.extend(inputs["chosen_is_ref"].tolist())
            return super().__call__(logp, entropy, **inputs)

    linear_loss(
        b["hidden"],
        b["weight"],
        b["targets"],
        Recording(),
        inputs_of(XPO(), b),
        groups=b["groups"],
        workspace=workspace(16),
    )
    kept = [int((part != -100).sum()) for part in b["targets"].split(LENGTHS)]
    assert sum(seen, []) == kept and len(seen) > 1
    assert flags == b["chosen_is_ref"].tolist()


def test_a_reference_model_in_the_same_pass() -> None:
    b = make()
    ref_hidden, ref_weight, _ = peaked_head(N, 5, V, torch.float64, seed=1)
    given = (b["hidden"], b["weight"], b["targets"])
    ref_logp = linear_logprobs(ref_hidden, ref_weight, b["targets"])
    settings = {"groups": b["groups"], "workspace": workspace(16)}
    want = linear_loss(*given, DPO(), {"ref_logp": ref_logp}, **settings)
    got = linear_loss(*given, DPO(), ref_hidden=ref_hidden, ref_weight=ref_weight, **settings)
    assert_no_worse(got.loss, want.loss, want.loss, torch.float64)
    assert set(got.metrics) == {*want.metrics, "kl"}
    for key, x in want.metrics.items():
        assert_no_worse(got.metrics[key], x, x, torch.float64)


def test_metrics_of_nothing_are_nan() -> None:
    b = make()
    b["targets"][:] = -100
    out = linear_loss(
        b["hidden"],
        b["weight"],
        b["targets"],
        DPO(),
        {"ref_logp": b["ref_logp"]},
        groups=b["groups"],
    )
    assert out.loss.item() == 0.0 and out.metrics["rewards/margins"].isnan()


def test_statistics_per_token_are_still_means_over_tokens() -> None:
    b = make()
    logp = linear_logprobs(b["hidden"], b["weight"], b["targets"]).detach()
    inputs = {"old_logp": logp - 0.01, "advantages": torch.ones(N).double()}
    for slab in SLABS.values():
        out = linear_loss(
            b["hidden"],
            b["weight"],
            b["targets"],
            GRPO("gspo"),
            inputs,
            groups=b["groups"],
            workspace=workspace(slab),
        )
        assert out.metrics["ratio"].item() == pytest.approx(1.01005, rel=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"groups": [0, 9, N - 1, N]}, "^linear_loss: expected groups with 2 sequences .*, got 3$"),
        ({}, "^DPO: missing inputs: cu_seqlens$"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    b = make()
    given = (b["hidden"], b["weight"], b["targets"], DPO(), {"ref_logp": b["ref_logp"]})
    with pytest.raises(ValueError, match=message):
        linear_loss(*given, **settings)


def test_a_learned_reference_is_refused() -> None:
    b = make()
    inputs = {"ref_logp": b["ref_logp"].requires_grad_()}
    with pytest.raises(ValueError, match="DPO has no gradient in its inputs; ref_logp requires"):
        linear_loss(b["hidden"], b["weight"], b["targets"], DPO(), inputs, groups=b["groups"])
