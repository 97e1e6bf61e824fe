"""A disk that is full, for real: a limit on the size of files makes writes short, then fail."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastalign import cli
from fastalign.train import checkpoint
from fastalign.train.checkpoint import Checkpoint
from fastalign.train.run import Run
from fastalign.train.whole import failed_writes, whole_folder, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = "File too large"
TINY = "--model scratch:1m --vocab_size 300 --batch_tokens 256 --limit 8 --eval_limit 2".split()


@contextmanager
def limit(n_bytes):
    """No file of this process grows beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def made(step, weights=4, state=4):
    return Checkpoint(step, {"w": torch.ones(weights)}, {"moments": torch.ones(state)})


@pytest.mark.parametrize("big", ["weights", "state"])
def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(tmp_path, big):
    checkpoint.save(tmp_path, made(5), keep=1)
    with limit(20_000), pytest.raises(OSError, match=FULL):
        checkpoint.save(tmp_path, made(6, **{big: 10_000}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]
    held = torch.zeros(4)
    checkpoint.load(tmp_path / "step-000005").read({"w": held})
    assert held.tolist() == [1.0] * 4
    checkpoint.save(tmp_path, made(6, **{big: 10_000}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]


def test_a_model_that_does_not_fit_leaves_the_old_one(tmp_path):
    model = tmp_path / "model"
    with whole_folder(model) as folder:
        (folder / "weights").write_text("old")
    with limit(1000), pytest.raises(OSError, match=FULL), whole_folder(model) as folder:
        (folder / "config").write_text("new")
        (folder / "weights").write_bytes(bytes(2000))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in model.iterdir()] == ["weights"]
    assert (model / "weights").read_text() == "old"


def test_a_small_file_is_replaced_whole(tmp_path):
    path = tmp_path / "accounting.json"
    write_text(path, "old")
    with limit(1000), pytest.raises(OSError, match=FULL):
        write_text(path, "new" * 1000)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), failed_writes():
        raise RuntimeError("shapes")


class Full:
    """`train sft` from a folder of two checkpoints on; the disk is full from some moment."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.argv = ["train", "sft", "--output", str(folder), *TINY, "--checkpoint_every", "1"]

    def stopped(self) -> str:
        """The run stops with exit status 1; its last line, which is the only one of an error."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(self.argv)
        lines = self.capsys.readouterr().err.splitlines()
        assert stop.value.code == 1 and not any("Traceback" in line for line in lines)
        assert [line for line in lines if line.startswith("fastalign:")] == lines[-1:]
        return lines[-1]

    def steps(self) -> list[int]:
        text = (self.folder / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [line["step"] for line in lines if line["phase"] == "train"]

    def goes_on(self) -> None:
        cli.main([*self.argv, "--resume"])
        steps = self.steps()
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > 3
        assert (self.folder / "model" / "model.safetensors").is_file()
        hidden = [p for p in self.folder.rglob(".*")]
        assert not hidden


@pytest.fixture
def full(tmp_path, capsys):
    return Full(tmp_path / "run", capsys)


def test_a_run_stops_at_the_checkpoint_that_does_not_fit(full, monkeypatch):
    plain = Run.end_step

    def end_step(self, step):
        with limit(100_000 if step == 3 else resource.RLIM_INFINITY):
            plain(self, step)

    with monkeypatch.context() as broken:
        broken.setattr(Run, "end_step", end_step)
        line = full.stopped()
    last = full.folder / "checkpoints" / "step-000002"
    assert line == (
        f"fastalign: train sft: step 3: a checkpoint cannot be written: {FULL}; "
        f"the last good checkpoint is {last}"
    )
    names = sorted(path.name for path in last.parent.iterdir())
    assert names == ["step-000001", "step-000002"]
    assert full.steps() == [1, 2, 3]
    assert json.loads((full.folder / "accounting.json").read_text())["step"] == 3
    full.goes_on()


def test_a_run_stops_where_its_metrics_do_not_fit(full, monkeypatch):
    """The half line that is left does not confuse the resumed run."""
    plain = Run.log

    def log(self, step, phase, metrics):
        size = resource.RLIM_INFINITY
        if step == 3:
            size = (self.folder / "metrics.jsonl").stat().st_size + 20
        with limit(size):
            plain(self, step, phase, metrics)

    with monkeypatch.context() as broken:
        broken.setattr(Run, "log", log)
        line = full.stopped()
    assert f"step 3: metrics.jsonl cannot be written: {FULL}; the last good checkpoint" in line
    assert (full.folder / "metrics.jsonl").read_text().splitlines()[-1].count('"') < 6
    assert full.steps() == [1, 2]
    full.goes_on()


def test_a_run_whose_model_does_not_fit_ends_after_a_resume(full, monkeypatch):
    from fastalign.models import Policy

    plain = Policy.save

    def save(self, folder, tokenizer):
        with limit(100_000):
            plain(self, folder, tokenizer)

    with monkeypatch.context() as broken:
        broken.setattr(Policy, "save", save)
        line = full.stopped()
    assert f"the model cannot be written: {FULL}; the last good checkpoint is" in line
    assert not (full.folder / "model").exists() and not list(full.folder.glob(".model*"))
    full.goes_on()
