"""The preference losses beside other libraries': the same losses, gradients and logged numbers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from preferences import CHOSEN, REF_CHOSEN, REF_REJECTED, REJECTED, packed, random_pairs
from torch import Tensor

from fastalign.losses import DPO, KTO, RPO, SimPO
from fastalign.testing import TOLERANCES

pytestmark = pytest.mark.peers
DOUBLE = TOLERANCES[torch.float64]


def peer_batch() -> dict[str, Tensor]:
    """Six pairs, their sums, and the same log-probs padded: chosen ones first, one prompt token."""
    b = random_pairs(6)
    parts = [b[name].split(b["cu_seqlens"].diff().tolist()) for name in ("logp", "ref_logp")]
    b["sums"], b["ref_sums"] = (torch.stack([x.sum() for x in rows]) for rows in parts)
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    rows = [F.pad(parts[0][i], (0, 12 - len(parts[0][i]))) for i in order]
    b["padded"] = torch.stack(rows)
    lengths = b["cu_seqlens"].diff()[order]
    b["completion_mask"] = (torch.arange(13) <= lengths[:, None]).long()
    b["completion_mask"][:, 0] = 0
    b["order"] = torch.tensor(order)
    return b


def accelerator() -> Any:
    def same(x: Tensor) -> Tensor:
        return x

    return SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)


class Logged(dict):
    def __missing__(self, key: str) -> list:
        self[key] = []
        return self[key]


def model_of(padded: Tensor) -> Any:
    """What a trainer would call: a model whose per-token log-probs are these."""

    def model(**_: Any) -> Any:
        zeros = torch.zeros_like(padded)
        names = ("entropy", "mean_logits", "log_sum_sq_probs")
        rest = dict.fromkeys(names, zeros)
        return SimpleNamespace(log_probs=padded, is_top1=zeros.bool(), **rest)

    model.training = True  # type: ignore[attr-defined]
    return model


def trl_common(mode_metrics: Logged, **settings: Any) -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": mode_metrics},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


@pytest.mark.parametrize(
    "loss, types, smoothing",
    [
        (DPO(0.3), ["sigmoid"], 0.0),
        (DPO(0.3, average=True), ["sigmoid_norm"], 0.0),
        (DPO(0.3, "hinge"), ["hinge"], 0.0),
        (DPO(0.3, "ipo", average=True), ["ipo"], 0.0),
        (DPO(0.3, "robust", 0.2), ["robust"], 0.2),
    ],
    ids=str,
)
def test_trls_dpo_trainer_agrees(loss: DPO, types: list[str], smoothing: float) -> None:
    """Loss, gradient and what it logs. sigmoid_norm and ipo divide by a token count of their own
    mask, the same here; its rewards are those of sums."""
    trainer = pytest.importorskip("trl").DPOTrainer
    b, logged = peer_batch(), Logged()
    settings = trl_common(
        logged,
        args=SimpleNamespace(),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        beta=loss.beta,
        loss_types=types,
        loss_weights=[1.0],
        label_smoothing=smoothing,
        use_weighting=False,
    )
    padded = b["padded"].requires_grad_()
    mask = b["completion_mask"]
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = (
        b["ref_sums"][0::2],
        b["ref_sums"][1::2],
    )
    want = trainer._compute_loss(settings, model_of(padded), batch, False)
    leaf = b["logp"].requires_grad_()
    inputs = {"ref_logp": b["ref_logp"], "cu_seqlens": b["cu_seqlens"]}
    got = loss(leaf, None, **inputs).mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    (theirs,) = torch.autograd.grad(want, padded)
    (ours,) = torch.autograd.grad(got, leaf)
    rows = [theirs[i][m[1:].bool()] for i, m in enumerate(mask)]
    flat = torch.cat([rows[i] for i in b["order"].argsort()])
    assert (ours - flat).abs().max() <= DOUBLE.grad_floor
    plain = dataclasses.replace(loss, average=False)
    for name, x in plain.statistics(leaf, None, **inputs).items():
        assert x.mean().item() == pytest.approx(logged[name][-1], rel=1e-6), name


def test_trls_sum_of_dpo_and_a_supervised_loss_is_rpos_mean_form() -> None:
    """Of one pair: over several its supervised part is a mean over all tokens."""
    trainer = pytest.importorskip("trl").DPOTrainer
    logp, ref = packed(CHOSEN, REJECTED), (REF_CHOSEN, REF_REJECTED)
    padded = torch.stack([logp[:8], F.pad(logp[8:], (0, 3))])
    mask = torch.tensor([[0] + [1] * 8, [0] + [1] * 5 + [0] * 3])
    settings = trl_common(
        Logged(),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        beta=0.1,
        loss_types=["sigmoid", "sft"],
        loss_weights=[1.0, 0.005],
        label_smoothing=0.0,
        use_weighting=False,
    )
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = (torch.tensor([x]) for x in ref)
    want = trainer._compute_loss(settings, model_of(padded), batch, False)
    cu_seqlens = torch.tensor([0, 8, 13])
    got = RPO(eta=0.005, nll="mean")(logp, ref_logp=packed(*ref), cu_seqlens=cu_seqlens)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)


def test_trls_kto_trainer_agrees() -> None:
    trainer = pytest.importorskip("trl").KTOTrainer
    b, logged = peer_batch(), Logged()
    desirable = torch.tensor([True, False, False, True, True, False] * 2)
    loss = KTO(0.3, desirable_weight=1.3, undesirable_weight=0.8)
    other = 0.5 * torch.rand(5, dtype=torch.float64)
    settings = trl_common(
        logged,
        calculate_KL=True,
        beta=loss.beta,
        loss_type="kto",
        desirable_weight=loss.desirable_weight,
        undesirable_weight=loss.undesirable_weight,
        _compute_kl_logps=lambda model, batch: other.sum()[None],
    )
    mask = b["completion_mask"]
    batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    batch |= {"label": desirable[b["order"]], "ref_logps": b["ref_sums"][b["order"]]}
    batch["ref_KL_logps"] = torch.zeros(1)
    want = trainer._compute_loss(settings, model_of(b["padded"]), batch, False)
    z0 = KTO.baseline(other, torch.zeros_like(other), 1)
    inputs = {"ref_logp": b["ref_logp"], "cu_seqlens": b["cu_seqlens"]}
    inputs |= {"desirable": desirable, "z0": z0}
    got = loss(b["logp"], None, **inputs).mean()
    assert z0.item() == pytest.approx(logged["kl"][-1]) and z0 > 0.0
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    for name, x in loss.statistics(b["logp"], None, **inputs).items():
        assert x.nanmean().item() == pytest.approx(logged[name][-1], rel=1e-6), name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trls_simpo_agrees(smoothing: float) -> None:
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer

    b = peer_batch()
    means = b["sums"] / b["cu_seqlens"].diff()
    settings = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.5,
        loss_type="simpo",
        label_smoothing=smoothing,
        accelerator=accelerator(),
    )
    want, chosen, rejected = CPOTrainer.cpo_loss(settings, means[0::2], means[1::2])
    loss = SimPO(2.0, 0.5, label_smoothing=smoothing)
    got = loss(b["logp"], None, cu_seqlens=b["cu_seqlens"])
    assert (got - want).abs().max() <= DOUBLE.floor * 10
    found = loss.statistics(b["logp"], None, cu_seqlens=b["cu_seqlens"])
    assert (found["rewards/chosen"] - chosen).abs().max() <= DOUBLE.floor * 10
    assert (found["rewards/rejected"] - rejected).abs().max() <= DOUBLE.floor * 10


def test_ligers_losses_agree() -> None:
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
    from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction
    from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction

    b = peer_batch()
    inputs = {"ref_logp": b["ref_logp"], "cu_seqlens": b["cu_seqlens"]}
    target, (w, r) = torch.zeros(12), b["sums"].view(-1, 2).unbind(1)
    ref_w, ref_l = b["ref_sums"].view(-1, 2).unbind(1)
    cases: list[tuple[DPO, dict[str, Any]]] = [
        (DPO(0.3), {}),
        (DPO(0.3, "hinge"), {"loss_type": "hinge"}),
        (DPO(0.3, "robust", 0.2), {"loss_type": "robust", "label_smoothing": 0.2}),
    ]
    for loss, settings in cases:
        f = LigerFusedLinearDPOFunction.preference_loss_fn
        want = f(w, r, target, ref_w, ref_l, beta=0.3, **settings)[0]
        assert loss(b["logp"], None, **inputs).mean().item() == pytest.approx(want.item())
    means = b["sums"] / b["cu_seqlens"].diff()
    f = LigerFusedLinearSimPOFunction.preference_loss_fn
    want = f(means[0::2], means[1::2], target, beta=2.0, gamma=0.5)[0]
    got = SimPO(2.0, 0.5)(b["logp"], None, cu_seqlens=b["cu_seqlens"]).mean()
    assert got.item() == pytest.approx(want.item())
    desirable, z0 = torch.rand(12) < 0.5, torch.tensor(0.3)
    f = LigerFusedLinearKTOFunction.preference_loss_fn
    want = f(b["sums"], desirable, target, b["ref_sums"], beta=0.3, kl=z0)[0]
    got = KTO(0.3)(b["logp"], None, desirable=desirable, z0=z0, **inputs).mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
