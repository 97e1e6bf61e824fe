"""`train dpo`, stopped and resumed, is the run that was never stopped, bit for bit."""

import dataclasses
import logging
import signal

import pytest
import torch
from preference_runs import config, lines_of, make_model, records, without_clocks
from safetensors.torch import load_file

from fastalign.train import dpo
from fastalign.train.run import Interrupted, Run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def interrupt_at(monkeypatch, step):
    """Ctrl-C in the middle of a step."""
    plain = Run.log

    def log(self, at, phase, metrics):
        plain(self, at, phase, metrics)
        if at == step and phase == "train":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "log", log)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "sigmoid"},
        {"loss": "ipo", "reference": "live"},
        {"loss": "simpo"},
        {"loss": "kto"},
    ],
    ids=lambda options: options["loss"],
)
def test_stopped_and_resumed(model, write, tmp_path, monkeypatch, caplog, options):
    caplog.set_level(logging.INFO, "fastalign")
    data = write(*records())

    def run(name, **changes):
        values = {"epochs": 3, "batch_tokens": 500, "eval_data": data, "eval_every": 2}
        made = config(tmp_path / name, model, data, **values, **options)
        return dataclasses.replace(made, checkpoint_every=3, schedule="cosine", **changes)

    dpo.train(run("whole"))
    whole = lines_of(tmp_path / "whole")
    assert whole[-1]["step"] >= 5
    with monkeypatch.context() as stopping:
        interrupt_at(stopping, 2)
        with pytest.raises(Interrupted, match="stopped at step 2"):
            dpo.train(run("parts"))
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "phase": "train", "time": 0, "loss": 99.0}\n{"step": 3, "pha')
    torch.rand(7)  # the random state of the new process is another one
    caplog.clear()
    dpo.train(run("parts", resume="auto"))
    assert without_clocks(lines_of(tmp_path / "parts")) == without_clocks(whole)
    ours, theirs = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")
    )
    start = load_file(f"{model}/model.safetensors")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours) and ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[k], start[k]) for k in ours)
    # The reference is the model at the beginning: what was kept is found again.
    kept = options.get("reference") != "live" and options["loss"] != "simpo"
    assert ("reference log-probs: read from" in caplog.text) == kept
