"""What a user may get wrong when a command begins: models, adapters, outputs, a resumed run.

The data, options and folders that all commands share are in test_bad_input.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from failed_commands import Failed, jsonl
from safetensors.torch import load_file, save_file

from fastalign import cli
from fastalign.commands import output
from fastalign.commands.answers import condition_of
from fastalign.data.condition import Condition

pytestmark = pytest.mark.usefixtures("one_thread")

PAIR = {"prompt": "Say it.", "chosen": " It is good.", "rejected": " It is bad."}
REWARDED = {"prompt": "Say it.", "completion": " It is good.", "reward": 1.0}


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- models -------------------------------------------------------------------------------------


def test_a_reward_ensemble_cannot_write(capsys, tmp_path, road):
    """It has no head for tokens: its answers would be noise, without a word."""
    reward, policy = road / "reward/model", road / "sft/model"
    said = f"{reward} is a reward ensemble, which cannot write: expected a language model"
    rest = ["--output", tmp_path / "out"]
    for argv in (
        ["generate", "--policy", reward],
        ["evaluate", "--policy", policy, "--baseline", reward, "--reward", reward, *rest],
        ["train", "apa", "--policy", reward, "--reward", reward, *rest],
        ["train", "sft", "--model", reward, "--limit", 4, "--max_length", 256, *rest],
    ):
        found = Failed(capsys, *argv)
        assert found.status == 2 and found.line.endswith(said)


def test_a_language_model_has_no_reward_heads(capsys, road):
    model = road / "sft/model"
    found = Failed(capsys, "score", "--reward", model)
    assert found.status == 2
    assert found.line == f"score: no reward ensemble at '{model}': reward_ensemble.json is missing"


def test_the_folder_of_a_run_is_not_its_model(capsys, road):
    found = Failed(capsys, "generate", "--policy", road / "sft")
    assert found.status == 2
    assert (
        found.line == f"generate: {road}/sft is the folder of a run; its model is {road}/sft/model"
    )


def test_a_model_with_weights_left_out(capsys, tmp_path, road):
    """They would be random, and training would begin without a word."""
    model = tmp_path / "model"
    shutil.copytree(road / "sft/model", model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    found = Failed(capsys, "generate", "--policy", model)
    assert found.status == 2
    lacks = "model.layers.0.mlp.up_proj.weight and 1 more"
    assert f"'{model}' lacks weights that a LlamaForCausalLM needs: {lacks}" in found.line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--lora.rank -1", "LoRA: expected rank >= 0, alpha > 0 and 0 <= dropout < 1, got -1"),
        ("--lora.alpha 3", "LoRA: alpha 3.0 needs a rank; --lora.rank is 0"),
        ("--lora.rank 0 --lora.save adapter", "LoRA: save adapter needs a rank"),
        ("--lora.rank 99999", "LoRA: rank 99999 is more than that of the matrices it adapts, at"),
        (
            "--lora.rank 2 --lora.target_modules q_proj,x",
            "has no module 'x'; its matrices are down",
        ),
    ],
)
def test_adapters(capsys, tmp_path, road, options, said):
    data = jsonl(tmp_path / "d.jsonl", PAIR)
    argv = ["train", "sft", "--model", road / "sft/model", "--max_length", 256, "--data", data]
    found = Failed(capsys, *argv, "--output", tmp_path / "out", *options.split())
    assert found.status == 2 and said in found.line


def test_attention_that_is_not_installed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("fastalign.models.attention_kernels.find_spec", lambda name: None)
    found = Failed(capsys, "train", "sft", "--attention", "flash2", "--output", tmp_path / "out")
    assert found.status == 2 and not (tmp_path / "out").exists()
    assert found.line == (
        "train sft: attention flash2 needs the package flash-attn, which is not installed; "
        "take auto"
    )


def test_what_is_not_on_this_machine(capsys, tmp_path, road, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    argv = ["train", "grpo", "--policy", road / "sft/model", "--reward", road / "reward/model"]
    argv += ["--output", tmp_path / "out", "--eval_limit", 1]
    found = Failed(capsys, *argv, "--device", "cuda")
    assert found.status == 2
    assert found.line.endswith("device 'cuda' was asked for, but 0 CUDA devices are here")
    found = Failed(capsys, *argv, "--engine", "vllm", "--device", "cpu", "--limit", 4)
    assert found.status == 2
    said = "engine vllm: expected a policy on a GPU, got one on cpu; take --engine transformers"
    assert found.line.endswith(said)


# --- data and options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "record", "said"),
    [
        ("dpo", REWARDED, "found the keys completion, prompt, reward; for preferences expected"),
        ("mle", PAIR, "reward is missing: give the data a number reward or score"),
        ("dpo", PAIR | {"chosen": 3}, "chosen must be a string or a list of messages, got int"),
        ("sft", PAIR | {"prompt": "\ud800"}, "prompt holds half of a surrogate pair, which no"),
        ("dpo --loss kto", REWARDED | {"label": 1}, "label must be true or false, got 1"),
    ],
)
def test_records_of_another_kind(capsys, tmp_path, road, argv, record, said):
    file = jsonl(tmp_path / "d.jsonl", record)
    model = ["--model", road / "sft/model", "--max_length", 256]
    more = ["--data", file, "--output", tmp_path / "out"]
    found = Failed(capsys, "train", *argv.split(), *model, *more)
    assert found.status == 2 and f"{file}:1: {said}" in found.line


def test_text_that_is_not_utf_8(capsys, tmp_path, road):
    file = tmp_path / "d.jsonl"
    file.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    found = Failed(capsys, "generate", "--policy", road / "sft/model", "--prompts", file)
    assert (found.status, found.line) == (2, f"generate: {file}: not UTF-8 text")
    found = Failed(capsys, "generate", "--policy", road / "sft/model", "--text", "\udcff")
    assert (found.status, found.line) == (2, "generate: --text: not UTF-8 text")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("train sft --lr -1e-5", "expected lr >= 0, got -1e-05"),
        ("train apa --steps 0", "expected steps >= 1, got 0"),
        ("train apa --micro_tokens 0", "expected micro_tokens >= 1, got 0"),
        ("train grpo --samples_per_prompt 1", "it needs a --samples_per_prompt of at least 2; got"),
        ("train dpo --loss simpo --reference live", "--reference live does not go with --loss si"),
        ("score --coef -1", "expected coef >= 0, got -1.0"),
        ("score --statistic x", "unknown statistic 'x': expected one of mean"),
        ("evaluate --statistic x", "unknown statistic 'x': expected one of mean"),
    ],
)
def test_options(capsys, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    found = Failed(capsys, *argv.split())
    assert found.status == 2 and said in found.line and not any(tmp_path.iterdir())


def test_a_target_that_no_training_data_had(tmp_path, caplog):
    Condition(mean=0.0, std=1.0, lowest=-1.5, highest=2.0, samples=9).save(tmp_path)
    condition_of(str(tmp_path), 2.0)
    assert "lies outside" not in caplog.text
    condition_of(str(tmp_path), 2.5)
    assert "--target_reward 2.5 lies outside of that: what " in caplog.text


# --- what a run leaves --------------------------------------------------------------------------


def test_a_refused_resume_leaves_the_run_as_it_was(capsys, tmp_path, road):
    folder = tmp_path / "sft"
    shutil.copytree(road / "sft", folder)
    before = contents(folder)
    argv = ["train", "sft", "--output", folder, "--resume"]
    found = Failed(capsys, *argv, "--seed", 3)
    assert found.status == 2 and "a run with seed 0, this one has 3" in found.line
    found = Failed(capsys, *argv, "--limit", 20)
    assert found.status == 2 and "a run with another data (60 examples, " in found.line
    found = Failed(capsys, "train", "reward", *argv[2:])
    assert found.status == 2 and f"--resume: {folder} is not a run of train reward" in found.line
    assert contents(folder) == before


def test_nothing_to_resume_makes_no_folder(capsys, tmp_path):
    """One that is there and empty would be taken for a run that was stopped early."""
    for _ in range(2):
        found = Failed(capsys, "train", "sft", "--output", tmp_path / "new", "--resume")
        assert found.status == 2 and "nothing to resume: no checkpoint in" in found.line
    assert not (tmp_path / "new").exists()


def test_commands_without_resume_do_not_offer_it(capsys, road):
    found = Failed(capsys, "evaluate", "--output", road / "sft")
    assert found.line.endswith("is already in use; choose another --output, or --overwrite")


# --- output files -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "score"])
def test_outputs_that_cannot_be_written(capsys, tmp_path, command):
    """Before any work: the models named by default are not even there."""
    file = tmp_path / "mine.jsonl"
    file.write_text("mine")
    for where, said in (
        (file, f"output {file} is there already; choose another, or --overwrite"),
        (tmp_path, f"output {tmp_path} is a folder; expected a file"),
        (file / "below", f"cannot write output {file}/below: {file} is a file"),
        ("/proc/fastalign/x", "cannot write output /proc/fastalign/x: No such file or directory"),
    ):
        found = Failed(capsys, command, "--output", where)
        assert (found.status, found.line) == (2, f"{command}: {said}")
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


def test_a_command_that_stops_leaves_no_half_file(capsys, tmp_path, road, monkeypatch):
    file = tmp_path / "answers.jsonl"
    file.write_text("before")
    argv = ["generate", "--policy", road / "sft/model", "--limit", 4, "--sampling.batch_size", 2]
    argv += ["--sampling.max_new_tokens", 4, "--output", file, "--overwrite"]
    argv = [str(a) for a in argv]
    write, written = output.write_line, list[dict]()

    def stop(stream, record):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(record)
        write(stream, record)

    with monkeypatch.context() as stopping:
        stopping.setattr("fastalign.commands.generate.write_line", stop)
        assert Failed(capsys, *argv).status == 130
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    cli.main(argv)
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(answers) == 4 and answers[:3] == written and list(tmp_path.iterdir()) == [file]


def test_results_are_written_in_one_step(tmp_path, road, monkeypatch):
    """A rename is what gives each file its name, so no reader ever sees half of one."""
    argv = ["--reward", road / "reward/model", "--limit", 2, "--sampling.max_new_tokens", 4]
    evaluation, best = tmp_path / "evaluation", tmp_path / "best"
    models = ["--policy", road / "apa/model", "--baseline", road / "sft/model", "--samples", 1]
    named, replace = [], Path.replace

    def note(self, target):
        named.append(Path(target))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", note)
    cli.main([str(a) for a in ["evaluate", *models, *argv, "--output", evaluation]])
    policy = ["--policy", road / "sft/model", "--n", 2]
    cli.main([str(a) for a in ["bestofn", *policy, *argv, "--output", best]])
    for folder in (evaluation, best):
        assert set(folder.iterdir()) - {folder / "report.html"} <= set(named)
