"""The three training loops: what they log, that they learn, that a resumed run is the same run."""

import dataclasses
import json
import signal
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastalign
from fastalign.rollout import SamplingConfig
from fastalign.testing import TOLERANCES
from fastalign.train import apa, reward, sft
from fastalign.train.moments import RunningMoments
from fastalign.train.run import Interrupted, Run, RunError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor
CLOCKS = {"time", "tokens_per_s", "tokens_per_s/trained", "memory_gib"}
CLOCKS |= {"flops_per_s", "utilisation"}


def lines_of(folder, phase=None):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if phase in (None, line["phase"])]


def without_clocks(lines):
    return [
        {k: v for k, v in line.items() if k not in CLOCKS and not k.startswith(("time/", "joules"))}
        for line in lines
    ]


# --- what is logged ---------------------------------------------------------------------------

COMMON = {"step", "phase", "time"}
TRAIN = COMMON | {"loss", "lr", "grad_norm", "tokens", "tokens_per_s", "memory_gib"}
TRAIN |= {"tokens_per_s/trained", "flops", "flops_per_s", "utilisation", "time/update"}
REWARDS = {"reward/proxy", "reward/proxy_std", "reward/gold", "reward/gold_std"}
POLICY = REWARDS | {"kl/k1", "kl/k3", "entropy", "length", "finished", "reward/disagreement"}
POLICY |= {"heads/correlation"}
HEADS = {"reward/head_0", "reward/head_1", "reward/head_2"}
GUARDS = {"repeats", "distinct", "reward/zero_std", "kl/k1_stderr"}
PHASES = {"time/generate", "time/score", "time/reference", "time/value"}
COMPARED = {"reward/proxy", "reward/gold", "kl/k1", "kl/k3", "length", "finished"}
ERRORS = {f"{name}_stderr" for name in COMPARED}
KEYS = {
    ("sft", "train"): TRAIN | {"perplexity"},
    ("sft", "eval"): COMMON | {"loss", "perplexity"},
    ("reward", "train"): TRAIN | {"accuracy", "tokens/repeated"},
    ("reward", "eval"): COMMON
    | {"loss", "accuracy", "accuracy/ci95", "disagreement"}
    | {"heads/correlation/shuffled", "disagreement/shuffled"}
    | {"accuracy/head_0", "accuracy/head_1", "accuracy/head_2", "heads/correlation"}
    | {"argmin/head_0", "argmin/head_1", "argmin/head_2"},
    ("apa", "train"): TRAIN
    | POLICY
    | HEADS
    | GUARDS
    | PHASES
    | {"loss/policy", "loss/value", "value/explained_variance", "advantage/std"}
    | {"policy/residual", "policy/ref_k1", "policy/ref_k3", "sampling_gap"}
    | {"tokens/repeated"},
    ("apa", "eval"): COMMON | POLICY | HEADS | ERRORS | {"n", "sampling_gap"},
}


@pytest.mark.parametrize(("run", "phase"), KEYS)
def test_every_line_has_its_keys_and_finite_numbers(road, run, phase):
    lines = lines_of(road / run, phase)
    assert lines
    for line in lines:
        # Joules are there where the machine can measure them.
        assert {key for key in line if not key.startswith("joules")} == KEYS[run, phase]
        numbers = torch.tensor([v for v in line.values() if not isinstance(v, str)])
        assert torch.isfinite(numbers).all()


def test_steps_count_up(road):
    for run in ("sft", "reward", "apa"):
        steps = [line["step"] for line in lines_of(road / run, "train")]
        assert steps == list(range(1, len(steps) + 1))
    assert [line["step"] for line in lines_of(road / "apa", "eval")] == [0, 2]


def test_tokens_per_second_count_each_token_once(road):
    """Of the whole step, and of its phases."""
    for run in ("sft", "reward", "apa"):
        for line in lines_of(road / run, "train"):
            phases = sum(v for k, v in line.items() if k.startswith("time/"))
            assert line["tokens"] / line["tokens_per_s"] >= phases
            assert line["tokens_per_s/trained"] < line["tokens_per_s"]


def test_sft_learns(road):
    train, held = lines_of(road / "sft", "train"), lines_of(road / "sft", "eval")
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    assert held[-1]["loss"] < held[0]["loss"] - 0.5
    assert train[0]["loss"] > 5.0  # about log(300) of an untrained model
    assert train[0]["lr"] <= max(line["lr"] for line in train) == pytest.approx(1e-3)


def test_reward_heads_are_standardised(road):
    """The mean over training samples of each head is 0; held-out pairs are near that."""
    line = lines_of(road / "reward", "eval")[-1]
    assert 0.0 < line["disagreement"] < 2.0
    assert 0.0 <= line["accuracy"] <= 1.0 and line["accuracy/ci95"] < 0.4
    heads = load_file(road / "reward" / "model" / "heads.safetensors")
    assert (heads["scale"] != 1).all() and (heads["center"] != 0).all()


def test_evaluation_before_and_after(road):
    found = json.loads((road / "apa" / "evaluation.json").read_text())
    evals = lines_of(road / "apa", "eval")
    for when, line in (("before", evals[0]), ("after", evals[1])):
        assert found[when] == {k: v for k, v in line.items() if k not in COMMON}
        assert found[when]["n"] == 8
        # Sampler and trainer agree on the log-probs of the same tokens.
        assert found[when]["sampling_gap"] < 10 * FLOAT32
    assert found["before"]["kl/k1"] == pytest.approx(0.0, abs=100 * FLOAT32)
    assert found["before"]["kl/k3"] == pytest.approx(0.0, abs=100 * FLOAT32)
    assert found["after"]["kl/k3"] > 0.0
    assert found["change_stderr"].keys() == COMPARED
    assert (found["method"], found["proxy"]) == ("apa", "mean")
    assert (found["n_prompts"], found["n_samples"]) == (4, 2)
    samples = [json.loads(s) for s in (road / "apa" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    for sample in samples:
        assert set(sample) == {"prompt", "before", "after", "before_reward", "after_reward"}
        assert sample["before_reward"].keys() == {"proxy", "gold"}
        assert "Human:" in sample["prompt"] and isinstance(sample["after"], str)


# --- a resumed run is the same run --------------------------------------------------------------


def sft_config(folder, road):
    return sft.SFTConfig(
        output=str(folder),
        model="scratch:1m",
        vocab_size=300,
        limit=12,
        batch_tokens=512,
        eval_limit=4,
        eval_every=2,
        checkpoint_every=2,
    )


def reward_config(folder, road):
    return reward.RewardConfig(
        output=str(folder),
        model=str(road / "sft" / "model"),
        max_length=256,
        heads=3,
        limit=12,
        batch_tokens=512,
        eval_limit=4,
        eval_every=2,
        checkpoint_every=2,
    )


def apa_config(folder, road, **changes):
    values: dict[str, Any] = {
        "output": str(folder),
        "policy": str(road / "sft" / "model"),
        "reward": str(road / "reward" / "model"),
        "steps": 4,
        "prompts_per_step": 3,
        "samples_per_prompt": 2,
        "batch_tokens": 256,
        "eval_limit": 2,
        "eval_samples": 2,
        "checkpoint_every": 2,
        "sampling": SamplingConfig(max_new_tokens=8),
    }
    return apa.APAConfig(**(values | changes))


METHODS: dict[str, tuple[Any, Any, str]] = {
    "sft": (sft.train, sft_config, "model.safetensors"),
    "reward": (reward.train, reward_config, "heads.safetensors"),
    "apa": (apa.train, apa_config, "model.safetensors"),
}


def interrupt_at(monkeypatch, step):
    """Ctrl-C in the middle of a step."""
    plain = Run.log

    def log(self, at, phase, metrics):
        plain(self, at, phase, metrics)
        if at == step and phase == "train":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "log", log)


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_is_bit_for_bit_the_same(road, tmp_path, monkeypatch, method):
    train, make, file = METHODS[method]
    train(make(tmp_path / "whole", road))
    whole = lines_of(tmp_path / "whole")
    total = whole[-1]["step"]
    assert total >= 4
    with monkeypatch.context() as stopping:
        interrupt_at(stopping, 3)
        with pytest.raises(Interrupted, match="stopped at step 3; go on with --resume"):
            train(make(tmp_path / "parts", road))
    assert lines_of(tmp_path / "parts")[-1]["step"] == 3
    # What a killed process may leave behind: a line of a step to come, and half a line.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "phase": "train", "time": 0, "loss": 99.0}\n{"step": 4, "pha')
    torch.rand(7)  # the random state of the new process is another one
    train(dataclasses.replace(make(tmp_path / "parts", road), resume="auto"))
    assert without_clocks(lines_of(tmp_path / "parts")) == without_clocks(whole)
    whole_cost, cost = (
        json.loads((tmp_path / run / "accounting.json").read_text()) for run in ("whole", "parts")
    )
    assert (whole_cost["resumes"], cost["resumes"]) == (0, 1)
    assert (cost["method"], cost["step"]) == (method, total)
    for name, spent in whole_cost["phases"].items():
        for key in ("tokens", "trained", "flops"):
            assert cost["phases"][name][key] == spent[key], (name, key)
    train_lines = [line for line in whole if line["phase"] == "train"]
    assert cost["total"]["tokens"] == sum(line["tokens"] for line in train_lines) > 0
    assert cost["total"]["flops"] == sum(line["flops"] for line in train_lines) > 0
    assert 0 < cost["phases"]["update"]["seconds"] < cost["total"]["seconds"]
    for name in {file, "model.safetensors"}:
        ours = load_file(tmp_path / "whole" / "model" / name)
        theirs = load_file(tmp_path / "parts" / "model" / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    if method == "apa":
        ours, theirs = (
            json.loads((tmp_path / run / "evaluation.json").read_text())
            for run in ("whole", "parts")
        )
        for key in ("before", "after", "change_stderr"):
            assert ours[key] == theirs[key]


def test_resuming_what_is_finished_changes_nothing(road, tmp_path):
    folder = tmp_path / "apa"
    apa.train(apa_config(folder, road, steps=1))
    kept = ("metrics.jsonl", "samples.jsonl", "model/model.safetensors")
    before = [(folder / name).read_bytes() for name in kept]
    numbers = json.loads((folder / "evaluation.json").read_text())
    apa.train(apa_config(folder, road, steps=1, resume="auto"))
    assert [(folder / name).read_bytes() for name in kept] == before
    again = json.loads((folder / "evaluation.json").read_text())
    assert (again["before"], again["after"]) == (numbers["before"], numbers["after"])


def test_another_architecture_is_refused(road, tmp_path):
    saved = str(sorted((road / "sft" / "checkpoints").iterdir())[-1])
    with pytest.raises(RunError, match="the checkpoint is of another architecture"):
        config = sft_config(tmp_path, road)
        sft.train(dataclasses.replace(config, model="scratch:2m", batch_tokens=1024, resume=saved))


# --- APA ----------------------------------------------------------------------------------------


def test_reference_and_cpp_train_the_same(road, tmp_path):
    moved = {}
    start = load_file(road / "sft" / "model" / "model.safetensors")
    for name in ("reference", "cpp"):
        with fastalign.backend(name):
            apa.train(apa_config(tmp_path / name, road, steps=1, batch_tokens=4096, epochs=1))
        after = load_file(tmp_path / name / "model" / "model.safetensors")
        moved[name] = torch.cat([(after[k] - start[k]).flatten() for k in start])
    one, two = (lines_of(tmp_path / name, "train")[0] for name in moved)
    assert one.keys() == two.keys()
    for key in without_clocks([one])[0]:
        if not isinstance(one[key], str):
            assert one[key] == pytest.approx(two[key], rel=100 * FLOAT32, abs=100 * FLOAT32), key
    # Adam divides by the gradient's size, so where a gradient is 0 to rounding its sign decides.
    distance = (moved["reference"] - moved["cpp"]).abs().mean() / moved["cpp"].abs().mean()
    assert distance < 1e-2 and moved["cpp"].abs().max() > 1e-5


# --- the parts ----------------------------------------------------------------------------------


def test_running_moments():
    """[1, 2, 3, 4], then [2, 4]: the moments of all six, batch by batch."""
    moments = RunningMoments()
    assert moments.std == 0.0
    moments.update(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (moments.mean, moments.std) == (2.5, pytest.approx(1.290994449, abs=1e-9))
    moments.update(torch.tensor([]))
    again = RunningMoments()
    again.load_state_dict(moments.state_dict())
    again.update(torch.tensor([[2.0], [4.0]]))
    assert again.mean == pytest.approx(2.666666667, abs=1e-9)
    assert again.std == pytest.approx(1.211060142, abs=1e-9)
    nan = float("nan")
    moments.update(torch.tensor([2.0, nan, 4.0]), torch.tensor([True, False, True]))
    assert moments.state_dict() == pytest.approx(again.state_dict(), abs=1e-9)
    apart = RunningMoments()
    apart.merge(2, 3.0, 2.0)  # [2, 4]
    apart.merge(4, 2.5, 5.0)  # [1, 2, 3, 4]
    assert apart.state_dict() == pytest.approx(again.state_dict(), abs=1e-9)


def test_rewards_are_normalized_and_clipped():
    """Mean 3 and deviation 2: (9 - 3) / 2 = 3, held at 2; without the shift 9 / 2."""
    moments = RunningMoments()
    values = torch.tensor([9.0, 3.0, -4.0])
    assert moments.normalize(values, shift_mean=False).tolist() == [9.0, 3.0, -4.0]
    moments.update(torch.tensor([1.0, 3.0, 5.0]))
    assert moments.normalize(values).tolist() == [3.0, 0.0, -3.5]
    assert moments.normalize(values, clip=2.0).tolist() == [2.0, 0.0, -2.0]
    assert moments.normalize(values, shift_mean=False).tolist() == [4.5, 1.5, -2.0]


def test_bootstrap_draws_are_apart_and_whole():
    weights = reward.bootstrap_weights(200, 3, seed=5)
    assert weights.sum(0).tolist() == [200, 200, 200]
    assert torch.equal(weights, reward.bootstrap_weights(200, 3, seed=5))
    assert not torch.equal(weights[:, 0], weights[:, 1])
    assert ((weights == 0).float().mean(0) - 0.368).abs().max() < 0.1  # 1/e of the pairs unseen


def test_a_checkpoint_of_another_run_does_not_go_into_a_used_folder(road, tmp_path):
    """--resume of one run's checkpoint with another run's folder as output deletes nothing."""
    (tmp_path / "kept.txt").write_text("mine")
    source = next((road / "apa" / "checkpoints").glob("step-*"))
    config = apa.APAConfig(
        output=str(tmp_path),
        resume=str(source),
        policy=str(road / "sft" / "model"),
        reward=str(road / "reward" / "model"),
    )
    with pytest.raises(RunError, match="already in use"):
        apa.train(config)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
