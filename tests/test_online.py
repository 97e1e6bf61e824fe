"""The loop of methods on a policy's own samples: stops between updates, controllers, rewards."""

import dataclasses
import json
import math
import re
import signal
from typing import Any

import pytest
import torch
from learners import experience_of, some_rollouts
from safetensors.torch import load_file

from fastalign.rollout import SamplingConfig
from fastalign.train import apa, awr, grpo, ppo
from fastalign.train.optim import Optimizer
from fastalign.train.run import Interrupted, RunError
from fastalign.train.update import Buffer

pytestmark = pytest.mark.usefixtures("one_thread")

CLOCKS = ("time", "tokens_per_s", "flops_per_s", "utilisation", "memory_gib", "joules")


def lines_of(folder, phase=None):
    """Of metrics.jsonl, without what a clock or a meter says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k.split("/")[0] not in CLOCKS}
        for line in lines
        if phase in (None, line["phase"])
    ]


MODULES: dict[str, tuple[Any, Any]] = {
    "apa": (apa, apa.APAConfig),
    "awr": (awr, awr.AWRConfig),
    "ppo": (ppo, ppo.PPOConfig),
    "grpo": (grpo, grpo.GRPOConfig),
}


def config_of(method, folder, road, **changes):
    values: dict[str, Any] = {
        "output": str(folder),
        "policy": str(road / "sft" / "model"),
        "reward": str(road / "reward" / "model"),
        "steps": 2,
        "epochs": 2,
        "prompts_per_step": 3,
        "samples_per_prompt": 2,
        "batch_tokens": 150,
        "eval_limit": 2,
        "eval_samples": 1,
        "sampling": SamplingConfig(max_new_tokens=6),
    }
    return MODULES[method][1](**(values | changes))


def run(method, folder, road, **changes):
    config = config_of(method, folder, road, **changes)
    MODULES[method][0].train(config)
    return config


def stop_after(monkeypatch, n, how):
    """Calls `how` in the middle of the n-th update of a run."""
    plain, count = Optimizer.update, 0

    def update(self, *args):
        nonlocal count
        count += 1
        if count == n:
            how()
        return plain(self, *args)

    monkeypatch.setattr(Optimizer, "update", update)


def interrupt():
    signal.raise_signal(signal.SIGINT)


class Killed(BaseException):
    """What nothing catches."""


def die():
    raise Killed


SMALL = {"critic_steps": 2, "ptx_limit": 20, "ptx_tokens": 100}
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "apa": ("apa", {"form": "repo", "lambda_": 2.0}),
    "ppo": ("ppo", {"kl_control": "adaptive", "kl_target": 0.1, "kl_horizon": 20}),
    "ppo max": ("ppo", {"preset": "ppo-max", "ptx_data": "synthetic", **SMALL}),
    "grpo": ("grpo", {"variant": "dapo"}),
}


def same_weights(one, other):
    for file in one.glob("model/*.safetensors"):
        ours, theirs = load_file(file), load_file(other / "model" / file.name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_stopped_between_updates_goes_on_bit_for_bit(road, tmp_path, monkeypatch, name):
    """Ctrl-C in an update of the second round; the checkpoint holds the round so far."""
    method, changes = RESUMED[name]
    run(method, tmp_path / "whole", road, **changes)
    updates = 0

    def counted(self, *args, plain=Optimizer.update):
        nonlocal updates
        updates += 1
        return plain(self, *args)

    with monkeypatch.context() as counting:
        counting.setattr(Optimizer, "update", counted)
        run(method, tmp_path / "again", road, **changes)
    assert lines_of(tmp_path / "again") == lines_of(tmp_path / "whole")
    per_round = updates // 2
    assert updates >= 8  # two updates and more in each of four epochs
    with monkeypatch.context() as stopping:
        stop_after(stopping, updates - per_round + 2, interrupt)
        said = r"stopped after update 2 of step 2; go on with --resume \(checkpoint .*step-000001\)"
        with pytest.raises(Interrupted, match=said):
            run(method, tmp_path / "parts", road, **changes)
    assert lines_of(tmp_path / "parts", "train")[-1]["step"] == 1
    torch.rand(7)  # the random state of the new process is another one
    run(method, tmp_path / "parts", road, resume="auto", **changes)
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")
    same_weights(tmp_path / "whole", tmp_path / "parts")
    ours, theirs = (
        json.loads((tmp_path / folder / "evaluation.json").read_text())
        for folder in ("whole", "parts")
    )
    assert ours["before"] == theirs["before"] and ours["after"] == theirs["after"]
    assert ours["method"] == method and ours["proxy"] == "mean"


def test_a_killed_run_goes_on_from_its_last_checkpoint_within_a_round(road, tmp_path, monkeypatch):
    changes = {"checkpoint_updates": 1, "steps": 1}
    run("ppo", tmp_path / "whole", road, **changes)
    with monkeypatch.context() as stopping:
        stop_after(stopping, 4, die)
        with pytest.raises(Killed):
            run("ppo", tmp_path / "parts", road, **changes)
    (checkpoint,) = (tmp_path / "parts" / "checkpoints").iterdir()
    assert checkpoint.name == "step-000000"
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert (state["buffer"]["n_updates"], state["buffer"]["epoch"]) in ((3, 0), (3, 1))
    seen = []
    stop_after(monkeypatch, 1, lambda: seen.append(1))
    run("ppo", tmp_path / "parts", road, resume="auto", **changes)
    assert seen == [1]
    assert lines_of(tmp_path / "parts") == lines_of(tmp_path / "whole")
    same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_buffer_survives_a_file(tmp_path):
    found = experience_of(some_rollouts(), torch.linspace(-3, -1, 17))
    found = dataclasses.replace(found, parts={"ensemble": torch.arange(6.0)})
    buffer = Buffer(found, {"advantages": torch.arange(17.0)}, [0, 2], {"x": 1.5}, 1, 2)
    buffer.add({"loss": 2.0})
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    other = Buffer()
    other.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert other.found is not None and other.found.rollouts == found.rollouts
    for name in ("cu_seqlens", "logp", "ref_logp", "scores", "proxy"):
        assert torch.equal(getattr(other.found, name), getattr(found, name))
    assert torch.equal(other.found.parts["ensemble"], torch.arange(6.0))
    assert torch.equal(other.tokens["advantages"], torch.arange(17.0))
    assert (other.kept, other.metrics, other.epoch, other.position) == ([0, 2], {"x": 1.5}, 1, 2)
    assert (other.n_updates, other.sums) == (1, {"loss": 2.0})
    other.clear()
    assert other == Buffer()


def test_the_controller_follows_the_kl(road, tmp_path):
    changes = {"kl_control": "adaptive", "kl_target": 0.05, "kl_horizon": 12, "steps": 3}
    run("ppo", tmp_path / "ppo", road, lr=3e-3, kl_in="loss", kl_kind="k3", **changes)
    lines = lines_of(tmp_path / "ppo", "train")
    assert lines[0]["kl/coef"] == 0.05
    for before, after in zip(lines, lines[1:], strict=False):
        error = min(max(before["kl/k1"] / 0.05 - 1, -0.2), 0.2)
        assert after["kl/coef"] == pytest.approx(before["kl/coef"] * (1 + error * 6 / 12))
    assert len({line["kl/coef"] for line in lines}) == 3
    assert all(line["policy/ref_k3"] >= 0 for line in lines)


def test_a_python_function_is_a_reward_and_adds_to_the_ensemble(road, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(prompts, responses):\n"
        "    assert len(prompts) == len(responses) and all(isinstance(p, str) for p in prompts)\n"
        "    return [float(len(r)) for r in responses]\n"
    )
    ensemble = str(road / "reward" / "model")
    lines = {}
    for name, reward in {
        "alone": f"{file}:length",
        "sum": f"{ensemble},0.5*{file}:length",
        "ensemble": ensemble,
    }.items():
        run("grpo", tmp_path / name, road, reward=reward, steps=1)
        lines[name] = lines_of(tmp_path / name, "train")[0]
    assert "reward/head_0" not in lines["alone"] and "reward/head_0" in lines["sum"]
    summed = lines["ensemble"]["reward/proxy"] + 0.5 * lines["alone"]["reward/proxy"]
    assert lines["sum"]["reward/proxy"] == pytest.approx(summed, rel=1e-5)
    assert lines["sum"]["reward/mine.length"] == lines["alone"]["reward/proxy"] > 1
    facts = json.loads((tmp_path / "sum" / "evaluation.json").read_text())
    assert facts["proxy"] == "mean + 0.5 mine.length"


def test_a_critic_of_its_own_is_trained_and_kept(road, tmp_path):
    changes = {"critic": "reward", "critic_steps": 3, "steps": 1, "epochs": 1}
    run("awr", tmp_path / "awr", road, **changes)
    (line,) = lines_of(tmp_path / "awr", "critic")
    assert line["step"] == 0 and math.isfinite(line["value/pretrain_loss"])
    (checkpoint,) = (tmp_path / "awr" / "checkpoints").iterdir()
    tensors = load_file(checkpoint / "shard-00001.safetensors")
    critic = {k: t for k, t in tensors.items() if k.startswith("critic.")}
    assert "critic.head.weight" in critic and "policy.value_head.up.weight" not in tensors
    start = load_file(road / "reward" / "model" / "model.safetensors")
    moved = [
        (t - start[k.removeprefix("critic.trunk.")]).abs().max().item()
        for k, t in critic.items()
        if k.removeprefix("critic.trunk.") in start
    ]
    assert len(moved) > 5 and max(moved) > 1e-4


def test_sampling_and_training_agree_before_the_first_update_only(road, tmp_path):
    run("ppo", tmp_path / "ppo", road, lr=3e-3, steps=1)
    (line,) = lines_of(tmp_path / "ppo", "train")
    assert 0 < line["sampling_gap"] < 1e-4
    assert line["policy/old_k3"] > 1e-3  # after that it has moved away


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"form": "papre"}, "unknown form 'papre': expected one of paper, repo"),
        ({"lambda_": 0.0}, "expected lambda_ > 0, got 0"),
        ({"checkpoint_updates": -1}, "expected checkpoint_updates >= 0, got -1"),
        ({"kl_kind": "exact"}, "unknown kl_kind 'exact': expected one of k1, k2, k3"),
        ({"kl_control": "slow"}, "unknown kl_control 'slow': expected one of fixed, adaptive"),
        ({"kl_horizon": 0}, "expected kl_horizon >= 1, got 0"),
    ],
)
def test_options_out_of_range_say_so(changes, said):
    with pytest.raises(RunError, match=re.escape(said)):
        apa.APAConfig(**changes)


def test_the_repo_form_whitens_as_its_authors_do_unless_told_otherwise():
    assert apa.APAConfig().whiten_over == "round"
    assert apa.APAConfig(form="repo").whiten_over == "padded"
    assert apa.APAConfig(form="repo", whiten_over="round").whiten_over == "round"
    assert apa.APAConfig(form="repo", whiten=False).whiten_over == "round"
    assert apa.APA(apa.APAConfig(form="repo", lambda_=10.0)).loss(0.0).form == "repo"
