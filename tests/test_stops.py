"""How a run is stopped and begun again: signals, and a run that had no checkpoint yet."""

import json
import logging
import signal

import pytest

from fastalign import cli
from fastalign.train import sft
from fastalign.train.folder import clear_folder, is_unfinished
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
        (["config.yaml", "checkpoints/step-000002/weights.safetensors"], False),
        (["config.yaml", "checkpoints/.step-000002.old/weights.safetensors"], False),
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
