"""`train reward`: margins, smoothing, centring, the encoder's share, labels in doubt; losses and
gradients against autograd on one sequence at a time, in one pass and in parts."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from preference_runs import lines_of, make_model, records

from fastalign.data.packing import epochs_of_batches
from fastalign.data.tokens import TokenizedPreference
from fastalign.models import RewardEnsemble, load_tokenizer
from fastalign.models.attention import attention
from fastalign.testing import TOLERANCES
from fastalign.train import reward
from fastalign.train.label_noise import Labels, relabel, strength
from fastalign.train.optim import Optimizer
from fastalign.train.reward_evaluation import differences
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor
N = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(write):
    return write(*records(N))


@pytest.fixture(scope="module")
def judge(model, tmp_path_factory):
    """A trained ensemble of three heads."""
    folder = tmp_path_factory.mktemp("judge")
    with pytest.MonkeyPatch.context() as threads:
        threads.setattr(reward, "warn_of_one_head", lambda _: None)
        return str(reward.train(config(folder / "run", model, "synthetic", limit=20, lr=1e-3)))


def config(folder, model, data, **changes) -> reward.RewardConfig:
    values: dict[str, Any] = {
        "output": str(folder),
        "model": model,
        "data": data,
        "max_length": 256,
        "heads": 3,
        "batch_tokens": 500,
        "seed": 2,
        "lr": 0.0,  # every step starts from the same weights
        "eval_limit": 10,
    }
    return reward.RewardConfig(**(values | changes))


@pytest.fixture
def recorded(monkeypatch):
    """Every update's gradients, and the module it was of."""
    seen = []
    plain = Optimizer.update

    def update(self, *args):
        named = self.module.named_parameters()
        seen.append(({n: p.grad.clone() for n, p in named if p.grad is not None}, self.module))
        return plain(self, *args)

    monkeypatch.setattr(Optimizer, "update", update)
    return seen


def scores_of(ensemble, pairs):
    """(chosen, rejected), [n, K] each, one sequence at a time, with a graph."""

    def score(tokens):
        hidden = ensemble.encoder(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
        raw = ensemble.weight @ hidden + ensemble.bias
        return (raw - ensemble.center) / ensemble.scale

    with attention(ensemble.encoder, "eager"):
        sides = ((p.prompt + p.chosen, p.prompt + p.rejected) for p in pairs)
        both = [(score(a), score(b)) for a, b in sides]
    return torch.stack([a for a, _ in both]), torch.stack([b for _, b in both])


def weighted(values, kept):
    return ((kept * values).sum(0) / kept.sum(0).clamp(min=1)).mean()


MARGINS = torch.tensor([0.25 * i for i in range(N)])  # as in the records
# name -> options, and the losses [n, K] of chosen and rejected scores and the pairs' numbers.
LOSSES: dict[str, tuple[dict[str, Any], Any]] = {
    "margin of the data": (
        {"margin": "data"},
        lambda w, v, rows: F.softplus(-(w - v - MARGINS[rows, None])),
    ),
    "one margin": ({"margin": "0.7"}, lambda w, v, rows: F.softplus(-(w - v - 0.7))),
    "smoothing": (
        {"label_smoothing": 0.2},
        lambda w, v, rows: 0.8 * F.softplus(v - w) + 0.2 * F.softplus(w - v),
    ),
    "centring": (
        {"center_coef": 0.3},
        lambda w, v, rows: F.softplus(v - w) + 0.3 * (w + v).square(),
    ),
    "all": (
        {"margin": "data", "label_smoothing": 0.1, "center_coef": 0.05, "bootstrap": "none"},
        lambda w, v, rows: (
            0.9 * F.softplus(MARGINS[rows, None] - w + v)
            + 0.1 * F.softplus(w - v - MARGINS[rows, None])
            + 0.05 * (w + v).square()
        ),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients(model, data, tmp_path, recorded, name):
    options, formula = LOSSES[name]
    reward.train(config(tmp_path / "whole", model, data, **options))
    whole = list(recorded)
    recorded.clear()
    reward.train(config(tmp_path / "parts", model, data, micro_tokens=150, **options))
    parts = list(recorded)
    made = config(tmp_path, model, data)
    pairs, _ = reward.load_data(made, load_tokenizer(model))
    schedule = epochs_of_batches([reward.pair_length(p) for p in pairs], 1, 500, 2)
    assert len(schedule) == len(whole) == len(parts) >= 2
    weights = reward.bootstrap_weights(N, 3, 2)
    if options.get("bootstrap") == "none":
        weights = torch.ones_like(weights)
    ensemble = whole[-1][1]
    ensemble.center.zero_(), ensemble.scale.fill_(1.0)  # as they were while it trained
    lines = lines_of(tmp_path / "whole", "train")
    again = lines_of(tmp_path / "parts", "train")
    for step, batch in enumerate(schedule):
        ensemble.zero_grad()
        loss = weighted(
            formula(*scores_of(ensemble, [pairs[i] for i in batch]), batch), weights[batch]
        )
        loss.backward()
        for line in (lines[step], again[step]):
            assert line["loss"] == pytest.approx(loss.item(), rel=100 * FLOAT32)
        theirs = {n: p.grad for n, p in ensemble.named_parameters() if p.grad is not None}
        largest = max(g.abs().max() for g in theirs.values())
        assert largest > 1e-3
        for seen in (whole[step][0], parts[step][0]):
            assert seen.keys() == theirs.keys()
            for key, gradient in theirs.items():
                assert (seen[key] - gradient).abs().max() < 1000 * FLOAT32 * largest, key


def test_the_encoders_share(model, data, tmp_path, recorded):
    """1/K of three heads, and a number: the encoder's gradients, and no head's."""
    for scale in ("1", "1/K", "0.25"):
        made = config(tmp_path / scale.replace("/", "-"), model, data, encoder_grad_scale=scale)
        reward.train(made)
    steps = len(recorded) // 3
    for factor, first in ((1 / 3, steps), (0.25, 2 * steps)):
        for (full, _), (less, _) in zip(recorded[:steps], recorded[first:], strict=False):
            for name, gradient in full.items():
                expected = factor * gradient if name.startswith("encoder.") else gradient
                assert torch.allclose(less[name], expected, rtol=1e-6, atol=0), name


# --- labels that an ensemble doubts ---------------------------------------------------------------


def pairs_of(n):
    return [TokenizedPreference([1], [10 + i], [20 + i]) for i in range(n)]


def test_strength_is_the_mean_over_heads():
    """Two heads that say 1 and 4 of the first pair: mean 2.5, deviation 1.5 (ddof 0)."""
    mu, std = strength(torch.tensor([[2.0, 5.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [0, 2]]))
    assert mu.tolist() == [2.5, -1.0] and std.tolist() == [1.5, 1.0]


def test_the_weakest_are_flipped_the_next_softened():
    """Of ten strengths, 20 % and up to 50 %; ties in the order of the data."""
    mu = torch.tensor([0.5, -2.0, 3.0, 0.1, -0.5, 0.1, 4.0, 0.1, 5.0, 6.0])
    found, counts = relabel(Labels(pairs_of(10)), mu, 0.2, 0.5, True)
    flipped = [p.chosen[0] >= 20 for p in found.pairs]
    assert [i for i, f in enumerate(flipped) if f] == [1, 4]
    assert all({p.chosen[0] % 10, p.rejected[0] % 10} == {i} for i, p in enumerate(found.pairs))
    assert found.soft is not None and found.soft.nonzero()[:, 0].tolist() == [3, 5, 7]
    assert counts == {"flipped": 2.0, "softened": 3.0}
    assert isinstance(found.margin, torch.Tensor)
    assert found.margin.tolist() == pytest.approx([0.5, 2, 3, 0.1, 0.5, 0.1, 4, 0.1, 5, 6])
    same, counts = relabel(Labels(pairs_of(10), 0.3), mu, 0.0, 0.0, False)
    assert same == Labels(pairs_of(10), 0.3) and counts == {"flipped": 0.0, "softened": 0.0}


COMBINED: dict[str, dict[str, Any]] = {
    "flip": {"flip_below": 0.3},
    "soft": {"soft_label_below": 0.4, "label_smoothing": 0.3},
    "margin": {"adaptive_margin": True},
    "flip, margin": {"flip_below": 0.2, "adaptive_margin": True},
    "soft, margin": {"soft_label_below": 0.5, "label_smoothing": 0.1, "adaptive_margin": True},
    "all": {
        **{"flip_below": 0.2, "soft_label_below": 0.5, "label_smoothing": 0.1},
        **{"adaptive_margin": True},
    },
}


@pytest.mark.parametrize("name", COMBINED)
def test_doubtful_labels(model, judge, data, tmp_path, recorded, caplog, name):
    """The loss of a batch of all pairs, by hand from the judge's scores."""
    caplog.set_level(logging.INFO, "fastalign")
    options = COMBINED[name]
    run = tmp_path / "run"
    made = config(
        run, model, data, strength_from=judge, batch_tokens=9999, micro_tokens=300, **options
    )
    reward.train(made)
    ensemble = recorded[-1][1]
    pairs, _ = reward.load_data(made, load_tokenizer(model))
    with torch.no_grad():
        chosen, rejected = scores_of(RewardEnsemble.load(judge).eval(), pairs)
        mu = (chosen - rejected).mean(1)
        ranks = sorted(range(N), key=lambda i: float(mu[i]))
        n_flip = int(N * options.get("flip_below", 0))
        n_soft = int(N * options.get("soft_label_below", 0))
        ensemble.center.zero_(), ensemble.scale.fill_(1.0)  # as they were while it trained
        good, bad = scores_of(ensemble, pairs)
        losses = torch.empty(N, 3)
        for i in range(N):
            sign = -1.0 if i in ranks[:n_flip] else 1.0
            gap = sign * (good[i] - bad[i])
            if options.get("adaptive_margin"):
                gap = gap - sign * mu[i]
            soft = options.get("label_smoothing", 0) if i in ranks[n_flip:n_soft] else 0.0
            losses[i] = (1 - soft) * F.softplus(-gap) + soft * F.softplus(gap)
        truth = weighted(losses, reward.bootstrap_weights(N, 3, 2))
    (line,) = lines_of(run, "train")
    assert line["loss"] == pytest.approx(float(truth), rel=200 * FLOAT32)
    (counts,) = lines_of(run, "labels")
    assert counts["flipped"] == n_flip and counts["softened"] == max(0, n_soft - n_flip)
    assert counts["strength/mean"] == pytest.approx(float(mu.mean()), rel=1e-3, abs=1e-4)
    assert counts["strength/negative"] == pytest.approx(float((mu < 0).float().mean()))
    assert f"{n_flip} turned round, {max(0, n_soft - n_flip)} smoothed" in caplog.text


# --- heads that are alike -------------------------------------------------------------------------


def test_how_far_heads_differ():
    """Margins (1, 2, 3), twice that, and their negatives: correlations 1, -1 and -1."""
    rejected = torch.zeros(9, 3)
    chosen = torch.tensor([[1.0, 2.0, -1.0], [2.0, 4.0, -2.0], [3.0, 6.0, -3.0]]).repeat(3, 1)
    found = differences(chosen, rejected)
    assert found["heads/correlation"] == pytest.approx(-1 / 3)
    # Head 2 says the least of every chosen one; of the rejected ones all say 0: the first.
    assert [found[f"argmin/head_{k}"] for k in range(3)] == [0.5, 0.0, 0.5]


def test_heads_on_a_frozen_encoder_become_one(model, write, tmp_path, caplog):
    """Trained for long on the same pairs, to margins that differ; a bootstrap keeps them apart."""
    data = write(*(r | {"margin": 2.0 * (i % 3)} for i, r in enumerate(records(6))))
    options = {
        **{"freeze_encoder": True, "lr": 0.1, "schedule": "constant", "epochs": 40},
        **{"batch_tokens": 9999, "weight_decay": 0.0, "margin": "data", "label_smoothing": 0.3},
        **{"eval_data": data, "eval_every": 99, "head_init": 0.05},
    }
    found = {}
    for bootstrap in ("none", "resample"):
        caplog.clear()
        run = tmp_path / bootstrap
        reward.train(config(run, model, data, bootstrap=bootstrap, **options))
        found[bootstrap] = lines_of(run, "eval")[-1]["heads/correlation"]
        assert ("the heads have become one" in caplog.text) == (bootstrap == "none"), found
    assert found["none"] > 0.999 > found["resample"]


def test_held_out_losses_are_of_the_heads_as_they_are_trained(model, write, tmp_path):
    """The heads are standardised before the last evaluation; weights that never move have one
    loss."""
    made = records(6)
    options = {"batch_tokens": 150, "eval_every": 1, "eval_data": write(*made), "head_init": 3.0}
    reward.train(config(tmp_path / "run", model, write(*made, name="train.jsonl"), **options))
    losses = [line["loss"] for line in lines_of(tmp_path / "run", "eval")]
    assert len(losses) > 2
    assert losses == pytest.approx(losses[:1] * len(losses), rel=100 * FLOAT32)


# --- options --------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "--flip_below goes by the pairs' strength: it needs --strength_from": {"flip_below": 0.2},
    "--adaptive_margin goes by": {"adaptive_margin": True},
    "--soft_label_below goes by": {"soft_label_below": 0.2, "label_smoothing": 0.1},
    "--adaptive_margin and --margin both set the margin": {
        **{"strength_from": "x", "adaptive_margin": True, "margin": "1"},
    },
    "--flip_below does not go with --margin data": {
        **{"strength_from": "x", "flip_below": 0.2, "margin": "data"},
    },
    "--soft_label_below needs --label_smoothing": {"strength_from": "x", "soft_label_below": 0.4},
    "leaves no pair that --flip_below 0.4": {
        **{"strength_from": "x", "flip_below": 0.4, "soft_label_below": 0.4},
        **{"label_smoothing": 0.1},
    },
    "--encoder_grad_scale does not go with --freeze_encoder": {
        **{"encoder_grad_scale": "1/K", "freeze_encoder": True},
    },
    "encoder_grad_scale 'K': expected 1/K or a number": {"encoder_grad_scale": "K"},
    "encoder_grad_scale '0': expected 1/K or a number": {"encoder_grad_scale": "0"},
    "margin 'much': expected data or a number": {"margin": "much"},
    "expected label_smoothing < 0.5": {"label_smoothing": 0.5},
    "expected center_coef >= 0": {"center_coef": -1.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_options_that_do_not_fit(tmp_path, message):
    with pytest.raises(RunError) as raised:
        config(tmp_path, "model", "data", **WRONG[message])
    assert message in str(raised.value)


def test_a_margin_that_is_missing(model, write, tmp_path):
    made = records(4)
    del made[1]["margin"], made[3]["margin"]
    with pytest.raises(RunError, match="--margin data: 2 of 4 pairs have no margin"):
        reward.train(config(tmp_path / "run", model, write(*made), margin="data"))
