"""APA and AWR on given responses: what is computed once, the losses of a step, their limits."""

import dataclasses
import json
import logging

import pytest
import torch
from labelled_runs import assert_resumes, lines_of, small
from plain_logprobs import plain_logprobs
from safetensors.torch import load_file

from fastalign import cli
from fastalign.data.packing import epochs_of_batches
from fastalign.models import Policy, load_tokenizer
from fastalign.testing import TOLERANCES
from fastalign.train import offline
from fastalign.train.labels import load_labelled, standardised
from fastalign.train.offline import Offline, OfflineAPAConfig, OfflineAWRConfig
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor


class APA:
    train = staticmethod(offline.train_apa)


class AWR:
    train = staticmethod(offline.train_awr)


@pytest.fixture
def start(road, tmp_path):
    """A model whose value head has learned something: V is not 0."""
    words = load_tokenizer(str(road / "sft" / "model"))
    policy = Policy.load(str(road / "sft" / "model"), words, value_head=True)
    assert policy.value_head is not None
    with torch.no_grad():
        policy.value_head.down.weight.normal_(generator=torch.Generator().manual_seed(1))
    policy.save(tmp_path / "start", words)
    return str(tmp_path / "start")


def plain_values(source, examples):
    """float64 [response tokens] of each example, from the hidden states of plain transformers."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(source, attn_implementation="eager").double().eval()
    head = {k: t.double() for k, t in load_file(f"{source}/value_head.safetensors").items()}
    found = []
    with torch.no_grad():
        for e in examples:
            ids = torch.tensor([e.prompt + e.completion])
            h = model(input_ids=ids).last_hidden_state[0, len(e.prompt) - 1 : -1]
            up = torch.relu(h @ head["up.weight"].T + head["up.bias"])
            found.append((up @ head["down.weight"].T + head["down.bias"])[:, 0])
    return found


def plain_gae(z, values, gamma, lam):
    """Advantages and returns of one response with reward z on its last token."""
    advantages, last = [], 0.0
    following = [*values.tolist()[1:], 0.0]
    rewards = [0.0] * (len(following) - 1) + [z]
    for r, v, after in reversed(list(zip(rewards, values.tolist(), following, strict=True))):
        last = r + gamma * after - v + gamma * lam * last
        advantages.append(last)
    found = torch.tensor(advantages[::-1], dtype=torch.float64)
    return found, found + values


def targets(source, data, samples, rewards, config):
    """Advantages (whitened by the training data), returns, log-probs and values, float64."""
    values = plain_values(source, samples.examples)
    z = standardised(rewards, data.rewards).tolist()
    pairs = [plain_gae(r, v, config.gamma, config.lam) for r, v in zip(z, values, strict=True)]
    return [a for a, _ in pairs], [r for _, r in pairs], values


def ess(weights):
    return (weights.sum() ** 2 / (weights**2).sum()).item()


# --- a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["apa", "awr"])
def test_a_step_is_the_formula(road, tmp_path, start, method):
    """Every step and the held-out losses from one set of weights, in float64."""
    kind, train = (
        (OfflineAPAConfig, offline.train_apa)
        if method == "apa"
        else (OfflineAWRConfig, offline.train_awr)
    )
    options = {"lambda_": 0.5} if method == "apa" else {"beta": 0.7, "weight_cap": 3.0}
    folder = tmp_path / "run"
    config = small(
        kind,
        folder,
        road,
        model=start,
        lr=0.0,
        value_lr=0.0,
        epochs=1,
        gamma=0.9,
        lam=0.8,
        vf_coef=0.3,
        micro_tokens=120,
        **options,
    )
    data = load_labelled(config)
    train(config)
    advantages, returns, values = targets(start, data, data.train, data.rewards, config)
    whole = torch.cat(advantages)
    mean, scale = whole.mean(), torch.rsqrt(whole.var() + 1e-8)
    logp = plain_logprobs(start, data.train.examples)

    def losses_of(a, r, v, lp):
        """Sums over tokens; the reference is the policy itself."""
        w = (a - mean) * scale
        if method == "apa":
            policy = (w / 0.5).square().sum()
        else:
            policy = -(torch.exp(w / 0.7).clamp(max=3.0) * lp).sum()
        return policy, 0.5 * (v - r).square().sum()

    schedule = epochs_of_batches(data.train.lengths, 1, 350, config.seed)
    lines = lines_of(folder, "train")
    assert len(lines) == len(schedule) >= 3
    for batch, line in zip(schedule, lines, strict=True):
        a, r, v, lp = (
            torch.cat([x[i] for i in batch]) for x in (advantages, returns, values, logp)
        )
        policy, value = (x.item() / len(a) for x in losses_of(a, r, v, lp))
        assert line["loss/policy"] == pytest.approx(policy, rel=1e-4)
        assert line["loss/value"] == pytest.approx(value, rel=1e-4)
        assert line["loss"] == pytest.approx(policy + 0.3 * value, rel=1e-4)
        assert line["nll"] == pytest.approx(-lp.mean().item(), rel=100 * FLOAT32)
        assert line["data_kl/k1"] == pytest.approx(0.0, abs=100 * FLOAT32)
        if method == "awr":
            weights = torch.exp((a - mean) * scale / 0.7).clamp(max=3.0)
            assert line["ess"] == pytest.approx(ess(weights), rel=1e-4)
    (facts,) = lines_of(folder, "data")
    assert facts["data/advantage_mean"] == pytest.approx(0.0, abs=1e-5)
    assert facts["data/advantage_std"] == pytest.approx(1.0, abs=1e-5)
    if method == "awr":
        weights = torch.exp((whole - mean) * scale / 0.7).clamp(max=3.0)
        assert facts["data/ess"] == pytest.approx(ess(weights), rel=1e-4)
    held = targets(start, data, data.held_out, data.held_out_rewards, config)
    rows = [torch.cat(x) for x in (*held, plain_logprobs(start, data.held_out.examples))]
    policy, value = (x.item() / len(rows[0]) for x in losses_of(*rows))
    line = lines_of(folder, "eval")[0]
    assert line["loss/policy"] == pytest.approx(policy, rel=1e-4)
    assert line["loss"] == pytest.approx(policy + 0.3 * value, rel=1e-4)


def test_a_new_value_head_says_0_and_advantages_decay(road, tmp_path):
    """Without whitening A_t = lam^(T - t) z, and the returns are the same."""
    config = small(OfflineAPAConfig, tmp_path, road, whiten=False, lam=0.5)
    data = load_labelled(config, value_head=True)
    run = Offline(config, data, "apa-offline", offline.losses.APA(1.0))
    z = standardised(data.rewards)
    for i in (0, 7):
        n = run.train.response_lengths[i]
        expected = z[i] * 0.5 ** torch.arange(n - 1, -1, -1.0)
        for name in ("advantages", "returns"):
            found = run.train.inputs[name][run.train.rows(i)]
            assert (found - expected).abs().max() < 10 * FLOAT32


def test_apa_moves_towards_its_target(road, tmp_path):
    """Log-probs rise on good responses and fall on bad ones, and the distance is told."""
    config = small(OfflineAPAConfig, tmp_path, road, epochs=12, lr=1e-3, lambda_=2.0)
    config = dataclasses.replace(config, limit=4, eval_limit=1, batch_tokens=4096)
    offline.train_apa(config)
    first, last = (lines_of(tmp_path, "train")[i] for i in (0, -1))
    assert last["loss/policy"] < 0.8 * first["loss/policy"]
    assert first["data_kl/k3"] == pytest.approx(0.0, abs=100 * FLOAT32)
    assert last["data_kl/k3"] > 1e-3
    data = load_labelled(config)
    before = plain_logprobs(config.model, data.train.examples)
    after = plain_logprobs(tmp_path / "model", data.train.examples)
    moved = torch.tensor([(b - a).mean() for a, b in zip(before, after, strict=True)])
    assert torch.corrcoef(torch.stack([moved, data.rewards]))[0, 1] > 0.5


# --- computed once, or anew ---------------------------------------------------------------------


def looks(monkeypatch):
    seen = []
    plain = Offline.look

    def look(self, samples, meter):
        seen.append(len(samples.examples))
        return plain(self, samples, meter)

    monkeypatch.setattr(Offline, "look", look)
    return seen


def test_the_reference_is_looked_up_once(road, tmp_path, monkeypatch):
    seen = looks(monkeypatch)
    config = small(OfflineAPAConfig, tmp_path, road, limit=3, eval_limit=1, epochs=1)
    offline.train_apa(config)
    assert seen == [6, 2]
    cost = json.loads((tmp_path / "accounting.json").read_text())["phases"]["reference"]
    assert cost["flops"] > 0
    found = load_file(tmp_path / "computed" / "reference.safetensors")
    logp = torch.cat(plain_logprobs(config.model, load_labelled(config).train.examples))
    assert (found["logp"] - logp).abs().max() < 1000 * FLOAT32
    offline.train_apa(dataclasses.replace(config, resume="auto"))
    assert seen == [6, 2]
    offline.train_apa(dataclasses.replace(config, model=str(tmp_path / "model"), overwrite=True))
    assert seen == [6, 2] * 2  # of another model


def test_dropout_is_off(road, tmp_path, monkeypatch):
    """log pi is compared with pi_init's, which had none."""
    seen = []
    plain = Offline.backward

    def backward(self, *args):
        seen.append(self.policy.training)
        return plain(self, *args)

    monkeypatch.setattr(Offline, "backward", backward)
    offline.train_apa(small(OfflineAPAConfig, tmp_path, road, limit=2, eval_limit=1, eval_every=1))
    assert len(seen) > 1 and not any(seen)


def test_values_anew_before_each_epoch(road, tmp_path, monkeypatch):
    seen = looks(monkeypatch)
    changes = {"epochs": 3, "lr": 0.0, "value_lr": 1e-2, "limit": 4, "eval_limit": 1}
    changes |= {"batch_tokens": 4096}  # one step an epoch
    offline.train_apa(small(OfflineAPAConfig, tmp_path / "kept", road, **changes))
    assert seen == [8, 2]
    seen.clear()
    offline.train_apa(small(OfflineAPAConfig, tmp_path / "new", road, refresh=True, **changes))
    assert seen == [8, 2] * 3
    kept, new = (lines_of(tmp_path / name, "train") for name in ("kept", "new"))
    losses = [[line["loss/value"] for line in lines] for lines in (kept, new)]
    assert len(losses[0]) == 3 and losses[0][0] == losses[1][0]
    for step in (1, 2):
        assert abs(losses[0][step] - losses[1][step]) > 1e-3
    seen.clear()  # two steps an epoch, and only the second epoch begins with new values
    changes |= {"epochs": 2, "limit": 1, "batch_tokens": 1}
    offline.train_apa(small(OfflineAPAConfig, tmp_path / "two", road, refresh=True, **changes))
    assert len(lines_of(tmp_path / "two", "train")) == 4 and seen == [2, 2] * 2


@pytest.mark.parametrize(
    ("method", "config", "refresh"),
    [(APA, OfflineAPAConfig, True), (APA, OfflineAPAConfig, False), (AWR, OfflineAWRConfig, False)],
)
def test_resumed_is_the_same_run(road, tmp_path, monkeypatch, method, config, refresh):
    """Stopped in the middle of the second epoch where values were computed anew."""
    changes = {"limit": 3, "epochs": 2, "eval_limit": 1}
    if refresh:  # two steps an epoch
        changes |= {"limit": 1, "epochs": 3, "batch_tokens": 1}
    made = small(config, tmp_path, road, refresh=refresh, lr=1e-3, **changes)
    assert_resumes(method, made, monkeypatch)


# --- commands and bad input ---------------------------------------------------------------------


@pytest.mark.parametrize("command", ["apa-offline", "awr-offline"])
def test_the_commands_and_their_reports(road, tmp_path, command):
    folder = tmp_path / "run"
    options = f"--model {road}/sft/model --reward {road}/reward/model --max_length 256 --limit 4"
    cli.main(["train", command, "--output", str(folder), *options.split(), "--eval_limit", "2"])
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "model" / "value_head.safetensors").is_file()


def test_few_tokens_that_count_are_warned_of(road, tmp_path, caplog):
    config = small(OfflineAWRConfig, tmp_path, road, beta=0.2, weight_cap=None, epochs=1, lr=0.0)
    offline.train_awr(config)
    found = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert any("the effective sample size is" in m and "tokens: a few of them" in m for m in found)


def test_bad_input(road, tmp_path):
    for kind, name, value in (
        (OfflineAPAConfig, "lambda_", 0.0),
        (OfflineAWRConfig, "beta", 0.0),
        (OfflineAWRConfig, "weight_cap", -1.0),
    ):
        with pytest.raises(RunError, match=f"expected {name} > 0, got {value}"):
            small(kind, tmp_path, road, **{name: value})
    with pytest.raises(RunError, match="expected gamma <= 1 and lam <= 1, got 1.5 and 0.95"):
        small(OfflineAPAConfig, tmp_path, road, gamma=1.5)
