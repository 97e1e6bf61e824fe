"""docs/training.md is true: its functions reward, its commands parse, its tables are the code's."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastalign import cli
from fastalign.rollout import Rollout
from fastalign.train import critic
from fastalign.train.guards import ALARMS, GuardConfig
from fastalign.train.ppo import PRESETS, PPOConfig
from fastalign.train.reward_source import make_reward

PAGE = (Path(__file__).parent.parent / "docs/training.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]


def table(first: str) -> list[list[str]]:
    """The rows of the table whose first heading is this."""
    text = PAGE.split(f"| {first} |")[1].split("\n\n")[0]
    rows = [re.split(r"(?<!\\)\|", line.strip("|\n ")) for line in text.splitlines()[2:]]
    return [[cell.strip(" `") for cell in row] for row in rows]


def test_the_example_file_rewards(tmp_path: Path) -> None:
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    (tmp_path / "my_rewards.py").write_text(code)
    config = SimpleNamespace(
        reward=f"{tmp_path}/my_rewards.py:on_topic,0.5*{tmp_path}/my_rewards.py:brevity",
        statistic=None,
        coef=None,
        policy="",
        micro_tokens=1,
        dtype="float32",
    )
    reward = make_reward(config, None, torch.device("cpu"))
    rollouts = [Rollout(i, [1], [2], [0.0], True) for i in range(3)]
    responses = ["The Sea is wide.", "word " * 31 + "sea", "no"]
    found = reward.score(rollouts, ["Tell me about the sea."] * 3, responses)
    assert found.total.tolist() == pytest.approx([1.0, 1.0 - 0.1, 0.0])
    assert list(found.parts) == ["my_rewards.on_topic", "my_rewards.brevity"]
    assert "`reward/my_rewards.brevity`" in PAGE


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*shlex.split(line)[1:], "--print_config"])
    shown = capsys.readouterr()
    assert ended.value.code in (0, None), shown.err


def test_options_exist(capsys: pytest.CaptureFixture) -> None:
    """Those in the text, all of which ppo has."""
    named = set(re.findall(r"`--([\w.]+)", PAGE)) - {"help", "resume"}
    with pytest.raises(SystemExit):
        cli.main(["train", "ppo", "--help"])
    known = set(re.findall(r"--([\w.]+)", capsys.readouterr().out))
    assert len(named) >= 10 and named - known == set()


def test_the_table_of_guards() -> None:
    rows = {row[0]: row[1] for row in table("alarm")}
    assert tuple(rows) == ALARMS
    defaults = {f.name: str(f.default).lower() for f in fields(GuardConfig)}
    assert {name: defaults[name] for name in ALARMS} == rows


def test_the_table_of_critics() -> None:
    assert tuple(row[0] for row in table("critic")) == critic.KINDS


def test_the_table_of_presets() -> None:
    rows = table("option of ppo")
    names = PAGE.split("| option of ppo |")[1].split("\n")[0].strip(" |").split(" | ")
    assert [name.strip("`") for name in names] == list(PRESETS)
    shown = {row[0]: row[1:] for row in rows}
    assert shown == {
        option: [str(PRESETS[name][option]).lower() for name in PRESETS]
        for option in PRESETS["ppo"]
    }
    assert {f.name for f in fields(PPOConfig)} >= set(shown)
