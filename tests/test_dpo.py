"""`train dpo`: the loss of every variant against its formula in float64, on log-probs by plain
transformers; parts against the whole; what is logged."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_logprobs import plain_logprobs
from preference_runs import (
    config,
    lines_of,
    make_model,
    model_of,
    records,
    sigmoid,
    softplus,
    texts_of,
    unpaired,
    without_clocks,
)

from fastalign.data.formats import Completion, LoadReport
from fastalign.data.tokens import tokenize_completions
from fastalign.models import Policy, load_tokenizer
from fastalign.report import write_report
from fastalign.testing import TOLERANCES
from fastalign.train import dpo
from fastalign.train.optim import Optimizer
from fastalign.train.preference_data import strangers_of
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(write):
    return write(*records())


def sums(source, tokenizer, texts):
    """(log-prob, tokens) of each response to its prompt, [(prompt, response)] of text."""
    found = [Completion(p, r, None, f"{i}") for i, (p, r) in enumerate(texts)]
    ids = tokenize_completions(found, tokenizer, LoadReport("here"), max_length=256)
    assert len(ids) == len(texts)
    logps = plain_logprobs(source, ids)
    return [(float(logp.sum()), len(logp)) for logp in logps]


# --- the loss of every variant ------------------------------------------------------------------

# name -> options, and the loss from w = log pi(chosen), v = log pi(rejected), the reference's rw
# and rl, the lengths nw and nl, and whether the chosen one is the reference's.
FORMULAS: dict[str, tuple[dict[str, Any], Callable[..., float]]] = {
    "sigmoid": (
        {"beta": 0.2},
        lambda w, v, rw, rl, nw, nl, ref: softplus(-0.2 * (w - rw - v + rl)),
    ),
    "sigmoid, smoothed": (
        {"label_smoothing": 0.1},
        lambda w, v, rw, rl, nw, nl, ref: (
            0.9 * softplus(-0.1 * (w - rw - v + rl)) + 0.1 * softplus(0.1 * (w - rw - v + rl))
        ),
    ),
    "sigmoid, means": (
        {"average": True, "beta": 3.0},
        lambda w, v, rw, rl, nw, nl, ref: softplus(-3.0 * ((w - rw) / nw - (v - rl) / nl)),
    ),
    "robust": (
        {"label_smoothing": 0.2},
        lambda w, v, rw, rl, nw, nl, ref: (
            (0.8 * softplus(-0.1 * (w - rw - v + rl)) - 0.2 * softplus(0.1 * (w - rw - v + rl)))
            / 0.6
        ),
    ),
    "hinge": (
        {"beta": 0.5},
        lambda w, v, rw, rl, nw, nl, ref: max(0.0, 1.0 - 0.5 * (w - rw - v + rl)),
    ),
    "ipo": (
        {"average": True},
        lambda w, v, rw, rl, nw, nl, ref: ((w - rw) / nw - (v - rl) / nl - 1 / 0.2) ** 2,
    ),
    "hdpo": (
        {"alpha": 0.8},
        lambda w, v, rw, rl, nw, nl, ref: softplus(-0.1 * (0.8 * (w - v) - (rw - rl))),
    ),
    "rdpo": (
        {"length_coef": 0.03},
        lambda w, v, rw, rl, nw, nl, ref: softplus(-0.1 * (w - rw - v + rl) - 0.03 * (nw - nl)),
    ),
    "rpo": (
        {"eta": 0.02},
        lambda w, v, rw, rl, nw, nl, ref: softplus(-0.1 * (w - rw - v + rl)) - 0.02 * 0.1 * w,
    ),
    "rpo, mean": (
        {"eta": 0.2, "nll": "mean", "beta": 0.5},
        lambda w, v, rw, rl, nw, nl, ref: softplus(-0.5 * (w - rw - v + rl)) - 0.2 * w / nw,
    ),
    "xpo": (
        {"alpha": 0.01},
        lambda w, v, rw, rl, nw, nl, ref: (
            softplus(-0.1 * (w - rw - v + rl)) + 0.01 * (w if ref else v)
        ),
    ),
    "simpo": (
        {"gamma": 0.7},
        lambda w, v, rw, rl, nw, nl, ref: softplus(-2.0 * (w / nw - v / nl) + 0.7),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_is_the_formula(model, data, tmp_path, name):
    """At the second step, where the policy has left the reference; in several packs."""
    options, formula = FORMULAS[name]
    run = tmp_path / "run"
    dpo.train(config(run, model, data, loss=name.split(",")[0], **options))
    lines = lines_of(run, "train")
    tokenizer, moved = load_tokenizer(model), model_of(run, 1, model)
    texts = [(r["prompt"], r[side]) for r in records() for side in ("chosen", "rejected")]
    before, after = (sums(source, tokenizer, texts) for source in (model, moved))
    losses = []
    for i, record in enumerate(records()):
        (w, nw), (v, nl) = after[2 * i : 2 * i + 2]
        (rw, _), (rl, _) = before[2 * i : 2 * i + 2]
        losses.append(formula(w, v, rw, rl, nw, nl, record["chosen_is_ref"]))
    truth = sum(losses) / len(losses)
    assert abs(lines[0]["loss"] - truth) > 1e-2  # the step has changed something
    assert lines[1]["loss"] == pytest.approx(truth, abs=100 * FLOAT32)
    chosen = sum(w for w, _ in after[0::2]) / len(losses)
    if "average" not in options and name != "simpo":
        assert lines[1]["logps/chosen"] == pytest.approx(chosen, rel=10 * FLOAT32)
    if name == "sigmoid":
        gaps = [w - r for (w, _), (r, _) in zip(after, before, strict=True)]
        n_tokens = sum(n for _, n in after)
        margins = [0.2 * (a - b) for a, b in zip(gaps[0::2], gaps[1::2], strict=True)]
        expected = {
            "rewards/chosen": 0.2 * sum(gaps[0::2]) / len(losses),
            "rewards/rejected": 0.2 * sum(gaps[1::2]) / len(losses),
            "rewards/margins": sum(margins) / len(losses),
            "rewards/accuracies": sum(m > 0 for m in margins) / len(losses),
            "drift/k1": sum(gaps) / n_tokens,
        }
        for key, value in expected.items():
            assert lines[1][key] == pytest.approx(value, abs=100 * FLOAT32), key
        assert lines[0]["rewards/margins"] == pytest.approx(0.0, abs=100 * FLOAT32)


def kto_terms(before, after, strangers, labels):
    z0 = sum(a - b for (a, _), (b, _) in zip(strangers[1], strangers[0], strict=True))
    z0 = max(0.0, z0 / len(strangers[0]))
    losses = []
    for (a, _), (b, _), good in zip(after, before, labels, strict=True):
        x = 0.3 * (a - b - z0)
        losses.append(1.3 * (1 - sigmoid(x)) if good else 0.7 * (1 - sigmoid(-x)))
    return sum(losses) / len(losses), z0


@pytest.mark.parametrize("kind", ["unpaired", "pairs"])
def test_kto_is_the_formula(model, write, tmp_path, kind):
    """z0 is of the whole batch: responses under the prompt before them that is another one."""
    if kind == "unpaired":
        made = [(r["prompt"], r["completion"], r["label"]) for r in unpaired()]
        data = write(*unpaired())
    else:
        made = [
            (r["prompt"], r[k], k == "chosen") for r in records() for k in ("chosen", "rejected")
        ]
        data = write(*records())
    options: dict[str, Any] = {
        "beta": 0.3,
        "desirable_weight": 1.3,
        "undesirable_weight": 0.7,
        "lr": 3e-2,
    }
    run = tmp_path / "run"
    dpo.train(config(run, model, data, loss="kto", **options))
    lines = lines_of(run, "train")
    others = []
    for i, (prompt, _, _) in enumerate(made):
        ring = made[i + 1 :] + made[:i]
        others.append((prompt, next(r for p, r, _ in ring if p != prompt)))
    tokenizer, moved = load_tokenizer(model), model_of(run, 1, model)
    found = [
        [sums(source, tokenizer, texts) for source in (model, moved)]
        for texts in ([(p, r) for p, r, _ in made], others)
    ]
    labels = [label for _, _, label in made]
    truth, z0 = kto_terms(found[0][0], found[0][1], found[1], labels)
    assert lines[1]["loss"] == pytest.approx(truth, abs=100 * FLOAT32)
    assert lines[1]["kl_baseline"] == pytest.approx(z0, abs=1e-3 * max(z0, 1.0))
    rewards = [0.3 * (a - b) for (a, _), (b, _) in zip(found[0][1], found[0][0], strict=True)]
    for key, wanted in (("rewards/chosen", True), ("rewards/rejected", False)):
        own = [r for r, label in zip(rewards, labels, strict=True) if label == wanted]
        assert lines[1][key] == pytest.approx(sum(own) / len(own), abs=1e-3)
    zero = tmp_path / "zero"
    dpo.train(config(zero, model, data, loss="kto", kl_baseline="zero", **options))
    assert [line["kl_baseline"] for line in lines_of(zero, "train")] == [0.0, 0.0]


def test_kto_baseline_is_positive_where_the_policy_likes_strangers(model, write, tmp_path):
    """All responses desirable: they all gain, and so do they under other prompts."""
    good = [r | {"label": True} for r in unpaired()]
    run = tmp_path / "run"
    dpo.train(config(run, model, write(*good), loss="kto", lr=1e-2))
    second = lines_of(run, "train")[1]
    assert second["kl_baseline"] > 1.0 and "rewards/rejected" not in second
    assert second["rewards/chosen"] > 0.1


def test_strangers_have_another_prompt():
    a, b, c = [1], [2], [3]
    assert strangers_of([a, a, b, b, c, c]) == [2, 2, 4, 4, 0, 0]
    assert strangers_of([a, b, a, a]) == [1, 2, 1, 1]
    with pytest.raises(RunError, match="all records have the same prompt"):
        strangers_of([a, a])


# --- parts and the whole --------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """The gradients of every update."""
    seen = []
    plain = Optimizer.update

    def update(self, *args):
        seen.append({n: p.grad.clone() for n, p in self.module.named_parameters()})
        return plain(self, *args)

    monkeypatch.setattr(Optimizer, "update", update)
    return seen


@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "kto"])
def test_accumulated_parts_are_the_whole(model, data, tmp_path, recorded, loss):
    """Loss, statistics and gradients in one pack, and in one pack a pair."""
    for micro in (100_000, 1):
        dpo.train(config(tmp_path / str(micro), model, data, loss=loss, micro_tokens=micro))
    one, two = (lines_of(tmp_path / name, "train")[1] for name in ("100000", "1"))
    assert one.keys() == two.keys()
    for key, value in without_clocks([one])[0].items():
        if isinstance(value, float):
            assert two[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    whole, parts = recorded[0], recorded[2]
    largest = max(g.abs().max() for g in whole.values())
    assert largest > 1e-3
    for name in whole:
        assert (whole[name] - parts[name]).abs().max() < 100 * FLOAT32 * largest, name


def test_no_logits_tensor_and_no_padding(model, data, tmp_path, monkeypatch):
    """The trunk sees the tokens of prompts and responses, a pair's prompt once, and no others; the
    head sees those of responses."""
    trunk, head = [], []
    hidden, plain = Policy.hidden, dpo.ops.linear_loss

    def counted(self, packed):
        trunk.append(packed.input_ids.numel())
        return hidden(self, packed)

    def loss_head(states, weight, targets, *args, **options):
        head.append(targets.numel())
        assert options["ignore_index"] is None and len(options["groups"]) % 2 == 1
        return plain(states, weight, targets, *args, **options)

    run = tmp_path / "run"
    reference = config(run, model, data, loss="simpo", epochs=1)
    monkeypatch.setattr(dpo.ops, "linear_loss", loss_head)
    policy_loaded = dpo.load_policy

    def load_policy(*args, **options):
        policy = policy_loaded(*args, **options)
        monkeypatch.setattr(Policy, "hidden", counted)  # not the check on loading
        return policy

    monkeypatch.setattr(dpo, "load_policy", load_policy)
    dpo.train(reference)
    tokenizer = load_tokenizer(model)
    prompts = [len(tokenizer(r["prompt"]).input_ids) for r in records()]
    texts = [(r["prompt"], r[side]) for r in records() for side in ("chosen", "rejected")]
    n = sum(n for _, n in sums(model, tokenizer, texts))
    assert sum(head) == n and sum(trunk) == n + sum(prompts)
    line = lines_of(run, "train")[0]
    assert line["tokens"] == sum(trunk) and line["tokens/repeated"] == sum(prompts)


# --- options --------------------------------------------------------------------------------------

WRONG: dict[str, dict[str, Any]] = {
    "--label_smoothing does not go with --loss ipo: it is the chance": {
        "loss": "ipo",
        "label_smoothing": 0.1,
    },
    "--gamma does not go with --loss sigmoid: .* gamma is of simpo": {"gamma": 1.0},
    "--alpha does not go with --loss simpo": {"loss": "simpo", "alpha": 0.5},
    "--average does not go with --loss kto": {"loss": "kto", "average": True},
    "--kl_baseline does not go with --loss sigmoid": {"kl_baseline": "zero"},
    "--reference live does not go with --loss simpo": {"loss": "simpo", "reference": "live"},
    "--reference none does not go with --loss sigmoid": {"reference": "none"},
    "--reference_cache does not go without": {"reference": "live", "reference_cache": "x"},
    "--loss hdpo needs --alpha": {"loss": "hdpo"},
    "--loss robust needs --label_smoothing": {"loss": "robust"},
    "unknown loss 'dpo': expected one of sigmoid": {"loss": "dpo"},
    "unknown reference 'frozen'": {"reference": "frozen"},
    "unknown kl_baseline 'mean'": {"loss": "kto", "kl_baseline": "mean"},
    r"label_smoothing in \[0, 0.5\)": {"label_smoothing": 0.5},
    "beta > 0": {"beta": 0.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_options_that_do_not_fit(tmp_path, message):
    with pytest.raises(RunError, match=message):
        config(tmp_path, "model", "data", **WRONG[message])


def test_xpo_without_the_references_sample(model, write, tmp_path):
    made = [{k: v for k, v in r.items() if k != "chosen_is_ref"} for r in records()]
    given = config(tmp_path / "run", model, write(*made), loss="xpo")
    with pytest.raises(Exception, match=r"data.jsonl:1: chosen_is_ref is missing; xpo moves"):
        dpo.train(given)


def test_kto_weights_out_of_balance(model, write, tmp_path, caplog):
    dpo.train(config(tmp_path / "run", model, write(*unpaired()), loss="kto", epochs=1))
    assert "best in 1 to 4/3" not in caplog.text  # 4 and 4
    dpo.train(
        config(tmp_path / "2", model, write(*unpaired()), loss="kto", epochs=1, desirable_weight=2)
    )
    assert "kto: 4 desirable and 4 undesirable responses weigh 8 and 4 together" in caplog.text


# --- what comes out -------------------------------------------------------------------------------


def test_it_learns_the_built_in_task(model, tmp_path):
    """Held-out: the training pairs, which a tiny model can learn by heart."""
    run = tmp_path / "run"
    values: dict[str, Any] = {
        "limit": 40,
        "eval_limit": 40,
        "split": "train",
        "eval_split": "train",
    }
    dpo.train(
        config(
            run,
            model,
            "synthetic",
            **values,
            eval_data="synthetic",
            epochs=3,
            batch_tokens=3000,
            micro_tokens=3000,
            lr=1e-3,
            beta=0.3,
            checkpoint_every=100,
        )
    )
    first, *_, last = lines_of(run, "eval")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert last["rewards/accuracies"] > 0.8 and last["loss"] < 0.6
    assert last["rewards/margins"] > 0.2
    p = last["rewards/accuracies"]
    interval = 1.96 * math.sqrt(p * (1 - p) / 40)
    assert last["rewards/accuracies_ci95"] == pytest.approx(interval, abs=1e-6)
    # The model that was saved is the one that was measured.
    assert (run / "model" / "config.json").exists()
    page = write_report(run).read_text()
    assert f"The policy ranks {100 * p:.0f}" in page and "of held-out pairs correctly" in page
    assert "Preferences, loss sigmoid" in page and "not finished" not in page
    for plot in ("preference-loss", "rewards", "preference-health", "time"):
        assert f'<figure id="plot-{plot}"><svg' in page
    accounting = json.loads((run / "accounting.json").read_text())
    assert accounting["method"] == "dpo" and accounting["phases"]["reference"]["flops"] > 0


def test_the_saved_model_is_the_trained_one(model, data, tmp_path):
    run = tmp_path / "run"
    saved = dpo.train(config(run, model, data, eval_data=data, beta=0.2))
    texts = texts_of(model)
    gaps = [
        float((a - b).sum())
        for a, b in zip(plain_logprobs(saved, texts), plain_logprobs(model, texts), strict=True)
    ]
    last = lines_of(run, "eval")[-1]
    assert last["rewards/chosen"] == pytest.approx(0.2 * sum(gaps[0::2]) / 6, rel=1e-4)
    assert last["rewards/rejected"] == pytest.approx(0.2 * sum(gaps[1::2]) / 6, rel=1e-4)
    losses = [softplus(-0.2 * (a - b)) for a, b in zip(gaps[0::2], gaps[1::2], strict=True)]
    assert last["loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert dataclasses.asdict(config(run, model, data))["loss"] == "sigmoid"
    assert Path(saved).name == "model"


def test_held_out_kto_ranks_the_pairs_it_split(model, data, write, tmp_path):
    """Every other held-out pair the other way round, so that some are ranked wrong."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    turned = [r | {k: r[other[k]] for k in other} if i % 2 else r for i, r in enumerate(records())]
    held = write(*turned, name="held.jsonl")
    run = tmp_path / "run"
    saved = dpo.train(config(run, model, data, eval_data=held, loss="kto", lr=1e-2))
    texts = texts_of(model)
    gaps = [
        float((a - b).sum())
        for a, b in zip(plain_logprobs(saved, texts), plain_logprobs(model, texts), strict=True)
    ]
    for i in range(2, 12, 4):
        gaps[i], gaps[i + 1] = gaps[i + 1], gaps[i]
    right = sum(a > b for a, b in zip(gaps[0::2], gaps[1::2], strict=True)) / 6
    assert 0.0 < right < 1.0
    last = lines_of(run, "eval")[-1]
    assert last["rewards/accuracies"] == pytest.approx(right)
    assert last["rewards/margins"] == pytest.approx(
        0.1 * (sum(gaps[0::2]) - sum(gaps[1::2])) / 6, rel=1e-4
    )
