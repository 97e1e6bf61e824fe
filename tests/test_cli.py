"""The command line: help, configuration files, unknown words, the options of a resumed run."""

import json
import subprocess
import sys

import pytest
import yaml

from fastalign import __version__, cli

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
    ],
)
def test_unknown_words_name_the_nearest(capsys, argv, said):
    status, out, err = fastalign(capsys, *argv.split())
    assert (status, out) == (2, "")
    assert err.startswith("fastalign: ") and err.count("\n") == 1 and said in err


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
