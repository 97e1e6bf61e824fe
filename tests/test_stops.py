"""How a run is stopped and begun again: signals, and a run that had no checkpoint yet."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from fastalign import cli
from fastalign.train import checkpoint, sft
from fastalign.train.folder import claim_folder, clear_folder, is_unfinished
from fastalign.train.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")


def config(folder, **changes):
    return sft.SFTConfig(
        output=str(folder),
        model="scratch:1m",
        vocab_size=300,
        limit=8,
        batch_tokens=256,
        eval_limit=2,
        **changes,
    )


def argv(folder, *more):
    made = config(folder)
    words = ["train", "sft", "--output", folder, "--model", made.model, "--limit", made.limit]
    words += ["--vocab_size", made.vocab_size, "--batch_tokens", made.batch_tokens]
    return [str(word) for word in [*words, "--eval_limit", made.eval_limit, *more]]


def steps_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["phase"] == "train"]


@pytest.mark.parametrize(
    ("number", "times", "status"), [(signal.SIGTERM, 3, 143), (signal.SIGINT, 1, 130)]
)
def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    tmp_path, monkeypatch, capsys, number, times, status
):
    """A job and its processes may all be sent the notice: more of them change nothing."""
    plain = Run.log

    def log(self, step, phase, metrics):
        plain(self, step, phase, metrics)
        if step == 2:
            for _ in range(times):
                signal.raise_signal(number)

    before = signal.getsignal(number)
    with monkeypatch.context() as sending:
        sending.setattr(Run, "log", log)
        with pytest.raises(SystemExit) as stop:
            cli.main(argv(tmp_path / "run"))
    assert stop.value.code == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastalign: train sft: stopped at step 2; go on with --resume")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert json.loads((tmp_path / "run" / "accounting.json").read_text())["step"] == 2
    assert signal.getsignal(number) == before
    cli.main(argv(tmp_path / "run", "--resume"))
    steps = steps_of(tmp_path / "run")
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 2


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, capsys):
    plain = Run.log

    def log(self, step, phase, metrics):
        plain(self, step, phase, metrics)
        if step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "log", log)
    with pytest.raises(SystemExit) as stop:
        cli.main(argv(tmp_path / "run"))
    assert stop.value.code == 130 and "stopped at once" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_without_a_checkpoint_begins_again(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="fastalign")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    lines = [{"step": 0, "phase": "eval", "loss": 9.0}, {"step": 1, "phase": "train", "loss": 9.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints" / ".step-000005.partial").mkdir(parents=True)
    sft.train(config(folder, resume="auto"))
    assert "no checkpoint was written yet: beginning at the beginning" in caplog.messages
    text = (folder / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in found][:2] == [0, 1]
    assert all(line["loss"] != 9.0 for line in found)
    assert steps_of(folder) == list(range(1, len(found) - 1))
    assert [p for p in folder.rglob(".*")] == []


@pytest.mark.parametrize(
    ("held", "unfinished"),
    [
        ([], True),
        (["config.yaml", "metrics.jsonl", "checkpoints/.step-000002.partial/x"], True),
        (["config.yaml", "checkpoints/step-000002/shard-00001.safetensors"], False),
        (["config.yaml", "checkpoints/.step-000002.old/shard-00001.safetensors"], False),
        (["config.yaml", "model/model.safetensors"], False),  # somebody deleted its checkpoints
        (["config.yaml", "metrics.jsonl", "reference/logp.safetensors"], True),
        (["thesis.tex"], False),
    ],
)
def test_what_may_begin_again(tmp_path, held, unfinished):
    for name in held:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert is_unfinished(tmp_path) == unfinished


def test_an_overwritten_run_is_never_half_deleted_and_resumable(tmp_path, monkeypatch):
    """Its checkpoints are gone at once; config.yaml, by which it may be overwritten, goes last."""
    gone = []
    for name in ("checkpoints/step-000002/x", "model/x", "config.yaml", "zzz", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def die(path, *args, **kwargs):
        gone.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr("shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            clear_folder(tmp_path)
    assert len(gone) == 1 and not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "config.yaml").exists()
    clear_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_an_overwrite_that_is_killed_at_any_moment_leaves_a_clear_state(tmp_path, monkeypatch):
    """Killed at every call that changes the disk: the folder is the old run's, or one to begin
    anew in; what is there is whole; and it may be overwritten again."""
    whole = {"config.yaml": "seed: 0", "metrics.jsonl": "{}", "accounting.json": "{}"}
    for name in ("checkpoints/step-000002/a", "checkpoints/step-000004/b", "model/c", "model/d"):
        whole[name] = name
    calls = 0
    for moment in range(100):
        folder = tmp_path / str(moment)
        for name, text in whole.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        calls = 0

        def counted(plain, moment=moment):
            def call(*args, **kwargs):
                nonlocal calls
                if calls == moment:
                    raise KeyboardInterrupt
                calls += 1
                return plain(*args, **kwargs)

            return call

        with monkeypatch.context() as dying:
            for name in ("rename", "unlink", "rmdir"):
                dying.setattr(os, name, counted(getattr(os, name)))
            try:
                clear_folder(folder)
                break
            except KeyboardInterrupt:
                pass
        left = {n: text for n, text in files_of(folder).items() if not n.startswith(".")}
        assert left.items() <= whole.items()
        for part in ("checkpoints", "model"):
            names = {n for n in whole if n.startswith(part)}
            assert names & left.keys() in (set(), names)
        assert left == whole or not (folder / "checkpoints").exists()
        assert "config.yaml" in left or list(folder.iterdir()) == []
        assert left == whole or "model/c" in left or is_unfinished(folder)
        claim_folder(folder, overwrite=True)
        clear_folder(folder)
        assert list(folder.iterdir()) == []
    assert calls == moment > 12 and list(folder.iterdir()) == []


def test_what_a_power_cut_may_not_reorder(tmp_path, monkeypatch):
    """Every file of a checkpoint is on the disk before it has its name, the name before an older
    one is deleted; of a new folder the names of all levels."""
    events: list[tuple[str, str]] = []
    plain_sync, plain_rename, plain_delete = os.fsync, os.rename, shutil.rmtree

    def named(path):
        return str(Path(path).relative_to(tmp_path))

    def fsync(handle):
        events.append(("sync", named(os.readlink(f"/proc/self/fd/{handle}"))))
        plain_sync(handle)

    def rename(path, target, **kwargs):
        events.append(("rename", f"{named(path)} {named(target)}"))
        plain_rename(path, target, **kwargs)

    def delete(path, **kwargs):
        events.append(("delete", named(path)))
        plain_delete(path, **kwargs)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", delete)
    for step in (1, 2):
        made = checkpoint.Checkpoint(step, {"w": torch.ones(3)}, {"n": step})
        checkpoint.save(tmp_path / "run" / "checkpoints", made, keep=1)
    folder = "run/checkpoints"
    new = f"{folder}/.step-000002.partial"
    files = ("manifest.json", "shard-00001.safetensors", "state.pt")
    assert events[:2] == [("sync", "."), ("sync", "run")]
    second = events[events.index(("sync", f"{new}/manifest.json")) :]
    assert second == [
        *(("sync", f"{new}/{name}") for name in files),
        ("sync", new),
        ("rename", f"{new} {folder}/step-000002"),
        ("sync", folder),
        ("delete", f"{folder}/step-000001"),
    ]
