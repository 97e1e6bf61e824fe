"""The command line: help, configuration files, unknown words, the options of a resumed run."""

import json
import subprocess
import sys

import pytest
import yaml

from fastalign import __version__, cli
from fastalign.unknown_option import ELSEWHERE

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = sorted(cli.COMMANDS)
POSITIONAL = (("report", "run"), ("overoptimise", "runs"))


def fastalign(capsys, *argv):
    """(exit status, standard output, standard error) of a command run in this process."""
    status: object = 0
    try:
        cli.main([str(a) for a in argv])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def configured(capsys, *argv):
    status, out, err = fastalign(capsys, *argv, "--print_config")
    assert (status, err) == (0, "")
    return yaml.safe_load(out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_explains_every_option(capsys, command):
    status, out, err = fastalign(capsys, *command.split(), "--help")
    assert (status, err) == (0, "")
    module, name, _ = cli.COMMANDS[command]
    fields = getattr(__import__(module, fromlist=[name]), name).__dataclass_fields__
    text = " ".join(out.split())
    for field in fields:
        assert f"--{field}" in text or (command, field) in POSITIONAL
    # jsonargparse shows "(type: ..." right after the name of an option that has no text.
    assert " (type:" in text
    for word in text.split(" --")[1:]:
        option, _, rest = word.partition(" ")
        if option.strip("[],") in fields and "]" not in word[:60] and "(type:" in word:
            assert len(rest.split("(type:")[0].split()) >= 3, word


def test_usage_and_version(capsys):
    for argv in (["--help"], ["-h"], ["train", "--help"]):
        status, out, err = fastalign(capsys, *argv)
        assert (status, err) == (0, "")
        assert all(f"  {command} " in out for command in COMMANDS)
    assert fastalign(capsys, "--version") == (0, f"{__version__}\n", "")
    status, out, err = fastalign(capsys)
    assert (status, out) == (2, "") and "usage: fastalign COMMAND" in err


def test_help_is_quick_and_imports_no_models():
    """Another process, because this one has imported everything."""
    code = (
        "import sys; from fastalign import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'jsonargparse'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "['torch']"  # `import fastalign` itself


def test_options_config_files_and_print_config(capsys, tmp_path):
    defaults = configured(capsys, "train", "apa")
    assert defaults["sampling"]["temperature"] == 1.0 and defaults["resume"] is None
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 0.5\nsteps: 7\nsampling:\n  temperature: 0.25\n")
    given = configured(capsys, "train", "apa", "--config", file, "--steps", 9)
    assert (given["lr"], given["steps"], given["sampling"]["temperature"]) == (0.5, 9, 0.25)
    changed = {"lr", "steps", "sampling"}
    assert {k for k in defaults if given[k] != defaults[k]} == changed
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(given))
    assert configured(capsys, "train", "apa", "--config", again) == given
    spelled = configured(capsys, "train", "apa", "--sampling.max_new_tokens=5", "--whiten=false")
    assert spelled["sampling"]["max_new_tokens"] == 5 and spelled["whiten"] is False


@pytest.mark.parametrize("run", ["sft", "reward", "apa"])
def test_the_config_of_a_run_can_be_fed_back(capsys, road, run):
    file = road / run / "config.yaml"
    held = yaml.safe_load(file.read_text())
    found = configured(capsys, "train", run, "--config", file)
    assert found == held | {"resume": None, "overwrite": False}
    assert held["output"] == str(road / run) and held["eval_limit"] in (4, 8)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("trian sft", "unknown command 'trian sft'; did you mean train sft?"),
        ("quickstat", "unknown command 'quickstat'; did you mean quickstart?"),
        ("train sfd --lr 1", "unknown command 'train sfd'; did you mean train sft?"),
        ("train", "train: expected one of sft, reward, apa"),
        ("bake", "unknown command 'bake' (fastalign --help lists them)"),
        ("train sft --epoch_s 3", "unknown option --epoch_s; did you mean --epochs?"),
        ("train apa --lamda_ 3", "unknown option --lamda_; did you mean --lambda_?"),
        ("train apa --sampling.temprature=2", "; did you mean --sampling.temperature?"),
        ("train reward --zzz", "unknown option --zzz"),
        ("train sft stray", "unrecognized arguments: stray"),
        ("train sft --lerning_rate 1", "unknown option --lerning_rate; did you mean --lr?"),
        ("train sft --batch_size 8", "unknown option --batch_size; did you mean --batch_tokens?"),
        ("train sft --rank 8", "unknown option --rank; did you mean --lora.rank?"),
        ("train sft -lr 1", "unknown option -lr; did you mean --lr?"),
        ("train grpo --critic trunk", "no option --critic here (train apa, train awr, train ppo"),
        ("train apa --beta 1", "no option --beta here (train awr, "),  # nor short for --beta2
        ("train sft --lr", "--lr: expected a value"),
        ("trian", "unknown command 'trian'; did you mean train?"),
        ("--lr 3", "expected a command before --lr"),
    ],
)
def test_unknown_words_name_the_nearest(capsys, argv, said):
    status, out, err = fastalign(capsys, *argv.split())
    assert (status, out) == (2, "")
    assert err.startswith("fastalign: ") and err.count("\n") == 1 and said in err


def test_a_value_may_begin_with_a_minus(capsys):
    for argv in (["--lr", "-1e-5"], ["--lr=-1e-5"]):
        _, _, err = fastalign(capsys, "train", "sft", *argv)
        assert err == "fastalign: train sft: expected lr >= 0, got -1e-05\n"
    found = configured(capsys, "train", "sft", "--eval_lines", "-40:", "--eval_limit", "40")
    assert (found["eval_lines"], found["eval_limit"]) == ("-40:", 40)


def test_what_other_trainers_call_it_is_an_option_of_some_command():
    fields = cli.fields_of_others("")
    known = set().union(*fields.values()) | {"lora.rank", "lora.target_modules"}
    assert set(ELSEWHERE.values()) - known == {"sampling.max_new_tokens"}
    assert not set(ELSEWHERE) & known


def test_help_has_one_group_for_each_class_of_options(capsys):
    """What is the command's own first; every option once."""
    _, out, _ = fastalign(capsys, "train", "grpo", "--help")
    assert out.startswith("usage: fastalign train grpo [options]\n\nAlign a policy")
    titles = [line for line in out.splitlines() if line.endswith(":") and line[0].isalpha()]
    assert titles[:5] == [
        "options:",
        "options of its own:",
        "What every method has that learns from its own samples:",
        "What every command that updates weights has:",
        "What every training command has:",
    ]
    own, shared = (out.split(f"{title}\n")[1].split("\n\n")[0] for title in titles[1:3])
    assert "--variant " in own and "--samples_per_prompt" not in own
    assert "--samples_per_prompt " in shared and "--engine " in shared
    for name in ("--variant", "--steps", "--lr", "--seed", "--lora.rank", "--resume"):
        assert len([line for line in out.splitlines() if line.startswith(f"  {name} ")]) <= 1
        assert f"  {name} " in out
    assert "default: null" not in out


SMALL = ("--model scratch:1m --vocab_size 300 --limit 6 --batch_tokens 512 --eval_limit 2").split()


def test_a_bare_resume_goes_on_with_the_run_s_own_options(capsys, tmp_path):
    """Only the folder is given: data, model and batch come from its config.yaml."""
    folder = tmp_path / "run"
    argv = ["train", "sft", "--output", folder]
    assert fastalign(capsys, *argv, *SMALL, "--epochs", "1")[0] == 0
    first = (folder / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in first.splitlines()]
    status, _, _ = fastalign(capsys, *argv, "--epochs", "2", "--resume")
    assert status == 0
    after = (folder / "metrics.jsonl").read_text()
    assert after.startswith(first)
    assert json.loads(after.splitlines()[-1])["step"] == 2 * steps[-1]
    held = yaml.safe_load((folder / "config.yaml").read_text())
    assert (held["limit"], held["epochs"], held["model"]) == (6, 2, "scratch:1m")
    assert "resume" not in held and "overwrite" not in held
    assert "<html" in (folder / "report.html").read_text()
    # A given checkpoint says which run it is of.
    last = folder / "checkpoints" / f"step-{2 * steps[-1]:06d}"
    found = configured(capsys, "train", "sft", "--resume", last)
    assert (found["output"], found["limit"]) == (str(folder), 6)


def test_a_run_writes_its_folder(road):
    for run in ("sft", "reward", "apa"):
        held = {path.name for path in (road / run).iterdir()}
        more = {"evaluation.json", "samples.jsonl"} if run == "apa" else set()
        expected = {"config.yaml", "metrics.jsonl", "accounting.json", "checkpoints", "model"}
        assert held == expected | more


def test_report_of_a_run(capsys, road, tmp_path):
    status, out, err = fastalign(capsys, "report", road / "apa", "--out", tmp_path / "page.html")
    assert (status, err) == (0, "")
    assert out.strip() == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<html" in page and len(page) > 5000


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fastalign", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")
