"""Rewards from ensembles, Python functions and sums of them; what functions get wrong."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import rollouts, save_ensemble, tokenizer

from fastalign.data.packing import pack
from fastalign.errors import UserError
from fastalign.models import RewardEnsemble
from fastalign.rollout import Rollout
from fastalign.train.reward_source import RewardSource, Scored, make_reward, parse_reward
from fastalign.train.run import RunError, Stopped

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["say a", "say bc"]
RESPONSES = ["a", "bc"]
TWO = [Rollout(i, [5], [6], [0.0], True) for i in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_ensemble(tmp_path_factory.mktemp("ensemble") / "model")


def source(reward: str, micro_tokens: int = 8192, **options: Any) -> RewardSource:
    given = {"statistic": None, "coef": None, "policy": "runs/sft/model", "dtype": "float32"}
    config = SimpleNamespace(reward=reward, micro_tokens=micro_tokens, **given | options)
    return make_reward(config, tokenizer(), torch.device("cpu"))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    """Writes a Python file with some lines; its path."""

    def write(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def of_two(file: Callable[[str], str]) -> Callable[[str], Scored]:
    """What a function with this body says of two responses."""

    def run(body: str) -> Scored:
        path = file(f"import numpy as np\nimport torch\ndef f(prompts, responses):\n    {body}\n")
        return source(f"{path}:f").score(TWO, PROMPTS, RESPONSES)

    return run


# --- the ensemble ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statistic", "coef"), [(None, None), ("min", None), ("lcb", 0.7), ("uwo", None)]
)
@pytest.mark.parametrize("micro_tokens", [1, 24, 8192])
def test_an_ensemble(folder: str, statistic: str, coef: float, micro_tokens: int) -> None:
    some = rollouts()
    reward = source(folder, micro_tokens, statistic=statistic, coef=coef)
    found = reward.score(some, ["p"] * 6, ["r"] * 6)
    plain = RewardEnsemble.load(folder).eval()
    with torch.no_grad():
        alone = torch.cat([plain(pack([r.prompt + r.completion])) for r in some])
    mean, std = alone.mean(1), alone.std(1)
    expected = {
        None: mean,
        "min": alone.min(1).values,
        "lcb": mean - 0.7 * std,
        "uwo": mean - 0.5 * std.square(),  # the coefficient it was saved with
    }[statistic]
    assert found.scores is not None and found.total.dtype == torch.float32
    torch.testing.assert_close(found.scores, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-5)
    assert list(found.parts) == ["ensemble"] and torch.equal(found.parts["ensemble"], found.total)
    assert reward.max_length == 40
    assert not any(p.requires_grad for p in reward.ensemble.parameters())  # type: ignore[union-attr]


def test_an_ensemble_on_another_tokenizer(folder: str, tmp_path: Path) -> None:
    from fastalign.data.tokenizer import train_tokenizer

    train_tokenizer(["other words"], 280).save_pretrained(tmp_path / "other")
    for name in ("config.json", "model.safetensors", "heads.safetensors", "reward_ensemble.json"):
        (tmp_path / "other" / name).write_bytes((Path(folder) / name).read_bytes())
    with pytest.raises(UserError, match="have different tokenizers"):
        source(str(tmp_path / "other"))


@pytest.mark.parametrize("option", [{"statistic": "min"}, {"coef": 0.5}])
def test_a_statistic_of_nothing(folder: str, file: Callable[[str], str], option: dict) -> None:
    path = file("def f(prompts, responses):\n    return [0.0] * len(prompts)\n")
    with pytest.raises(RunError, match="--statistic and --coef are a reward ensemble's, and"):
        source(f"{path}:f", **option)
    assert source(f"{folder},{path}:f", statistic="lcb", coef=0.5).label == "lcb + mine.f"


def test_a_coefficient_of_nothing(folder: str) -> None:
    with pytest.raises(RunError, match="--coef is for lcb and uwo; the statistic is min"):
        source(folder, statistic="min", coef=0.5)


# --- functions and sums ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        "[len(r) for r in responses]",
        "tuple(float(len(r)) for r in responses)",
        "np.array([1, 2])",
        "np.array([1.0, 2.0], dtype=np.float32)",
        "list(np.array([1.0, 2.0]))",
        "torch.tensor([1, 2])",
        "torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)",
        "[torch.tensor(1.0), torch.tensor([2.0])]",
        "[True, 1 + (prompts == ['say a', 'say bc'])]",
    ],
)
def test_what_a_function_may_return(of_two: Callable, expression: str) -> None:
    found = of_two(f"return {expression}")
    assert found.total.tolist() == [1.0, 2.0] and found.total.dtype == torch.float32
    assert found.scores is None
    assert {name: part.tolist() for name, part in found.parts.items()} == {"mine.f": [1.0, 2.0]}


def test_a_weighted_sum(folder: str, file: Callable) -> None:
    path = file(
        "def up(p, r):\n    r.sort()\n    return [1] * len(r)\n"
        "def zero(p, r): return len(r) * [0]\n"
    )
    some, texts = rollouts(), list("fedcba")
    alone = source(folder).score(some, texts, texts)
    reward = source(f"2*{folder}, -0.5 * {path}:up,{path}:zero")
    found = reward.score(some, texts, texts)
    assert texts == list("fedcba")  # a function that sorts its list sorts its own
    torch.testing.assert_close(found.total, 2 * alone.total - 0.5, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.scores, alone.scores)  # type: ignore[arg-type]
    assert list(found.parts) == ["ensemble", "mine.up", "mine.zero"]
    assert found.parts["mine.up"].tolist() == [1.0] * 6
    assert reward.label == "2 mean + -0.5 mine.up + mine.zero"


def test_what_a_report_says_of_it(folder: str, file: Callable) -> None:
    path = file("def f(p, r): return [0.0] * len(r)\n")
    reward = source(f"{folder},0.5*{path}:f", statistic="lcb")
    was = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    file("def f(p, r): return 'edited meanwhile'\n")
    heads = hashlib.sha256((Path(folder) / "heads.safetensors").read_bytes()).hexdigest()
    assert json.loads(json.dumps(reward.describe())) == {
        "proxy": "lcb + 0.5 mine.f",
        "reward": [
            {
                "name": "ensemble",
                "weight": 1.0,
                "path": folder,
                "statistic": "lcb",
                "coef": 0.5,
                "n_heads": 3,
                "n_models": 1,
                "n_parameters": sum(p.numel() for p in RewardEnsemble.load(folder).parameters()),
                "sha256": heads,
            },
            {"name": "mine.f", "weight": 0.5, "path": path, "sha256": was},
        ],
    }


def test_a_function_alone_reads_any_length(file: Callable) -> None:
    path = file("def f(p, r): return [0.0] * len(r)\n")
    assert source(f"{path}:f").max_length == 1 << 30
    assert source(f"{path}:f").score([], [], []).total.shape == (0,)


def test_the_file_takes_no_module_s_name(file: Callable) -> None:
    """One named as a module that is there leaves it alone; dataclasses in it work."""
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Rule:\n    weight: float = 3.0\n"
        "def f(prompts, responses): return [Rule().weight for _ in responses]\n"
    )
    path, before = file(text, "colorsys.py"), sys.path.copy()
    found = source(f"{path}:f").score(TWO, PROMPTS, RESPONSES)
    assert found.total.tolist() == [3.0, 3.0] and "colorsys.f" in found.parts
    import colorsys

    assert colorsys.rgb_to_hsv(0.0, 0.0, 1.0) == (2 / 3, 1.0, 1.0) and sys.path == before


def test_two_files_of_one_name(file: Callable, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    first = file("def f(p, r): return [1.0] * len(r)\n")
    second = file("def g(p, r): return [2.0] * len(r)\n", "sub/mine.py")
    found = source(f"{first}:f,{second}:g").score(TWO, PROMPTS, RESPONSES)
    assert found.total.tolist() == [3.0, 3.0]


# --- what is refused at the door ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("", "expected a folder or FILE.py:FUNCTION, got nothing"),
        ("a,,b.py:f", "expected a folder or FILE.py:FUNCTION, got nothing"),
        ("mine.py", "expected the name of a function too, as in mine.py:reward"),
        ("much*mine.py:f", "--reward much*mine.py:f: expected a number before the *, got much"),
        ("nan*mine.py:f", "expected a number before the *, got nan"),
        ("one,two", "expected at most one reward ensemble; the heads of several models"),
        ("one+one", "--reward one+one: expected different folders with a + between them"),
        ("one+", "--reward one+: expected different folders"),
        ("a/mine.py:f,2*b/mine.py:f", "mine.f is there more than once"),
    ],
)
def test_entries_that_make_no_sense(reward: str, message: str) -> None:
    with pytest.raises(RunError) as caught:
        parse_reward(reward)
    assert message in str(caught.value)


def test_a_folder_may_have_a_comma_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    assert [entry.path for entry in parse_reward(str(tmp_path / "a,b"))] == [str(tmp_path / "a,b")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef g(p, r): pass\n", "has no function f; it has g"),
        ("f = 3\n", "has no function f; it has none"),
        ("import there_is_none\n", "fails: ModuleNotFoundError in line 1: No module named"),
        ("\ndef f(:\n", "fails: SyntaxError in line 2: "),
        ("def f(p, r): return 1 / 0\n\nf(1, 2)\n", "fails: ZeroDivisionError in line 1: division"),
    ],
)
def test_a_file_without_the_function(file: Callable, text: str, message: str) -> None:
    path, before = file(text), set(sys.modules)
    with pytest.raises(RunError) as caught:
        source(f"{path}:f")
    assert message in str(caught.value) and f"--reward {path}:f" in str(caught.value)
    left = [n for n in set(sys.modules) - before if n == "mine" or n.startswith("_fastalign")]
    assert len(left) == ("has no function" in message)  # nothing stays of a file that fails


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="mine.py: No such file or directory"):
        source(f"{tmp_path}/mine.py:f")
    with pytest.raises(UserError, match="no reward ensemble at"):
        source(f"{tmp_path}/none")


# --- what a function gets wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "returned 1 numbers for 2 responses"),
        ("return np.zeros((3,))", "returned 3 numbers for 2 responses"),
        ("pass", "returned None; expected a list of 2 numbers"),
        ("return 1.0", "returned a float (1.0); expected a list of 2 numbers"),
        ("return torch.tensor(1.0)", "returned a float (1.0); expected a list of 2 numbers"),
        ("return '12'", "returned a str ('12'); expected a list of 2 numbers"),
        ("return {1: 1.0, 2: 2.0}", "returned a dict ({1: 1.0, 2: 2.0}); expected a list"),
        ("return (1.0 for r in responses)", "returned a generator ("),
        (
            "return [1.0, 'good']",
            "returned a str ('good') for response 2 of 2, 'bc'; expected a number",
        ),
        ("return [None, 1.0]", "returned None for response 1 of 2, 'a'; expected a number"),
        ("return np.zeros((2, 1))", "returned a list ([0.0]) for response 1 of 2, 'a'"),
        (
            "return [0.0, float('nan')]",
            "gave nan for response 2 of 2: 'bc', the answer to 'say bc'",
        ),
        (
            "return [float('-inf'), 0.0]",
            "gave -inf for response 1 of 2: 'a', the answer to 'say a'",
        ),
        ("return [0.0, 1e300]", "gave 1e+300 for response 2 of 2: 'bc'"),  # not in float32
        ("return [responses[2], 1]", "raised IndexError in line 4: list index out of range"),
        ("raise KeyError", "raised KeyError in line 4"),
    ],
)
def test_a_function_that_gives_something_else(
    of_two: Callable, tmp_path: Path, body: str, message: str
) -> None:
    with pytest.raises(Stopped) as caught:
        of_two(body)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"the reward function {tmp_path}/mine.py:f ")
    assert "\n" not in str(caught.value)


def test_the_exception_of_a_function_is_kept(of_two: Callable) -> None:
    with pytest.raises(Stopped) as caught:
        of_two("raise RuntimeError('its own\\nwords')")
    cause = caught.value.__cause__
    assert isinstance(cause, RuntimeError) and cause.__traceback__ is not None
    assert cause.__traceback__.tb_next is not None  # the frame in the user's file


def test_long_texts_are_cut_in_messages(file: Callable) -> None:
    path = file("def f(p, r): return [float('nan')]\n")
    with pytest.raises(Stopped) as caught:
        source(f"{path}:f").score(TWO[:1], ["q" * 500], ["x" * 500])
    assert len(str(caught.value)) < 300 and "x..." in str(caught.value)


def test_an_ensemble_of_broken_weights(folder: str) -> None:
    reward = source(folder)
    assert isinstance(reward.ensemble, RewardEnsemble)
    reward.ensemble.weight.data[1, 0] = float("nan")
    with pytest.raises(Stopped, match="the reward ensemble .* gave nan for response 1 of 6: 'r'"):
        reward.score(rollouts(), ["p"] * 6, ["r"] * 6)


def test_texts_that_do_not_match_the_rollouts(folder: str) -> None:
    with pytest.raises(ValueError, match="expected 6 prompts and responses, .* got 6 and 5"):
        source(folder).score(rollouts(), ["p"] * 6, ["r"] * 5)
