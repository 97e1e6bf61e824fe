"""Whatever is wrong with the input: one clear line, an exit status, and nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from failed_commands import Failed, jsonl
from safetensors.torch import load_file, save_file

from fastalign import cli
from fastalign.data.tokenizer import train_tokenizer
from fastalign.train import sft
from fastalign.train.optim import Optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

PAIR = {"prompt": "Say it.", "chosen": " It is good.", "rejected": " It is bad."}
TINY = "--model scratch:1m --vocab_size 300 --batch_tokens 512 --epochs 1".split()


def reading(capsys, tmp_path, command, data, *more):
    """Runs a training command on a data source into a fresh folder, which must stay usable."""
    folder = tmp_path / "out"
    name = "--prompts" if command == "apa" else "--data"
    found = Failed(capsys, "train", command, "--output", folder, name, data, *more)
    assert found.status == 2
    assert not any(folder.iterdir())
    return found.line


# --- data ---------------------------------------------------------------------------------------


def test_missing_file(capsys, tmp_path, road):
    models = {
        "sft": TINY,
        "reward": ["--model", road / "sft/model"],
        "apa": ["--policy", road / "sft/model", "--reward", road / "reward/model"],
    }
    for command, more in models.items():
        line = reading(capsys, tmp_path, command, tmp_path / "no.jsonl", *more)
        assert line == f"train {command}: {tmp_path}/no.jsonl: no such file or folder"


def test_line_that_is_not_json(capsys, tmp_path):
    file = jsonl(tmp_path / "d.jsonl", PAIR, PAIR)
    file.write_text(file.read_text() + '{"prompt": "a", \n')
    line = reading(capsys, tmp_path, "sft", file, *TINY)
    assert line.startswith(f"train sft: {file}:3: not JSON (")


def test_wrong_keys(capsys, tmp_path, road):
    file = jsonl(tmp_path / "d.jsonl", {"question": "q", "answer": "a"})
    line = reading(capsys, tmp_path, "reward", file, "--model", road / "sft/model")
    assert f"{file}:1: found the keys answer, question; for preferences expected prompt" in line
    assert "for completions expected prompt + completion" in reading(
        capsys, tmp_path, "sft", file, *TINY
    )


def test_empty_data(capsys, tmp_path):
    file = jsonl(tmp_path / "d.jsonl")
    assert reading(capsys, tmp_path, "sft", file, *TINY).endswith("the data set is empty")


def test_chosen_equals_rejected_everywhere(capsys, tmp_path, road):
    same = PAIR | {"rejected": PAIR["chosen"]}
    file = jsonl(tmp_path / "d.jsonl", same, same)
    line = reading(capsys, tmp_path, "reward", file, "--model", road / "sft/model")
    assert "no usable record" in line and "chosen equals rejected: 2, first at" in line


@pytest.mark.parametrize(
    ("reward", "said"),
    [("NaN", "reward must be finite, got nan"), ('"high"', "reward must be a number, got str")],
)
def test_reward_that_is_no_number(capsys, tmp_path, reward, said):
    file = tmp_path / "d.jsonl"
    file.write_text(f'{{"prompt": "a", "completion": " b", "reward": {reward}}}\n')
    assert reading(capsys, tmp_path, "sft", file, *TINY) == f"train sft: {file}:1: {said}"


def test_prompts_longer_than_the_context(capsys, tmp_path, road):
    file = jsonl(tmp_path / "d.jsonl", PAIR | {"prompt": "word " * 400})
    line = reading(capsys, tmp_path, "sft", file, *TINY, "--max_length", 64)
    assert "nothing left after tokenization" in line
    assert "prompt longer than 63 tokens: 1, first at" in line
    models = ["--policy", road / "sft/model", "--reward", road / "reward/model"]
    line = reading(capsys, tmp_path, "apa", file, *models, "--eval_lines", "0:1")
    assert "prompt longer than 208 tokens" in line  # a context of 256 less 48 new tokens
    line = reading(capsys, tmp_path, "apa", file, *models, "--sampling.max_new_tokens", 256)
    assert "max_new_tokens 256 leaves no room for a prompt in the 256 tokens" in line
    line = reading(capsys, tmp_path, "sft", "synthetic", "--model", road / "sft/model")
    assert f"max_length 512 is more than the 256 tokens that {road}/sft/model can read" in line


def test_splits(capsys, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    jsonl(folder / "train.jsonl", *[PAIR] * 3)
    jsonl(folder / "test.jsonl", PAIR)
    line = reading(capsys, tmp_path, "sft", folder, *TINY)
    assert "has the splits test, train; say which with split" in line
    line = reading(capsys, tmp_path, "sft", folder, *TINY, "--split", "dev")
    assert "no file of the split 'dev' among test.jsonl, train.jsonl" in line
    line = reading(capsys, tmp_path, "sft", "synthetic", *TINY, "--split", "dev")
    assert line == "train sft: synthetic: no split 'dev'; it has train and test"
    output = tmp_path / "good"
    cli.main(
        [
            *("train", "sft", "--output", str(output), "--data", str(folder), *TINY),
            *("--split", "train", "--eval_split", "test"),
        ]
    )
    phases = [json.loads(s)["phase"] for s in (output / "metrics.jsonl").read_text().splitlines()]
    assert phases == ["eval", "train", "eval"]


def test_held_out_records_that_are_trained_on_are_counted(capsys, tmp_path, caplog):
    file = jsonl(tmp_path / "d.jsonl", *(PAIR | {"prompt": f"Say {i}."} for i in range(6)))
    argv = ["train", "sft", "--data", str(file), *TINY]
    cli.main([*argv, "--output", str(tmp_path / "a"), "--eval_lines", "4:"])
    assert "2 of 2 held-out records are training records too" in caplog.text
    caplog.clear()
    cli.main([*argv, "--output", str(tmp_path / "b"), "--eval_lines", "4:", "--lines", ":4"])
    assert "held-out records" not in caplog.text


def test_what_the_built_in_task_does_not_have(capsys, tmp_path, road):
    line = reading(capsys, tmp_path, "sft", "synthetic", *TINY, "--lines", "0:9")
    assert "lines '0:9' is for files" in line
    line = reading(capsys, tmp_path, "sft", "synthetic:x", *TINY)
    assert "expected synthetic or synthetic:SEED" in line
    line = reading(capsys, tmp_path, "sft", "synthetic", *TINY, "--limit", 0)
    assert "limit must be at least 1, got 0" in line
    models = ["--policy", road / "sft/model", "--reward", road / "reward/model"]
    line = reading(capsys, tmp_path, "apa", "synthetic", *models, "--limit", 99999)
    assert "has 15,360 train prompts, got limit 99,999" in line


def test_nothing_to_evaluate_on(capsys, tmp_path, road):
    file = jsonl(tmp_path / "d.jsonl", PAIR)
    models = ["--policy", road / "sft/model", "--reward", road / "reward/model"]
    line = reading(capsys, tmp_path, "apa", file, *models)
    assert "nothing to evaluate on: give held-out prompts with --eval_prompts" in line


# --- models -------------------------------------------------------------------------------------


def test_missing_models(capsys, tmp_path, road):
    nothing = tmp_path / "nothing"
    line = reading(capsys, tmp_path, "sft", "synthetic", "--model", nothing)
    assert line == f"train sft: no model folder at {nothing}"
    line = reading(capsys, tmp_path, "reward", "synthetic", "--model", nothing)
    assert line == f"train reward: no model folder at {nothing}"
    line = reading(capsys, tmp_path, "apa", "synthetic", "--policy", nothing)
    assert line == f"train apa: no model folder at {nothing}"
    both = ["--policy", road / "sft/model", "--reward", road / "sft/model"]
    line = reading(capsys, tmp_path, "apa", "synthetic", *both)
    assert "no reward ensemble at" in line and "reward_ensemble.json is missing" in line
    line = reading(capsys, tmp_path, "sft", "synthetic", "--model", "scratch:9m")
    assert "unknown model 'scratch:9m': expected scratch: and one of 1m, 2m" in line
    line = reading(capsys, tmp_path, "reward", "synthetic", "--model", "scratch:1m")
    assert "has no tokenizer of its own: give one with --tokenizer" in line


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_policy_and_reward_model_of_different_tokenizers(capsys, tmp_path, road):
    other = copy_of(road / "reward/model", tmp_path / "other")
    train_tokenizer(["quite other words"], 300).save_pretrained(other)
    argv = ["--policy", road / "sft/model", "--reward", other]
    line = reading(capsys, tmp_path, "apa", "synthetic", *argv)
    assert "have different tokenizers (" in line and "train the reward model on the" in line
    argv = ["--policy", road / "sft/model", "--reward", road / "reward/model", "--judge", other]
    assert "have different tokenizers" in reading(capsys, tmp_path, "apa", "synthetic", *argv)


def test_damaged_model(capsys, tmp_path, road):
    model = copy_of(road / "sft/model", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    line = reading(
        capsys, tmp_path, "sft", "synthetic", "--model", model, "--max_length", 256, "--limit", 4
    )
    assert line.startswith(f"train sft: no model loads from '{model}': ")


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("train sft --epochs many", "train sft: --epochs: expected int, got 'many'"),
        ("train apa --coef x", "train apa: --coef: expected float, got 'x'"),
        ("train apa --whiten maybe", "train apa: --whiten: expected bool, got 'maybe'"),
        ("train sft --epochs 0", "train sft: expected epochs >= 1, got 0"),
        ("train sft --lr -1", "train sft: expected lr >= 0, got -1.0"),
        ("train sft --lr .nan", "train sft: expected lr >= 0, got nan"),
        ("train sft --vocab_size 9", "train sft: expected vocab_size >= 258, got 9"),
        ("train sft --checkpoint_every 0", "train sft: expected checkpoint_every >= 1, got 0"),
        ("train sft --schedule step", "train sft: unknown schedule 'step': expected one of const"),
        ("train reward --bootstrap x", "train reward: unknown bootstrap 'x': expected none or res"),
        ("train apa --statistic x", "train apa: unknown statistic 'x': expected one of mean, min"),
        ("train apa --lambda_ 0", "train apa: expected lambda_ > 0, got 0"),
        ("train apa --sampling.temperature 0", "train apa: sampling: expected temperature > 0"),
        ("train sft --overwrite --resume", "train sft: --overwrite and --resume contradict"),
        ("train sft --lrr 1", "train sft: unknown option --lrr; did you mean --lr?"),
        ("train sft --device tpu9", "train sft: unknown device 'tpu9': expected auto, cpu, cuda"),
        ("train sft --device meta", "train sft: device 'meta' is not supported"),
        ("train sft --dtype int4", "train sft: unknown dtype 'int4': expected auto, float32 or"),
        ("train sft --config no.yaml", "train sft: --config: File does not exist"),
        ("report", "report: the following arguments are required: run"),
    ],
)
def test_options(capsys, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    found = Failed(capsys, *argv.split())
    assert found.status == 2 and found.line.startswith(said)
    assert not any(tmp_path.iterdir())


def test_config_files(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    for content, said in (
        (b"epochz: 3\n", "unknown option --epochz; did you mean --epochs?"),
        (b"sampling:\n  temperatur: 3\n", "unknown option --sampling.temperatur; did you mean"),
        (b"epochs: many\n", "--epochs: expected int, got 'many'"),
        (b"epochs: [3\n", "Problems parsing config: while parsing a flow sequence"),
        (b"\x80\x81", "--config: not UTF-8 text"),
    ):
        file.write_bytes(content)
        found = Failed(capsys, "train", "apa", "--config", file)
        assert found.status == 2 and found.line.startswith(f"train apa: {said}")


# --- the output folder --------------------------------------------------------------------------


def test_folder_in_use(capsys, tmp_path, road):
    held = sorted((p.name, p.stat().st_mtime_ns) for p in (road / "sft").iterdir())
    for command in ("train sft", "train reward", "train apa", "quickstart"):
        found = Failed(capsys, *command.split(), "--output", road / "sft")
        assert found.status == 2
        assert "is already in use; choose another --output, or --overwrite" in found.line
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (road / "sft").iterdir()) == held
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    found = Failed(capsys, "train", "sft", "--output", mine, "--overwrite")
    assert "does not hold a run (no config.yaml); not deleting it" in found.line
    assert (mine / "thesis.txt").read_text() == "all of it"


def test_folder_that_cannot_be_written(capsys, tmp_path):
    """Also for root: below a file, and where the kernel makes the files."""
    file = tmp_path / "file"
    file.write_text("")
    for output, said in (
        (file, f"output {file} is a file; expected a folder"),
        (file / "below", f"cannot write to output folder {file}/below: Not a directory"),
        ("/proc/fastalign/run", "cannot write to output folder /proc/fastalign/run: "),
    ):
        found = Failed(capsys, "train", "sft", "--output", output)
        assert found.status == 2 and found.line.startswith(f"train sft: {said}")


def test_overwriting_deletes_nothing_before_the_new_run_can_begin(capsys, tmp_path):
    folder = tmp_path / "run"
    argv = ["train", "sft", "--output", folder, *TINY, "--limit", 4, "--eval_limit", 2]
    cli.main([str(a) for a in argv])
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert len(before) > 6
    for wrong in (["--data", "no.jsonl"], ["--model", "scratch:9m"]):
        assert Failed(capsys, *argv, *wrong, "--overwrite").status == 2
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    (folder / "old").write_text("")
    cli.main([*(str(a) for a in argv), "--overwrite"])
    assert not (folder / "old").exists() and (folder / "model").is_dir()


# --- a run that stops ---------------------------------------------------------------------------


def test_nan_loss_stops_before_the_weights_and_names_the_first_tensor(capsys, tmp_path, road):
    """A learning rate of 1e20: the first update ruins the weights, the next loss is no number."""
    folder = tmp_path / "run"
    argv = ["train", "sft", "--output", folder, "--model", road / "sft/model", "--limit", 20]
    argv += ["--max_length", 256, "--batch_tokens", 256, "--epochs", 1, "--lr", "1e-4"]
    argv += ["--checkpoint_every", 1, "--keep_checkpoints", 99, "--eval_limit", 2]
    plain = Optimizer.update
    broken = "model.model.layers.1.mlp.up_proj.weight"

    def update(self, run, step, loss, inputs):
        if step == 3:  # as if an update had overflowed
            parameter = dict(self.module.named_parameters())[broken]
            parameter.data[3, 5] = float("nan")
            loss = loss * float("nan")
        return plain(self, run, step, loss, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "update", update)
        found = Failed(capsys, *argv)
    assert found.status == 1
    assert "step 3: loss nan, gradient norm" in found.line
    assert f"first seen in weight {broken} (first NaN among 98,304 values)" in found.line
    last = folder / "checkpoints" / "step-000002"
    assert found.line.endswith(f"Stopped before the update; the last good checkpoint is {last}")
    weights = load_file(last / "shard-00001.safetensors")
    assert all(torch.isfinite(t).all() for t in weights.values())
    steps = [json.loads(s)["step"] for s in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]
    cli.main([*(str(a) for a in argv), "--resume"])  # and it goes on from there
    assert (folder / "model").is_dir()


def test_a_real_overflow_stops_the_run(capsys, tmp_path, road):
    found = Failed(
        capsys,
        *("train", "sft", "--output", tmp_path / "run", "--model", road / "sft/model"),
        *("--limit", 20, "--max_length", 256, "--batch_tokens", 256, "--lr", "1e30"),
    )
    assert found.status == 1
    assert "Stopped before the update; no checkpoint was written yet" in found.line


def test_nan_in_the_reward_model_stops_apa_before_the_weights(capsys, tmp_path, road):
    broken = copy_of(road / "reward/model", tmp_path / "reward")
    heads = load_file(broken / "heads.safetensors")
    heads["bias"][1] = float("nan")
    save_file(heads, broken / "heads.safetensors")
    found = Failed(
        capsys,
        *("train", "apa", "--output", tmp_path / "run", "--policy", road / "sft/model"),
        *("--reward", broken, "--prompts_per_step", 2, "--samples_per_prompt", 2),
        *("--eval_limit", 2, "--eval_samples", 1, "--sampling.max_new_tokens", 4),
    )
    assert found.status == 1
    assert f"the reward ensemble {broken} gave nan for response 1 of 2" in found.line
    assert not (tmp_path / "run" / "checkpoints").exists()


def start(*argv: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fastalign", *(str(a) for a in argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_steps(process: subprocess.Popen, folder: Path, n: int) -> None:
    metrics = folder / "metrics.jsonl"
    end = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count('"train"') < n:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def test_ctrl_c_writes_a_checkpoint_and_resume_finishes(tmp_path):
    folder = tmp_path / "run"
    argv = ["train", "sft", "--output", folder, *TINY, "--limit", 60, "--eval_limit", 2]
    process = start(*argv)
    wait_for_steps(process, folder, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    last = err.splitlines()[-1]
    assert last.startswith("fastalign: train sft: stopped at step ") and "Traceback" not in err
    assert "go on with --resume (checkpoint " in last
    (saved,) = (folder / "checkpoints").iterdir()
    stopped = int(saved.name[5:])
    assert f"stopped at step {stopped};" in last and not (folder / "model").exists()
    resumed = start("train", "sft", "--output", folder, "--resume")
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert f"resumed at step {stopped} of " in err and (folder / "model").is_dir()
    lines = [json.loads(s) for s in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["phase"] == "train"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > stopped


def test_killed_in_the_middle_loses_only_what_followed_the_last_checkpoint(capsys, tmp_path):
    folder = tmp_path / "run"
    argv = ["train", "sft", "--output", folder, *TINY, "--limit", 60, "--eval_limit", 2]
    process = start(*argv, "--checkpoint_every", 2)
    wait_for_steps(process, folder, 4)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    cli.main(["train", "sft", "--output", str(folder), "--resume"])
    lines = [json.loads(s) for s in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["phase"] == "train"]
    assert steps == list(range(1, len(steps) + 1)) and (folder / "model").is_dir()


def test_damaged_checkpoints(capsys, tmp_path, caplog):
    folder = tmp_path / "run"
    argv = ["train", "sft", "--output", folder, *TINY, "--limit", 8, "--eval_limit", 2]
    argv += ["--checkpoint_every", 1]
    cli.main([str(a) for a in argv])
    older, newer = sorted((folder / "checkpoints").iterdir())
    weights = newer / "shard-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    found = Failed(capsys, "train", "sft", "--resume", newer)
    assert found.status == 2
    assert f"damaged checkpoint {newer}: shard-00001.safetensors has" in found.line
    caplog.clear()
    cli.main(["train", "sft", "--output", str(folder), "--resume"])  # takes the one before, aloud
    assert f"damaged checkpoint {newer}: shard-00001.safetensors has" in caplog.text
    assert "taking the one before it" in caplog.text
    assert sorted((folder / "checkpoints").iterdir()) == [older, newer]
    for path in (older, newer):
        (path / "state.pt").write_bytes(b"")
    found = Failed(capsys, "train", "sft", "--output", folder, "--resume")
    assert found.status == 2 and "nothing to resume: damaged checkpoint" in found.line
    assert (folder / "model").is_dir() and (folder / "metrics.jsonl").stat().st_size > 0


def test_nothing_to_resume_is_said_before_any_work(capsys, tmp_path):
    for resume in (["--resume"], ["--resume", tmp_path / "step-000001"]):
        found = Failed(capsys, "train", "sft", "--output", tmp_path / "new", *resume)
        assert found.status == 2 and "nothing to resume: no checkpoint" in found.line


def test_full_disk(capsys, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "shard-00001.safetensors")

    monkeypatch.setattr("fastalign.train.checkpoint.save", full)
    found = Failed(
        capsys, "train", "sft", "--output", tmp_path / "run", *TINY, "--limit", 4, "--eval_limit", 2
    )
    assert found.status == 1
    assert found.line == (
        "train sft: step 2: a checkpoint cannot be written: No space left on device; "
        "no checkpoint was written yet"
    )


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path, monkeypatch):
    """Nothing catches what the user cannot mend, a plain ValueError among it."""
    for fault in (ValueError("tensors do not match"), KeyError("x"), RuntimeError("shape")):

        def broken(*args, fault=fault, **kwargs):
            raise fault

        monkeypatch.setattr(sft, "load_data", broken)
        with pytest.raises(type(fault)):
            cli.main(["train", "sft", "--output", str(tmp_path / "run")])
