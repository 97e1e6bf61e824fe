"""Sharing batches between processes, and sharded weights trained as unsharded ones are.

What needs two processes runs in two, started by torchrun, on gloo; what one process does beside
them, in this one.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from several_processes import LENGTHS, found, held, steps, tiny_policy, torchrun, trainee
from torch import nn

from fastalign import cli
from fastalign.train import checkpoint, distributed
from fastalign.train.distributed import Micro, micros, plan_micros, shares


def test_shares_are_balanced_and_whole() -> None:
    """17 to the one, 9 and 8 to the other, then 5 | 4 3 | 2 to whoever has least."""
    taken = shares(LENGTHS, 2)
    assert taken == [[0, 3, 5], [1, 2, 4, 6]]
    assert [sum(LENGTHS[i] for i in rows) for rows in taken] == [24, 24]
    assert sorted(i for rows in shares(LENGTHS, 3) for i in rows) == list(range(7))


def test_every_process_makes_as_many_passes() -> None:
    """24 tokens each under a budget of 17: 5 | 17 | 2 beside 9 3 4 | 8, and 2 for nothing."""
    plans = plan_micros(range(7), LENGTHS, 17, 2)
    assert plans[0] == [Micro([0]), Micro([3]), Micro([5])]
    assert plans[1] == [Micro([1, 2, 4]), Micro([6]), Micro([5], counts=False)]


def test_fewer_sequences_than_processes() -> None:
    """The idle process passes the shortest sequence with weight 0."""
    assert plan_micros([3, 1], LENGTHS, 100, 3) == [
        [Micro([3])],
        [Micro([1])],
        [Micro([1], counts=False)],
    ]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_everything_is_looked_at_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    passes = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "world", lambda rank=rank: distributed.World(rank, size))
        found_ = list(distributed.looks(LENGTHS, 17))
        seen += [i for micro in found_ if micro.counts for i in micro.rows]
        passes.append(len(found_))
    assert sorted(seen) == list(range(7)) and len(set(passes)) == 1
    assert all(n < 5 for n in passes) or size == 1


@pytest.mark.parametrize("command", ["generate", "score", "evaluate", "bestofn", "report"])
def test_what_runs_in_one_process_says_so(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        cli.main([command])
    assert stop.value.code == 2
    line = f"fastalign: {command} runs in one process, not in 2: start it without torchrun\n"
    assert capsys.readouterr().err == line


def test_one_process_keeps_the_order_of_the_batch() -> None:
    found_ = list(micros(nn.Identity(), [4, 0, 6, 2], LENGTHS, 12))
    assert found_ == [Micro([4, 0]), Micro([6, 2])]


def test_alone_nothing_is_done() -> None:
    policy = tiny_policy(True)
    distributed.shard(policy, "hidden")
    assert not distributed.is_sharded(policy)
    numbers = torch.tensor([1.0, 2.0])
    assert distributed.total(numbers) is numbers
    assert distributed.gather([1]) == [[1]]
    assert distributed.largest(3) == 3
    assert distributed.world() == distributed.World(0, 1)
    assert distributed.whole(numbers) is numbers and distributed.local(numbers) is numbers


def test_alone_a_module_is_whole() -> None:
    policy = tiny_policy(True)
    assert distributed.unsharded(policy) is policy


def test_a_pass_that_does_not_count() -> None:
    assert Micro([0]).divisor(7) == 7
    assert Micro([0], counts=False).divisor(7) == math.inf


def test_split_alone() -> None:
    assert distributed.split(lambda x: x * x, [3, 1, 2]) == [9, 1, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


def test_two_processes_talk(folder: Path) -> None:
    assert found("words", folder, 2) == {
        "summed": [2.0, 10.0],
        "lists": [[0, "a"], [1, "a"]],
        "largest": 4,
        "chosen": {"rank": 0},
        "part": 49,  # 97 rows over two processes: 49 and 48
        "tied": True,
        "whole": 0.0,
        "split": [0, 10, 20, 30, 40],
        "split by": [0, 1, 0, 1, 0],
        "error": "of the main process",
        "one is wrong": "of the second process",
    }


def test_two_processes_train_as_one_does(folder: Path) -> None:
    """Losses, gradient norms and weights to rounding, with tied and with untied embeddings, several
    passes a step and one process with a pass of weight 0."""
    two = found("steps", folder, 2)
    for name, tied in (("tied", True), ("untied", False)):
        one = steps(tied)
        torch.testing.assert_close(
            torch.tensor(two[name]["history"]), torch.tensor(one["history"]), rtol=2e-6, atol=0
        )
        for key, weight in one["weights"].items():
            torch.testing.assert_close(two[name]["weights"][key], weight, rtol=0, atol=1e-6)


def test_a_checkpoint_of_two_processes(folder: Path) -> None:
    """Each writes half; both read it back, and so does one alone. A disk that is full for the one
    stops both."""
    two = found("checkpoint", folder, 2)
    shards = ["shard-00001.safetensors", "shard-00002.safetensors"]
    assert sorted(two["files"]) == ["manifest.json", *shards, "state.pt"]
    one, other = (two["files"][name] for name in shards)
    whole = 3 * 4 * sum(p.numel() for p in tiny_policy(True).parameters())
    assert whole < one + other < 1.5 * whole and abs(one - other) < 0.05 * whole
    assert len(two["equal"]) > 20 and all(two["equal"])
    assert two["errors"] == ["File too large"] * 2
    assert two["folder"] == ["step-000001", "step-000003"]
    assert two["newest"] == [1, 1]
    assert two["damaged"] == ["step-000003: shard-00002.safetensors does not match its checksum"]
    policy, optimizer, stateful = trainee()
    stateful.restore(checkpoint.load(folder / "checkpoints" / "step-000001"))
    alone = held(policy, optimizer)
    assert alone.keys() == two["wrote"].keys()
    for name, tensor in alone.items():
        assert torch.equal(tensor, two["wrote"][name]), name
    assert policy.head_weight is policy.model.get_input_embeddings().weight
    assert all(state["step"] == 1 for state in optimizer.adam.state.values())


def run(size: int, argv: list[str]) -> None:
    """`fastalign ARGV` in `size` processes."""
    if size == 1:
        cli.main(argv)
        return
    done = torchrun(size, ["-m", "fastalign", *argv], timeout=600)
    assert done.returncode == 0, done.stderr


def training(folder: Path, size: int, *more: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics and weights of a small `train sft` in `size` processes."""
    from safetensors.torch import load_file

    argv = ["train", "sft", "--model", "scratch:1m", "--vocab_size", "300"]
    argv += ["--max_length", "128", "--limit", "40", "--epochs", "1", "--batch_tokens", "700"]
    argv += ["--micro_tokens", "300", "--eval_limit", "8", "--device", "cpu", "--eval_every", "3"]
    argv += ["--checkpoint_every", "2", "--output", str(folder), *more]
    run(size, argv)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(folder / "model" / "model.safetensors")


def pairs(folder: Path, size: int, method: str, model: Path) -> tuple[list[Any], dict[str, Any]]:
    """Metrics and weights of a small `train reward` or `train dpo` in `size` processes."""
    from safetensors.torch import load_file

    argv = ["train", method, "--model", str(model), "--limit", "24"]
    argv += ["--batch_tokens", "900", "--micro_tokens", "400", "--eval_limit", "4"]
    argv += ["--max_length", "128", "--device", "cpu", "--output", str(folder)]
    run(size, argv)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(folder / "model" / "model.safetensors")
    if method == "reward":
        weights |= load_file(folder / "model" / "heads.safetensors")
    return lines, weights


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["reward", "dpo"])
def test_pairs_on_one_and_two_processes(method: str, road: Path, tmp_path: Path) -> None:
    model = road / "sft" / "model"
    one, two = (pairs(tmp_path / str(size), size, method, model) for size in (1, 2))
    same(one, two)
    for name in ("accuracy", "rewards/accuracies", "rewards/margins", "logps/chosen", "entropy"):
        for a, b in zip(one[0], two[0], strict=True):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name


def same(
    a: tuple[list[Any], dict[str, Any]], b: tuple[list[Any], dict[str, Any]], rows: int = 5
) -> None:
    """Losses, gradient norms and held-out losses to rounding, and so the weights."""
    assert len(a[0]) == len(b[0]) >= rows
    for one, two in zip(a[0], b[0], strict=True):
        assert (one["phase"], one["step"]) == (two["phase"], two["step"])
        for key in {"loss", "grad_norm", "lr", "tokens"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=2e-4), (key, one, two)
    for name, weight in a[1].items():
        # Where a gradient is all but zero, AdamW makes a step of what is rounding.
        apart = (b[1][name] - weight).abs()
        assert apart.mean() < 2e-6 and (apart > 2e-4).float().mean() < 1e-3, name


@pytest.mark.usefixtures("one_thread")
def test_sft_on_one_and_two_processes_and_resumed_on_another_number(tmp_path: Path) -> None:
    import shutil

    one = training(tmp_path / "one", 1)
    two = training(tmp_path / "two", 2)
    same(one, two)
    for size, begun in ((1, "two"), (2, "one")):
        folder = tmp_path / f"resumed-{size}"
        shutil.copytree(tmp_path / begun, folder)
        last, *_ = sorted((folder / "checkpoints").glob("step-*"), reverse=True)
        shutil.rmtree(last)
        shutil.rmtree(folder / "model")
        same(one, training(folder, size, "--resume"))
    assert (tmp_path / "two" / "report.html").exists()


def test_policies_on_one_and_two_processes(road: Path, tmp_path: Path) -> None:
    """The same answers, drawn by two processes and by one: the same rewards, losses, weights."""
    (tmp_path / "model").symlink_to(road / "sft" / "model")
    (tmp_path / "reward.py").write_text(
        "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    one, two = (found("online", tmp_path, size) for size in (1, 2))
    for name in ("ppo", "grpo"):
        a, b = ((run[name]["metrics"], run[name]["weights"]) for run in (one, two))
        same(a, b, rows=4)
        for x, y in zip(a[0], b[0], strict=True):
            for key in {"reward/proxy", "kl/k1", "kl/k3", "entropy", "length"} & x.keys():
                assert x[key] == pytest.approx(y[key], rel=1e-3, abs=1e-5), key


def test_two_processes_say_what_is_wrong_once(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "something").write_text("")
    argv = ["-m", "fastalign", "train", "sft", "--output", str(tmp_path / "used")]
    done = torchrun(2, argv, timeout=600)
    assert done.returncode != 0
    assert re.search(r"exitcode *: 2 ", done.stderr), done.stderr
    assert done.stderr.count("is already in use; choose another --output") == 1
