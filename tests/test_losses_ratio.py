"""PPO, GRPO and its variants: bounds by hand, what they have in common, on-policy, overflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastalign.losses import GRPO, PPO
from fastalign.losses.grpo import VARIANTS
from fastalign.testing import TOLERANCES

DOUBLE = TOLERANCES[torch.float64]


def double(rows: list) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (2.0, 1.0, -2.0, -2.0),  # inside the band
        (2.0, 1.5, -2.6, 0.0),  # clipped at 1.3: no reason to raise it further
        (2.0, 0.5, -1.0, -1.0),  # below the band, but a good token: the minimum is unclipped
        (-2.0, 0.5, 1.6, 0.0),  # clipped at 0.8
        (-2.0, 1.5, 3.0, 3.0),  # above the band and a bad token: unclipped
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_ppo_cases(advantage: float, ratio: float, loss: float, slope: float) -> None:
    """clip .2 below and .3 above; loss = -min(ratio A, clamp(ratio) A), slope = dloss/dlogp."""
    old_logp = double([-1.0])
    logp = (old_logp + math.log(ratio)).requires_grad_()
    got = PPO(clip=0.2, clip_high=0.3)(
        logp, None, old_logp=old_logp, advantages=double([advantage])
    )
    (gradient,) = torch.autograd.grad(got.sum(), logp)
    assert round(got.item(), 9) == loss
    assert round(gradient.item(), 9) == slope


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope, clipped",
    [
        (-2.0, 2.5, 5.0, 5.0, 0.0),  # a bad token, not yet at the dual clip
        (-2.0, 9.0, 6.0, 0.0, 1.0),  # c = 3: loss -c A
        (-2.0, 0.5, 1.6, 0.0, 1.0),  # the lower bound as before
        (2.0, 9.0, -2.4, 0.0, 1.0),  # a good token: the upper bound as before
        (0.0, 9.0, 0.0, 0.0, 0.0),  # beyond the bounds, but there is nothing to clip
    ],
)
def test_dual_clip(
    advantage: float, ratio: float, loss: float, slope: float, clipped: float
) -> None:
    inputs = {"old_logp": double([-9.0]), "advantages": double([advantage])}
    logp = (inputs["old_logp"] + math.log(ratio)).requires_grad_()
    ppo = PPO(dual_clip=3.0)
    got = ppo(logp, None, **inputs)
    (gradient,) = torch.autograd.grad(got.sum(), logp)
    assert round(got.item(), 9) == loss
    assert round(gradient.item(), 9) == slope
    found = ppo.statistics(logp, None, **inputs)
    assert round(found["ratio"].item(), 9) == ratio
    assert found["clip_fraction"].item() == clipped


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo"])
def test_these_variants_are_ppo_with_their_own_bounds(variant: str) -> None:
    logp, old_logp, advantages, ref_logp, entropy = torch.randn(5, 400, dtype=torch.float64)
    inputs = {"old_logp": old_logp, "advantages": advantages, "ref_logp": ref_logp}
    rest: Any = {"kl_coef": 0.04, "kl_kind": "k3", "entropy_coef": 0.01, "dual_clip": 3.0}
    ppo = PPO(clip=0.2, clip_high=0.28 if variant == "dapo" else 0.2, **rest)
    grpo = GRPO(variant, **rest)
    assert torch.equal(grpo(logp, entropy, **inputs), ppo(logp, entropy, **inputs))
    found, expected = grpo.statistics(logp, None, **inputs), ppo.statistics(logp, None, **inputs)
    for name in ("ratio", "clip_fraction"):
        assert torch.equal(found[name], expected[name])
    assert 0.3 < found["clip_fraction"].mean() < 0.6
    own = GRPO(variant, clip=0.1, clip_high=0.5)
    assert torch.equal(own(logp, None, **inputs), PPO(0.1, 0.5)(logp, None, **inputs))


def test_what_each_variant_averages_over() -> None:
    assert {name: GRPO(name).reduction for name in VARIANTS} == {
        "grpo": "sequence_mean",
        "dr_grpo": "sum",
        "dapo": "token_mean",
        "cispo": "token_mean",
        "gspo": "sequence_mean",
    }


def test_cispo_worked_by_hand() -> None:
    """Ratios 1, 2, 9 and .1 with A 3, 3, 3, -3: weights 1, 2, 5, .1; loss -w A logp; every token
    keeps the gradient -w A.
    """
    logp = double([-1.0, -1.0, -2.0, -1.0]).requires_grad_()
    old_logp = logp.detach() - double([1.0, 2.0, 9.0, 0.1]).log()
    inputs = {"old_logp": old_logp, "advantages": double([3.0, 3.0, 3.0, -3.0])}
    loss = GRPO("cispo")(logp, None, **inputs)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert [round(x, 9) for x in loss.tolist()] == [3.0, 6.0, 30.0, -0.3]
    assert [round(x, 9) for x in gradient.tolist()] == [-3.0, -6.0, -15.0, 0.3]
    found = GRPO("cispo").statistics(logp, None, **inputs)
    assert found["clip_fraction"].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert [round(x, 9) for x in found["ratio"].tolist()] == [1.0, 2.0, 9.0, 0.1]
    both = GRPO("cispo", clip=0.5, clip_high=0.5)(logp, None, **inputs)
    assert [round(x, 9) for x in both.tolist()] == [3.0, 4.5, 9.0, -1.5]


def test_gspo_worked_by_hand() -> None:
    """Sequences of 2, 0 and 3 tokens, mean log-ratios log 2, none, log .5; clip .2 and .3.

    A 4 and -4: the first is clipped at 1.3 (loss -5.2), the last at .8 (loss 3.2). A -4 and 4: the
    first stays (loss 8, gradient 8 / 2 per token), the last too (loss -2, gradient -2 / 3).
    """
    log2 = math.log(2.0)
    logp = double([-1.0, -2.0, -3.0, -1.0, -1.0]).requires_grad_()
    gaps = double([2 * log2, 0.0, -log2, -2 * log2, 0.0])
    inputs = {"old_logp": logp.detach() - gaps, "cu_seqlens": torch.tensor([0, 2, 2, 5])}
    gspo = GRPO("gspo", clip=0.2, clip_high=0.3)
    clipped = gspo(logp, None, advantages=double([4.0, 9.0, -4.0]), **inputs)
    assert [round(x, 9) for x in clipped.tolist()] == [-5.2, 0.0, 3.2]
    (gradient,) = torch.autograd.grad(clipped.sum(), logp)
    assert gradient.tolist() == [0.0] * 5
    advantages = double([-4.0, 9.0, 4.0])
    loss = gspo(logp, None, advantages=advantages, **inputs)
    assert [round(x, 9) for x in loss.tolist()] == [8.0, 0.0, -2.0]
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert [round(x, 9) for x in gradient.tolist()] == [4.0, 4.0] + [round(-2 / 3, 9)] * 3
    per_token = advantages[torch.tensor([0, 0, 2, 2, 2])] + double([1.0, -1.0, 0.0, 1.0, -1.0])
    assert torch.equal(gspo(logp, None, advantages=per_token, **inputs), loss)
    found = gspo.statistics(logp, None, advantages=double([4.0, 9.0, 4.0]), **inputs)
    assert [round(x, 9) for x in found["ratio"].tolist()] == [2.0, 2.0, 0.5, 0.5, 0.5]
    assert found["clip_fraction"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_gspo_of_single_tokens_is_ppo_and_averages_kl_and_entropy() -> None:
    logp, old_logp, advantages, ref_logp, entropy = 0.1 * torch.randn(5, 60, dtype=torch.float64)
    inputs = {"old_logp": old_logp, "advantages": advantages, "ref_logp": ref_logp}
    rest: Any = {"clip": 0.1, "clip_high": 0.2, "kl_coef": 0.5, "entropy_coef": 0.3}
    singles = GRPO("gspo", **rest)(logp, entropy, cu_seqlens=torch.arange(61), **inputs)
    ppo = PPO(**rest)(logp, entropy, **inputs)
    assert (singles - ppo).abs().max().item() <= DOUBLE.floor
    pairs = torch.arange(0, 61, 2)
    whole = GRPO("gspo", **rest)(logp, entropy, cu_seqlens=pairs, **inputs)
    plain = GRPO("gspo", clip=0.1, clip_high=0.2)(logp, None, cu_seqlens=pairs, **inputs)
    gap = (ref_logp - logp).exp() - 1 - (ref_logp - logp)
    terms = (0.5 * gap - 0.3 * entropy).view(30, 2).mean(1)
    assert (whole - plain - terms).abs().max().item() <= DOUBLE.floor


@pytest.mark.parametrize("loss", [PPO(), *(GRPO(v) for v in VARIANTS if v != "gspo")], ids=str)
def test_on_policy_the_gradient_is_minus_the_advantage(loss) -> None:
    logp = torch.randn(50, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(50, dtype=torch.float64)
    values = loss(logp, None, old_logp=logp.detach(), advantages=advantages)
    (gradient,) = torch.autograd.grad(values.sum(), logp)
    assert torch.equal(gradient, -advantages)


def test_on_policy_gspo_spreads_the_advantage_over_the_sequence() -> None:
    logp = torch.randn(6, dtype=torch.float64, requires_grad=True)
    inputs = {"old_logp": logp.detach(), "cu_seqlens": torch.tensor([0, 2, 6])}
    loss = GRPO("gspo")(logp, None, advantages=double([3.0, -2.0]), **inputs)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert gradient.tolist() == [-1.5, -1.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_overflows(variant: str, kl_kind: str, dtype: torch.dtype) -> None:
    """Log-ratios and gaps to the reference of +-1e4, advantages of both signs and 0."""
    far = torch.tensor([-1e4, 0.0, 1e4])
    grid = torch.cartesian_prod(far, far, torch.tensor([-1.0, 0.0, 1.0])).to(dtype)
    logp = torch.full((27,), -2e4, dtype=dtype, requires_grad=True)
    inputs = {"old_logp": -2e4 + grid[:, 0], "ref_logp": -2e4 + grid[:, 1]}
    inputs["advantages"] = grid[:, 2]
    if variant == "gspo":
        inputs["cu_seqlens"] = torch.arange(28)
    loss = GRPO(variant, kl_coef=0.1, kl_kind=kl_kind)(logp, None, **inputs)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_ppo_equals_the_textbook_form() -> None:
    logp, old_logp, advantages, ref_logp, entropy = torch.randn(5, 400, dtype=torch.float64)
    logp.requires_grad_()
    entropy.requires_grad_()
    ratio = torch.exp(logp - old_logp)
    textbook = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    textbook = textbook + 0.1 * (torch.exp(ref_logp - logp) - 1 - (ref_logp - logp))
    textbook = textbook - 0.01 * entropy
    inputs = {"old_logp": old_logp, "advantages": advantages, "ref_logp": ref_logp}
    got = PPO(kl_coef=0.1, entropy_coef=0.01)(logp, entropy, **inputs)
    assert (got - textbook).abs().max().item() <= DOUBLE.floor
    for leaf in (logp, entropy):
        (one,) = torch.autograd.grad(got.sum(), leaf, retain_graph=True)
        (other,) = torch.autograd.grad(textbook.sum(), leaf, retain_graph=True)
        assert (one - other).abs().max().item() <= DOUBLE.grad_floor


@pytest.mark.parametrize("kind, want", [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_ppo_kl_kinds(kind: str, want: float) -> None:
    """logp - ref_logp = .5 and A = 0, so the loss is 2 kl."""
    inputs = {name: double([-1.0]) for name in ("old_logp", "ref_logp")}
    loss = PPO(kl_coef=2.0, kl_kind=kind)(double([-0.5]), advantages=double([0.0]), **inputs)
    assert round(loss.item(), 12) == round(2.0 * want, 12)


def test_ppo_takes_no_clip_at_all() -> None:
    """A clip of 1 or more leaves the ratio free below; a huge one leaves it free on both sides."""
    inputs = {"old_logp": double([-9.0, 0.0]), "advantages": double([1.0, -1.0])}
    loss = PPO(clip=1e6)(double([0.0, -9.0]), **inputs)
    assert [round(x, 9) for x in loss.tolist()] == [
        round(-math.exp(9.0), 9),
        round(math.exp(-9.0), 9),
    ]


def test_ppo_survives_a_ratio_that_overflows() -> None:
    """Log-ratios of +-1e4: clipped tokens have gradient 0; a bad token's ratio counts as exp(20),
    and its loss is constant there.
    """
    logp = torch.tensor([0.0, 0.0, 0.0, -1e4, -1e4], requires_grad=True)
    inputs = {
        "old_logp": torch.tensor([-1e4, -1e4, -1e4, 0.0, 0.0]),
        "advantages": torch.tensor([1.0, 0.0, -1.0, 1.0, -1.0]),
    }
    loss = PPO()(logp, **inputs)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert [round(x, 6) for x in loss.tolist()] == [-1.2, 0.0, 485165184.0, 0.0, 0.8]
    assert gradient.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0]
