"""The laboratory: sources that are known exactly, where methods end, the trainer taken there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastalign import losses, theory
from fastalign.errors import UserError
from fastalign.laboratory import targets
from fastalign.laboratory.command import LaboratoryConfig, run
from fastalign.laboratory.exact import distribution
from fastalign.laboratory.source import SOURCES, Source
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = pytest.mark.parametrize("name", SOURCES)


@ALL
def test_the_model_is_the_source(name: str, tmp_path: Path) -> None:
    """Every string, to the rounding of fp32 weights; nothing but letters has any probability."""
    source = SOURCES[name](4)
    assert source.p.sum().item() == pytest.approx(1, abs=1e-14)
    found = distribution(source.write(tmp_path), source)
    assert found.p.shape == (81,) and found.outside < 1e-10
    torch.testing.assert_close(found.p, source.p, rtol=1e-6, atol=0)


def test_strings_are_in_the_order_of_their_digits() -> None:
    source = SOURCES["markov"](3)
    at = torch.tensor([0 * 9 + 2 * 3 + 1])
    assert source.text(at) == ["acb"]
    assert source.p[at].item() == pytest.approx(0.5 * 0.1 * 0.3, rel=1e-14)
    assert source.reward[at].item() == 1.5 and source.range == 3.0


def test_strings_agree_with_the_method_of_types() -> None:
    source = SOURCES["memoryless"](5)
    assert source.memoryless and not SOURCES["markov"](5).memoryless
    types = theory.Memoryless(source.first, source.letters, 5)
    for ours, theirs in (
        (theory.tilt(source.p, source.reward, 1.3), types.tilt(1.3)),
        (theory.best_of_n(source.p, source.reward, 7), types.best_of_n(7)),
    ):
        assert theory.kl_divergence(ours, source.p) == pytest.approx(theirs.kl_to_base, abs=1e-12)
        assert float(ours @ source.reward) == pytest.approx(theirs.reward, abs=1e-12)


def test_a_policy_that_says_other_things_is_refused(tmp_path: Path) -> None:
    source = SOURCES["memoryless"](3)
    folder = source.write(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[5:] *= 0.01  # tokens that are no letters become likely
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="probabilities of all strings sum to 0.0"):
        distribution(folder, source)


# --- where methods end ----------------------------------------------------------------------------


def gradient(source: Source, policy: Tensor, loss: Any, kl_coef: float, scale: float) -> Tensor:
    """Of the expected loss over strings that ``policy`` itself draws, in a table of logits.

    Advantages are exact returns (of KL too, where it costs something), without a baseline.
    """
    m, k = source.m, source.k
    tables = [c.clone().requires_grad_() for c in targets.conditionals(policy, k)]
    refs = targets.conditionals(source.p, k)
    string = torch.arange(len(policy))
    places = [(string // k ** (m - t), source.strings[:, t]) for t in range(m)]
    logp = torch.stack([t.log_softmax(1)[at] for t, at in zip(tables, places, strict=True)], 1)
    ref_logp = torch.stack([r[at] for r, at in zip(refs, places, strict=True)], 1)
    paid = kl_coef * (logp - ref_logp).detach().flip(1).cumsum(1).flip(1)
    inputs = {
        "advantages": scale * source.reward[:, None] - paid,
        "ref_logp": ref_logp,
        "old_logp": logp.detach(),
    }
    values = loss(logp.flatten(), None, **{name: inputs[name].flatten() for name in loss.required})
    found = torch.autograd.grad((policy[:, None] * values.reshape(-1, m)).sum(), tables)
    return torch.cat([table.flatten() for table in found])


@ALL
def test_methods_are_at_rest_at_their_targets(name: str) -> None:
    """The expected gradients of the trainer's own losses vanish there, and not at a neighbour."""
    source = SOURCES[name](3)
    base = source.p
    k3 = targets.grpo(source, base, 0.8, group=8)
    mean = k3 @ source.reward
    std = float((k3 @ (source.reward - mean).square()).sqrt()) + 1e-4
    for loss, kl_coef, scale, at, off in (
        (losses.APA(0.6), 0.0, 1.0, targets.apa(source, base, 0.6), targets.apa(source, base, 0.7)),
        (losses.PPO(), 0.8, 1.0, targets.ppo(source, base, 0.8), targets.ppo(source, base, 0.9)),
        (losses.GRPO(kl_coef=0.8), 0.0, 7 / 8 / std, k3, targets.grpo(source, base, 0.9, group=8)),
    ):
        assert gradient(source, at, loss, kl_coef, scale).abs().max() < 1e-10, loss
        assert gradient(source, off, loss, kl_coef, scale).abs().max() > 1e-3, loss


@ALL
def test_ppo_ends_at_the_tilt_of_whole_strings_and_apa_where_letters_are_independent(
    name: str,
) -> None:
    source = SOURCES[name](4)
    tilt = theory.tilt(source.p, source.reward, 1 / 0.8)
    torch.testing.assert_close(targets.ppo(source, source.p, 0.8), tilt, rtol=1e-12, atol=0)
    apart = float((targets.apa(source, source.p, 0.8) - tilt).abs().sum()) / 2
    assert apart < 1e-12 if source.memoryless else 0.01 < apart < 0.05


def test_targets_of_methods_that_learn_from_samples() -> None:
    source = SOURCES["memoryless"](4)
    base, reward = source.p, source.reward
    std = float((base @ (reward - base @ reward).square()).sqrt())
    tilt = theory.tilt(base, reward, 1 / (0.8 * std))
    torch.testing.assert_close(targets.rwr(source, base, 0.8, 1e9), tilt, rtol=1e-12, atol=0)
    kept = targets.filtered(source, base, 0.3)
    assert float(base[reward > 2].sum()) <= 0.3 < float(base[reward > 1.5].sum())
    assert bool(((kept > 0) == (reward > 2)).all()) and float(kept.sum()) == pytest.approx(1)


# --- the trainer ----------------------------------------------------------------------------------


def test_apa_dpo_and_ppo_reach_their_fixed_points(tmp_path: Path) -> None:
    """Through the real training code: regret under 2 % of the reward's range, and at the tilt of
    their own temperature, not of another one."""
    folder = run(
        LaboratoryConfig(
            output=str(tmp_path / "lab"),
            source="memoryless",
            methods="apa,ppo,dpo",
            seeds=1,
            m=3,
            effort=0.4,
        )
    )
    (found,) = json.loads((folder / "laboratory.json").read_text())["sources"]
    runs = {method["name"]: method["runs"][0] for method in found["methods"]}
    for name, seen in runs.items():
        assert seen["regret_share"] < 0.005 and abs(seen["target_regret_share"]) < 1e-9, name
        assert seen["kl_to_target"] < 0.01 and seen["target_kl"] > 0.2, name
    for kind in ("svg", "png"):
        assert (folder / f"laboratory.{kind}").stat().st_size > 10_000
    drawn = (folder / "laboratory.svg").read_text()
    assert all(f">{name}<" in drawn for name in runs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": "apa,pop"}, "--methods: expected some of apa, ppo, .*; got pop"),
        ({"source": ""}, "--source: expected some of memoryless, markov; got nothing"),
        ({"m": 2}, "expected 3 <= m <= 7, got 2"),
        ({"effort": 0.0}, "expected effort > 0, got 0.0"),
        ({"seeds": 0}, "expected seeds >= 1, got 0"),
    ],
)
def test_what_cannot_be_run_is_refused(options: dict, said: str) -> None:
    with pytest.raises(RunError, match=said):
        LaboratoryConfig(**options)
