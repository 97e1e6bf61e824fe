"""DPO, RPO, XPO, SimPO, KTO: published values, gradients and optima by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from preferences import CHOSEN, REF_CHOSEN, REF_REJECTED, REJECTED, packed, random_pairs
from torch import Tensor

import fastalign as fa
from fastalign.losses import DPO, KTO, RPO, XPO, SimPO
from fastalign.losses.preference import PreferenceLoss
from fastalign.testing import TOLERANCES

DOUBLE = TOLERANCES[torch.float64]


def published(loss: PreferenceLoss, **inputs: Any) -> float:
    """The value of the published pair, to nine digits, by the object and by preference_loss."""
    logp, ref_logp = packed(CHOSEN, REJECTED), packed(REF_CHOSEN, REF_REJECTED)
    if "ref_logp" in loss.required:
        inputs["ref_logp"] = ref_logp
    cu_seqlens = torch.tensor([0, 8, 13])
    (value,) = loss(logp, None, cu_seqlens=cu_seqlens, **inputs).tolist()
    losses, _ = fa.ops.preference_loss(loss, logp, cu_seqlens, **inputs)
    assert losses.item() == pytest.approx(value, rel=1e-12)
    narrow = {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()}
    losses, _ = fa.ops.preference_loss(loss, logp.float(), cu_seqlens, **narrow)
    assert losses.item() == pytest.approx(value, rel=1e-5)
    return round(value, 9)


@pytest.mark.parametrize(
    "loss, want",
    [
        # Log-ratios 1 and -.5: h = .1 (1 + .5) = .15, log(1 + e^-.15)
        (DPO(), 0.620957048),
        # .9 log(1 + e^-.15) + .1 log(1 + e^.15) = .620957048 + .1 x .15
        (DPO(label_smoothing=0.1), 0.635957048),
        # (.9 x .620957048 - .1 x .770957048) / .8
        (DPO(variant="robust", label_smoothing=0.1), 0.602207048),
        # 1 - .15
        (DPO(variant="hinge"), 0.85),
        # (1.5 - 1 / (2 x .1))^2 = 3.5^2
        (DPO(variant="ipo"), 12.25),
        # Means 1/8 and -.5/5: (.225 - 5)^2
        (DPO(variant="ipo", average=True), 22.800625),
        # .1 (.8 x 2 - .5) = .11, log(1 + e^-.11)
        (DPO(alpha=0.8), 0.639658919),
        (DPO(alpha=0.9), 0.630258195),
        # h = .15 + .01 (8 - 5) = .18, log(1 + e^-.18)
        (DPO(length_coef=0.01), 0.607191725),
        # .620957048 + .005 x .1 x 10
        (RPO(), 0.625957048),
        # .620957048 + .2 x 10 / 8
        (RPO(eta=0.2, nll="mean"), 0.870957048),
        # .620957048 + .005 x 10 / 8: a DPO loss and a supervised one, weights 1 and .005
        (RPO(eta=0.005, nll="mean"), 0.627207048),
        # 2 (-10 / 8 + 12 / 5) - .5 = 1.8, log(1 + e^-1.8)
        (SimPO(2.0, 0.5), 0.152977611),
        # .9 x .152977611 + .1 x 1.952977611
        (SimPO(2.0, 0.5, label_smoothing=0.1), 0.332977611),
    ],
    ids=str,
)
def test_published_pair(loss: PreferenceLoss, want: float) -> None:
    assert published(loss) == want


def test_published_pair_of_xpo() -> None:
    """.620957048 + 1e-5 x -12 where the rejected one is the reference's, x -10 where the chosen."""
    assert published(XPO(), chosen_is_ref=torch.tensor([False])) == 0.620837048
    assert published(XPO(), chosen_is_ref=torch.tensor([True])) == 0.620857048


def test_kto_worked_by_hand() -> None:
    """Log-ratios 1 and -.5, z0 = .2: sigmoid(-.1 x .8) = .480011, 1.5 sigmoid(.1 x -.7) =
    1.5 x .482507; the other way round 1.5 sigmoid(.08) = 1.5 x .519989 and sigmoid(.07) = .517493.
    """
    logp, ref_logp = packed(CHOSEN, REJECTED), packed(REF_CHOSEN, REF_REJECTED)
    loss = KTO(0.1, undesirable_weight=1.5)
    inputs = {"cu_seqlens": torch.tensor([0, 8, 13]), "ref_logp": ref_logp}
    inputs["z0"] = torch.tensor(0.2)
    values = loss(logp, None, desirable=torch.tensor([True, False]), **inputs)
    assert [round(x, 6) for x in values.tolist()] == [0.480011, 0.723761]
    values = loss(logp, None, desirable=torch.tensor([False, True]), **inputs)
    assert [round(x, 6) for x in values.tolist()] == [0.779984, 0.517493]


def test_ktos_baseline() -> None:
    """Sums of log-ratios .6 and -.2 over two sequences: z0 = .2; turned round: no less than 0."""
    logp, ref_logp = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.4, -2.2, -2.8])
    z0 = KTO.baseline(logp.requires_grad_(), ref_logp, 2)
    assert z0.item() == pytest.approx(0.2) and z0.dim() == 0 and not z0.requires_grad
    assert KTO.baseline(ref_logp, logp, 2).item() == 0.0
    with pytest.raises(ValueError, match=r"KTO.baseline: .* got \(3,\), \(2,\) and 2 sequences"):
        KTO.baseline(logp, ref_logp[:2], 2)
    with pytest.raises(ValueError, match="and 0 sequences"):
        KTO.baseline(logp, ref_logp, 0)


def sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in x.split(cu_seqlens.diff().tolist())])


def textbook(loss: PreferenceLoss, b: dict[str, Tensor]) -> Tensor:
    """The formulas as their papers write them."""
    w, r = sums(b["logp"], b["cu_seqlens"]).view(-1, 2).unbind(1)
    ref_w, ref_l = sums(b["ref_logp"], b["cu_seqlens"]).view(-1, 2).unbind(1)
    n_w, n_l = b["cu_seqlens"].diff().double().view(-1, 2).unbind(1)
    if isinstance(loss, SimPO):
        return -F.logsigmoid(loss.beta / n_w * w - loss.beta / n_l * r - loss.gamma)
    if isinstance(loss, (RPO, XPO)):
        dpo = -F.logsigmoid(loss.beta * (w - ref_w - r + ref_l))
        if isinstance(loss, XPO):
            return dpo + loss.alpha * torch.where(b["chosen_is_ref"], w, r)
        return dpo - (loss.eta * loss.beta * w if loss.nll == "sum" else loss.eta * w / n_w)
    assert isinstance(loss, DPO)
    if loss.average:
        w, r, ref_w, ref_l = w / n_w, r / n_l, ref_w / n_w, ref_l / n_l
    h = loss.beta * (loss.alpha * (w - r) - (ref_w - ref_l)) + loss.length_coef * (n_w - n_l)
    eps = loss.label_smoothing
    if loss.variant == "hinge":
        return (1.0 - h).clamp(min=0.0)
    if loss.variant == "ipo":
        return (h / loss.beta - 1.0 / (2.0 * loss.beta)) ** 2
    sign = -1.0 if loss.variant == "robust" else 1.0
    both = -(1.0 - eps) * F.logsigmoid(h) - sign * eps * F.logsigmoid(-h)
    return both / (1.0 - 2.0 * eps) if loss.variant == "robust" else both


@pytest.mark.parametrize(
    "loss",
    [
        DPO(0.4),
        DPO(0.4, label_smoothing=0.2),
        DPO(0.4, "robust", label_smoothing=0.3),
        DPO(0.4, "hinge", length_coef=0.1),
        DPO(0.4, "ipo", average=True),
        DPO(0.4, alpha=1.4, length_coef=-0.2, average=True),
        RPO(0.4, eta=0.3),
        RPO(0.4, eta=0.3, nll="mean"),
        XPO(0.4, alpha=0.1),
        SimPO(3.0, 0.6),
    ],
    ids=str,
)
def test_textbook_forms_and_gradients(loss: PreferenceLoss) -> None:
    b = random_pairs()
    b["chosen_is_ref"] = torch.rand(30) < 0.5
    leaf = b["logp"].requires_grad_()
    inputs = {name: b[name] for name in loss.required}
    got, want = loss(leaf, None, **inputs), textbook(loss, b)
    assert (got - want).abs().max() <= DOUBLE.floor * want.abs().max().clamp(min=1)
    (gradient,) = torch.autograd.grad(got.sum(), leaf)
    (expected,) = torch.autograd.grad(want.sum(), leaf)
    assert (gradient - expected).abs().max() <= DOUBLE.grad_floor * expected.abs().max()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_h_dpos_optimum_is_the_tempered_tilt(alpha: float) -> None:
    """Three responses of one token each, all pairs, labels drawn by Bradley-Terry of a reward r.

    The mean loss over the labels is least, its gradient zero, at pi ~ ref^(1/alpha)
    exp(r / (alpha beta)): entropies 2 and more would follow from any other place of alpha.
    """
    beta = 0.7
    reward = torch.tensor([0.0, 0.8, -0.5], dtype=torch.float64)
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    optimum = torch.softmax(ref.log() / alpha + reward / (alpha * beta), 0)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    order = torch.tensor(pairs).flatten()
    share = torch.sigmoid(torch.stack([reward[i] - reward[j] for i, j in pairs]))

    def gradient_at(p: Tensor) -> Tensor:
        z = p.log().requires_grad_()
        losses = DPO(beta, alpha=alpha)(
            torch.log_softmax(z, 0)[order],
            None,
            ref_logp=ref.log()[order],
            cu_seqlens=torch.arange(13),
        )
        return torch.autograd.grad((share * losses).sum(), z)[0]

    assert gradient_at(optimum).abs().max() <= DOUBLE.grad_floor
    assert gradient_at(ref).abs().max() > 0.05
    spread = -(optimum * optimum.log()).sum()
    plain = torch.softmax(ref.log() + reward / beta, 0)
    assert (spread - -(plain * plain.log()).sum()).sign() == math.copysign(
        alpha != 1.0, alpha - 1.0
    )


def test_robust_is_unbiased_and_conservative_is_not() -> None:
    """With labels turned round with chance eps, the mean robust loss is that of clean labels."""
    b, eps = random_pairs(), 0.2
    flipped = dict(b)
    order = torch.arange(60).view(-1, 2).flip(1).flatten()
    lengths = b["cu_seqlens"].diff()
    for name in ("logp", "ref_logp"):
        parts = b[name].split(lengths.tolist())
        flipped[name] = torch.cat([parts[i] for i in order])
    flipped["cu_seqlens"] = torch.cat([torch.zeros(1).long(), lengths[order].cumsum(0)])

    def mean(loss: DPO) -> Tensor:
        return (1.0 - eps) * loss(entropy=None, **b) + eps * loss(entropy=None, **flipped)

    clean = DPO(0.4)(entropy=None, **b)
    robust = mean(DPO(0.4, "robust", label_smoothing=eps))
    assert (robust - clean).abs().max() <= DOUBLE.floor * 10
    assert (mean(DPO(0.4, label_smoothing=eps)) - clean).abs().max() > 0.01


def test_statistics() -> None:
    """r = .1 x log-ratio: .1 and -.05. H-DPO: .1 (.8 x -10 + 11) = .3 and .1 (.8 x -12 + 11.5) =
    .19. Means: .1 / 8 and -.05 / 5, log-probs -10 / 8 and -12 / 5. R-DPO adds .01 x 8 and x 5."""
    logp, ref_logp = packed(CHOSEN, REJECTED), packed(REF_CHOSEN, REF_REJECTED)
    inputs = {"ref_logp": ref_logp, "cu_seqlens": torch.tensor([0, 8, 13])}
    for loss, chosen, rejected, logps in [
        (DPO(), 0.1, -0.05, (-10.0, -12.0)),
        (DPO(alpha=0.8), 0.3, 0.19, (-10.0, -12.0)),
        (DPO(average=True), 0.0125, -0.01, (-1.25, -2.4)),
        (DPO(length_coef=0.01), 0.18, 0.0, (-10.0, -12.0)),
        (RPO(), 0.1, -0.05, (-10.0, -12.0)),
    ]:
        found = {k: round(x.item(), 9) for k, x in loss.statistics(logp, **inputs).items()}
        assert found == {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": round(chosen - rejected, 9),
            "rewards/accuracies": 1.0,
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
        }
    del inputs["ref_logp"]
    found = {k: x.item() for k, x in SimPO(2.0).statistics(logp, **inputs).items()}
    # Without gamma, as the rewards are.
    assert round(found["rewards/margins"], 9) == 2.3


def test_means_instead_of_sums_do_not_see_length() -> None:
    """A response said twice over: the same mean, twice the sum."""
    once, ref = torch.tensor([-1.0, -3.0, -2.0, -2.5]).double(), torch.full((4,), -2.0).double()
    cu_seqlens = torch.tensor([0, 2, 4])
    twice = torch.cat([once[:2], once]), torch.cat([ref[:2], ref]), torch.tensor([0, 4, 6])
    for average, same in ((True, True), (False, False)):
        loss = DPO(1.0, average=average)
        one = loss(once, None, ref_logp=ref, cu_seqlens=cu_seqlens)
        other = loss(twice[0] - 0.1, None, ref_logp=twice[1], cu_seqlens=twice[2])
        shifted = loss(once - 0.1, None, ref_logp=ref, cu_seqlens=cu_seqlens)
        assert (other == pytest.approx(shifted.item(), rel=1e-12)) is same
        assert one.shape == (1,)


@pytest.mark.parametrize("loss", [DPO(0.2, alpha=0.9), XPO(), KTO()], ids=str)
def test_compiles_without_a_graph_break(loss: PreferenceLoss) -> None:
    b: dict[str, Any] = random_pairs(4)
    b |= {"chosen_is_ref": torch.arange(4) > 1, "desirable": torch.arange(8) > 3}
    b["z0"] = torch.tensor(0.1)
    inputs = {name: b[name] for name in loss.required}
    torch._dynamo.reset()
    compiled = torch.compile(loss.__call__, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(b["logp"], None, **inputs), loss(b["logp"], None, **inputs))


def test_objects_are_frozen_comparable_and_say_what_they_take() -> None:
    assert DPO() == DPO(0.1) != DPO(0.2) and len({SimPO(), SimPO(), SimPO(3.0)}) == 2
    assert DPO().required == ("ref_logp", "cu_seqlens") and SimPO().required == ("cu_seqlens",)
    assert DPO().sequences_per_value == 2 and KTO().sequences_per_value == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        DPO().beta = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DPO(0.0), "DPO: expected beta > 0 and finite, got DPO"),
        (lambda: DPO(0.1, "cdpo"), "DPO: expected variant to be one of sigmoid, robust, hinge"),
        (lambda: DPO(label_smoothing=0.5), r"DPO: expected label_smoothing in \[0, 0.5\)"),
        (lambda: DPO(0.1, "ipo", 0.1), "DPO: expected no label_smoothing: ipo"),
        (lambda: DPO(alpha=0.0), "DPO: expected alpha > 0 and finite"),
        (lambda: DPO(length_coef=math.inf), "DPO: expected a finite length_coef"),
        (lambda: RPO(eta=-1.0), "RPO: expected eta >= 0 and finite"),
        (lambda: RPO(nll="both"), "RPO: expected nll to be sum or mean"),
        (lambda: RPO(beta=-1.0), "RPO: expected beta > 0 and finite"),
        (lambda: XPO(alpha=-1.0), "XPO: expected alpha >= 0 and finite"),
        (lambda: XPO(beta=math.inf), "XPO: expected beta > 0 and finite"),
        (lambda: SimPO(beta=0.0), "SimPO: expected beta > 0 and finite"),
        (lambda: SimPO(gamma=math.nan), "SimPO: expected a finite gamma"),
        (lambda: SimPO(label_smoothing=-0.1), "SimPO: expected label_smoothing in"),
        (lambda: KTO(beta=0.0), "KTO: expected beta > 0 and finite"),
        (lambda: KTO(undesirable_weight=-1.0), "KTO: expected weights >= 0 and finite"),
    ],
)
def test_bad_parameters(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


P, BOUNDS = torch.zeros(9), torch.tensor([0, 4, 9])


@pytest.mark.parametrize(
    "loss, inputs, message",
    [
        (DPO(), {"ref_logp": P}, "DPO: missing inputs: cu_seqlens"),
        (DPO(), {"cu_seqlens": BOUNDS}, "DPO: missing inputs: ref_logp"),
        (KTO(), {"ref_logp": P, "cu_seqlens": BOUNDS}, "KTO: missing inputs: desirable, z0"),
        (SimPO(), {"ref_logp": P, "cu_seqlens": BOUNDS}, "SimPO: unknown inputs: ref_logp"),
        (DPO(), {"ref_logp": P, "cu_seqlens": BOUNDS, "z0": P}, "DPO: unknown inputs: z0"),
        (
            DPO(),
            {"ref_logp": P[1:], "cu_seqlens": BOUNDS},
            r"ref_logp of the shape of logp, \(9,\)",
        ),
        (SimPO(), {"cu_seqlens": BOUNDS[None]}, r"cu_seqlens \[S \+ 1\], got .* \(1, 3\)"),
        (SimPO(), {"cu_seqlens": BOUNDS[:2]}, r"\[2P \+ 1\], chosen and rejected in turn, got 1"),
    ],
)
def test_bad_inputs(loss: PreferenceLoss, inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(P, None, **inputs)
