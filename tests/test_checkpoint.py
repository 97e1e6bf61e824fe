"""Checkpoints: whole or not there, damage found and named, random states, which ones stay."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastalign.train import checkpoint
from fastalign.train.checkpoint import Checkpoint, CheckpointError


def made(step, value=1.0):
    tensors = {"policy.weight": torch.full((3, 2), value), "policy.count": torch.tensor(step)}
    state = {"optimizer": {"lr": value, "moments": [torch.ones(2) * step]}, "name": "run"}
    return Checkpoint(step, tensors, state)


def tensors(path):
    """Of a checkpoint of one process."""
    return load_file(path / "shard-00001.safetensors")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    shared = torch.randn(4, 4)
    held = {
        "a": shared,
        "tied to a": shared,
        "strided": shared[:, ::2],
        "bf16": shared.bfloat16(),
        "int": torch.arange(3),
    }
    deep: Any = (1, 2.5, None, "text", torch.ones(2))
    state: dict[str, Any] = {
        "deep": [{"x": deep}],
        "random": torch.get_rng_state(),
    }
    path = checkpoint.save(tmp_path / "new" / "folder", Checkpoint(7, held, state), keep=1)
    assert path.name == "step-000007"
    assert names(path) == ["manifest.json", "shard-00001.safetensors", "state.pt"]
    again = checkpoint.load(path)
    assert again.step == 7
    assert again.shapes() == {name: tuple(tensor.shape) for name, tensor in held.items()}
    read = {name: torch.empty_like(tensor) for name, tensor in held.items()}
    again.read(read)
    for name, tensor in held.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype
    x = again.state["deep"][0]["x"]
    assert x[:4] == deep[:4] and torch.equal(x[4], deep[4])
    assert torch.equal(again.state["random"], state["random"])


def test_a_folder_that_was_not_finished_is_no_checkpoint(tmp_path):
    """A crash at any moment before the rename leaves a partial folder, which nobody takes."""
    checkpoint.save(tmp_path, made(5), keep=2)
    partial = tmp_path / ".step-000010.partial"
    partial.mkdir()
    (partial / "shard-00001.safetensors").write_bytes(b"half")
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-000005"]
    found, damaged = checkpoint.newest_intact(tmp_path)
    assert found.step == 5 and damaged == []
    checkpoint.save(tmp_path, made(10), keep=2)  # the next attempt replaces it
    assert names(tmp_path) == ["step-000005", "step-000010"]
    assert checkpoint.load(tmp_path / "step-000010").step == 10


@pytest.mark.parametrize("file", ["weights", "state", "manifest", "rename"])
def test_a_crash_while_writing_leaves_the_old_ones(tmp_path, monkeypatch, file):
    checkpoint.save(tmp_path, made(5), keep=1)

    def crash(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        if file == "weights":
            broken.setattr("safetensors.torch.save_file", crash)
        elif file == "state":
            broken.setattr(torch, "save", crash)
        elif file == "manifest":
            broken.setattr(json, "dumps", crash)
        else:
            broken.setattr("pathlib.Path.rename", crash)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, made(6), keep=1)
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-000005"]
    assert tensors(tmp_path / "step-000005")["policy.count"] == 5


def test_a_checkpoint_written_anew_replaces_its_elder_at_no_moment_to_none(tmp_path, monkeypatch):
    """The second rename fails: the elder has its name back, and nothing else is there."""
    checkpoint.save(tmp_path, made(10, 1.0), keep=1)
    plain = Path.rename

    def crash(self, target):
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return plain(self, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", crash)
        with pytest.raises(OSError, match="Input/output error"):
            checkpoint.save(tmp_path, made(10, 2.0), keep=1)
    assert names(tmp_path) == ["step-000010"]
    # A process that dies there leaves both aside, and the next one puts the elder back.
    (tmp_path / "step-000010").rename(tmp_path / ".step-000010.old")
    (tmp_path / ".step-000010.partial").mkdir()
    assert checkpoint.found(tmp_path) == []
    found, damaged = checkpoint.newest_intact(tmp_path)
    assert (found.step, damaged) == (10, []) and tensors(found.path)["policy.weight"][0, 0] == 1.0
    checkpoint.save(tmp_path, made(11, 3.0), keep=2)  # what else was left goes with the next one
    assert names(tmp_path) == ["step-000010", "step-000011"]
    assert tensors(tmp_path / "step-000010")["policy.weight"][0, 0] == 1.0


def test_an_elder_that_was_not_deleted_goes_at_the_next_save(tmp_path, monkeypatch):
    """A crash after the renames: the new one has the name, the elder is a leftover."""
    checkpoint.save(tmp_path, made(10, 1.0), keep=2)

    def crash(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("shutil.rmtree", crash)
        with pytest.raises(OSError, match="Input/output error"):
            checkpoint.save(tmp_path, made(10, 2.0), keep=2)
    assert names(tmp_path) == [".step-000010.old", "step-000010"]
    checkpoint.save(tmp_path, made(12, 3.0), keep=2)
    assert names(tmp_path) == ["step-000010", "step-000012"]
    assert tensors(tmp_path / "step-000010")["policy.weight"][0, 0] == 2.0


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = {
    "weights cut": (
        "shard-00001.safetensors",
        cut,
        r"shard-00001.safetensors has \d+ bytes, expected \d+",
    ),
    "weights flipped": ("shard-00001.safetensors", flip, "shard-00001.safetensors does not match"),
    "weights missing": (
        "shard-00001.safetensors",
        lambda p: p.unlink(),
        "shard-00001.safetensors is miss",
    ),
    "state cut": ("state.pt", cut, r"state.pt has \d+ bytes, expected \d+"),
    "state flipped": ("state.pt", flip, "state.pt does not match its checksum"),
    "state missing": ("state.pt", lambda p: p.unlink(), "state.pt is missing"),
    "manifest cut": ("manifest.json", lambda p: p.write_text("{"), "manifest.json is not readable"),
    "manifest empty": ("manifest.json", lambda p: p.write_text("{}"), "manifest.json is not read"),
    "manifest a list": ("manifest.json", lambda p: p.write_text("[]"), "manifest.json is not read"),
    "manifest binary": (
        "manifest.json",
        lambda p: p.write_bytes(b"\xff"),
        "manifest.json is not read",
    ),
    "manifest missing": ("manifest.json", lambda p: p.unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_passed_over(tmp_path, damage):
    file, do, message = DAMAGES[damage]
    for step in (5, 10):
        checkpoint.save(tmp_path, made(step), keep=3)
    do(tmp_path / "step-000010" / file)
    with pytest.raises(CheckpointError, match=f"damaged checkpoint .*-000010: {message}") as e:
        checkpoint.load(tmp_path / "step-000010")
    assert "\n" not in str(e.value)
    found, damaged = checkpoint.newest_intact(tmp_path)
    assert found.step == 5 and damaged == [str(e.value)]
    (tmp_path / "step-000005" / file).unlink()
    with pytest.raises(CheckpointError, match="nothing to resume: damaged checkpoint .*step-00001"):
        checkpoint.newest_intact(tmp_path)


def test_a_checkpoint_of_another_form_is_not_called_damaged(tmp_path):
    path = checkpoint.save(tmp_path, made(5), keep=1)
    (path / "shard-00001.safetensors").rename(path / "weights.safetensors")
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("shard-00001", "weights"))
    with pytest.raises(CheckpointError, match="another version.*read weights") as e:
        checkpoint.load(path)
    assert "damaged" not in str(e.value)
    with pytest.raises(CheckpointError, match="nothing to resume: checkpoint .* another version"):
        checkpoint.newest_intact(tmp_path)


def test_nothing_to_resume(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="nothing to resume: no checkpoint in"):
            checkpoint.newest_intact(folder)
        with pytest.raises(CheckpointError, match="nothing to resume: no checkpoint in"):
            checkpoint.check_there("auto", folder)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "step-000001")
    with pytest.raises(CheckpointError, match="nothing to resume: no checkpoint at"):
        checkpoint.check_there(str(tmp_path / "step-000001"), tmp_path)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_stay(tmp_path, keep):
    steps = [2, 9, 10, 100, 1_000_000]
    for step in steps:
        checkpoint.save(tmp_path, made(step), keep)
    assert [int(p.name[5:]) for p in checkpoint.found(tmp_path)] == steps[-keep:]


def test_going_back_removes_the_future_that_was_left(tmp_path):
    """After step 5 is resumed and runs to 10 again, the old 15 must not be taken for the newest."""
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, made(step, 1.0), keep=3)
    checkpoint.save(tmp_path, made(10, 2.0), keep=2)
    assert names(tmp_path) == ["step-000005", "step-000010"]
    assert tensors(checkpoint.newest_intact(tmp_path)[0].path)["policy.weight"][0, 0] == 2.0


def test_every_random_state_comes_back(tmp_path):
    def draw():
        return random.random(), torch.rand(3).tolist(), torch.randperm(9).tolist()

    random.seed(1)
    draw()
    path = checkpoint.save(tmp_path, Checkpoint(1, {}, checkpoint.random_state()), keep=1)
    expected = draw()
    assert draw() != expected
    checkpoint.set_random_state(checkpoint.load(path).state)
    assert draw() == expected


@pytest.mark.parametrize("here", [1, 2, 4])
def test_random_states_of_more_or_fewer_gpus(monkeypatch, here):
    """A run of two GPUs goes on with one, two or four: as many states as there are GPUs for."""
    state = checkpoint.random_state() | {"cuda": [torch.tensor([1]), torch.tensor([2])]}
    given: dict[int, int] = {}

    def set_one(new_state, device):
        assert device < here
        given[device] = int(new_state)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_one)
    checkpoint.set_random_state(state)
    assert given == {0: 1} if here == 1 else given == {0: 1, 1: 2}
