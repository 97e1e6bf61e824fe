"""README.md is true: its Python runs, its commands exist, its tables and its tree are right."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalign as fa
from fastalign import cli
from fastalign.data.synthetic import SyntheticTask
from fastalign.ops.linear_loss import linear_loss_reference
from fastalign.testing import assert_no_worse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(
    r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
)
SHELL = "".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ")
COMMANDS = [line for line in SHELL.splitlines() if line.strip()]
FASTALIGN = [line for line in COMMANDS if line.startswith("fastalign ")]


def tracked() -> list[str]:
    """Paths that git knows or would take."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return [path for path in done.stdout.splitlines() if (ROOT / path).exists()]


def test_python_blocks_run_and_print_what_the_page_shows(capsys: pytest.CaptureFixture) -> None:
    names: dict[str, Any] = {}
    printed = ""
    n_blocks = n_printed = 0
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), names)
            printed = capsys.readouterr().out
            n_blocks += 1
            if "def reinforce" in text:
                names["reinforce_advantages"] = names["advantages"]
        elif printed:
            assert kind == "text" and text == printed
            printed = ""
            n_printed += 1
    assert (n_blocks, n_printed) == (6, 1)

    def reference(dtype: torch.dtype) -> torch.Tensor:
        hidden, weight = (names[name].detach().to(dtype) for name in ("hidden", "weight"))
        given = {"advantages": names["reinforce_advantages"].to(dtype)}
        one = torch.ones(1, dtype=dtype)
        return linear_loss_reference(
            hidden, weight, names["targets"], names["reinforce"], given, None, one
        )

    eager, truth = reference(torch.float32), reference(torch.float64)
    assert_no_worse(names["out"].loss, eager, truth, torch.float32)
    assert names["hidden"].grad[:2].abs().sum() == 0 < names["hidden"].grad[2:].abs().sum()
    assert names["logp"].shape == names["entropy"].shape == (4,)
    assert names["returns"].shape == (5,)


def test_the_examples_of_the_loss_head_run() -> None:
    """Those of docs/loss-head.md, on one small head."""
    page = (ROOT / "docs/loss-head.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    n, width, vocab = 6, 8, 20
    names: dict[str, Any] = {
        "fa": fa,
        "torch": torch,
        "hidden": torch.randn(n, width, requires_grad=True),
        "weight": torch.randn(vocab, width, requires_grad=True),
        "targets": torch.randint(vocab, (n,)),
        "advantages": torch.randn(n),
        "old_logp": torch.full((n,), -3.0),
        "ref_hidden": torch.randn(n, width + 1),
        "ref_weight": torch.randn(vocab, width + 1),
    }
    for block in blocks:
        exec(compile(block, "docs/loss-head.md", "exec"), names)
        if "pairs" in names:
            sign = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
            names["out"] = fa.ops.linear_loss(
                names["hidden"],
                names["weight"],
                names["targets"],
                names.pop("pairs"),
                {"sign": sign},
                groups=[0, 4, 6],
            )
        assert names["out"].loss.isfinite()
    assert len(blocks) == 4 and names["out"].metrics["kl"] > 0


def test_op_table() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` (\| .*)\|$", README, re.MULTILINE))
    hubs = {path.stem for path in (ROOT / "fastalign/ops").glob("*.py")}
    ops = {name for name in fa.ops.__all__ if name in hubs} - {"plan"}
    assert set(rows) == ops
    for op, row in rows.items():
        cells = [cell.strip() for cell in row.strip("| ").split("|")]
        cells += [""] * (3 - len(cells))
        hub = (ROOT / "fastalign/ops" / f"{op}.py").read_text()
        for cell, file in zip(cells[1:], (f"csrc/{op}.cpp", f"kernels/{op}.py"), strict=True):
            lenders = {"token_logprobs": "rows", "token_kl": "rows", "gae": "scan"}
            borrowed = [name for stem, name in lenders.items() if file.replace(op, stem) in hub]
            assert cell == ("yes" if (ROOT / file).exists() else "".join(borrowed[:1])), op
        assert cells[0] == "yes" and f"def {op}_reference" in hub or "token_" in op


def test_method_table() -> None:
    """One row for each method that trains, with the paper its code names."""
    rows = re.findall(r"^\| (`train .*?) \| .* \| (.*) \|$", README, re.MULTILINE)
    methods = {name: text for cell, text in rows for name in re.findall("`(.*?)`", cell)}
    assert set(methods) == {name for name in cli.COMMANDS if name.startswith("train ")}
    for command, text in methods.items():
        code = (ROOT / (cli.COMMANDS[command][0].replace(".", "/") + ".py")).read_text()
        code += "".join(p.read_text() for p in (ROOT / "fastalign/losses").glob("*.py"))
        for paper in re.findall(r"\[(\d{4}\.\d{5})\]\(https://arxiv.org/abs/\1\)", text):
            assert paper in code, (command, paper)


def test_named_losses_are_all_there_are() -> None:
    line = re.search(r"The losses of `fa.losses` are (.*?)\.\s", README, re.DOTALL)
    assert line is not None
    assert set(re.findall(r"`([A-Z]\w+)`", line[1])) == {
        name for name in fa.losses.__all__ if isinstance(getattr(fa.losses, name), type)
    }


@pytest.mark.parametrize("line", FASTALIGN, ids=lambda line: " ".join(line.split()[1:3]))
def test_commands_and_options_exist(
    line: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(line)[1:]
    monkeypatch.chdir(tmp_path)
    for place, word in enumerate(words):
        if word == "--config":
            file = tmp_path / words[place + 1]
            file.parent.mkdir(parents=True)
            file.write_text("lambda_: 0.25\n")
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--print_config"])
    shown = capsys.readouterr()
    assert ended.value.code in (0, None), shown.err
    for place, word in enumerate(words):
        if re.match(r"--(output|data|model|lines|policy|prompts)$", word):
            assert f"{word.lstrip('-')}: {words[place + 1]}\n" in shown.out.replace("'", "")


def test_every_command_and_make_target_is_there() -> None:
    commands = {" ".join(line.split()[1 : 3 if "train" in line else 2]) for line in FASTALIGN}
    assert commands | {"quickstart"} == set(cli.COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert targets[:2] == ["quickstart", "test"]
    for target in targets:
        assert re.search(rf"^{target}: .*## ", makefile, re.MULTILINE)
    assert "fastalign quickstart --output runs/quickstart" in makefile
    measured = [shlex.split(line) for line in COMMANDS if line.startswith("python -m benchmarks.")]
    for words in measured:  # each result lies where the command puts it, and says which made it
        result = json.loads((ROOT / words[words.index("--out") + 1]).read_text())
        made = set(shlex.split(result["machine"]["command"]))
        assert set(words) <= made, made
    others = [line for line in COMMANDS if not line.startswith(("make ", "fastalign ", "python "))]
    assert others == ["pip install --no-build-isolation ."]


@pytest.mark.usefixtures("one_thread")
def test_the_road_on_ones_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the page, on 40 pairs and a very small model instead of a large one."""
    monkeypatch.chdir(tmp_path)
    pairs = SyntheticTask(seed=1).preferences(40, "train")
    with open("pairs.jsonl", "w") as file:
        for pair in pairs:
            record = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            file.write(json.dumps(record) + "\n")
    small = {
        "train sft": "--model scratch:1m --vocab_size 300 --epochs 1",
        "train reward": "",
        "train apa": "--steps 1 --prompts_per_step 2 --sampling.max_new_tokens 4 --eval_samples 2",
        "report": "",
        "evaluate": "--samples 1 --sampling.max_new_tokens 4 --limit 4",
    }
    cut = {"--lines": "0:32", "--eval_lines": "32:40"}
    written = []
    for line in FASTALIGN[:5]:
        words = shlex.split(line)[1:]
        for place, word in enumerate(words[:-1]):
            if word in cut:
                words[place + 1] = cut[word]
        name = " ".join(words[: 2 if words[0] == "train" else 1])
        cli.main([*words, *small[name].split()])
        written.append(name)
    assert written == list(small)
    judged = json.loads((tmp_path / "runs/evaluation/evaluation.json").read_text())
    assert judged["n_prompts"] == 4 and judged["n_samples"] == 1
    table = README.split("What a run writes into its folder:")[1].split("## ")[0]
    for name in re.findall(r"`([\w.]+(?:json|jsonl|yaml|html|/))`", table):
        folder = tmp_path / "runs/mine" / ("" if name == "report.html" else "apa")
        assert (folder / name).exists(), name


def tree() -> list[str]:
    """The paths of the page's file tree, folders with a slash at the end."""
    text = next(text for kind, text in BLOCKS if kind == "text" and "pyproject.toml" in text)
    paths, parent = [], ""
    for line in text.splitlines():
        name = line.split()[0]
        parent = parent if line.startswith("  ") else ""
        paths.append(parent + name)
        if not line.startswith("  ") and name.endswith("/"):
            parent = name
    return paths


def test_file_tree() -> None:
    named = tree()
    assert len(named) == len(set(named))
    for path in named:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).exists(), path
    files = tracked()
    top = {path.split("/")[0] + ("/" if "/" in path else "") for path in files}
    assert top - set(named) == set()
    folders = {path.rsplit("/", 1)[0] + "/" for path in files if path.startswith("fastalign/")}
    assert folders - set(named) == set()


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 4
    for link in links:
        if link.startswith("https://arxiv.org/abs/"):
            continue
        assert (ROOT / link).is_file(), link
