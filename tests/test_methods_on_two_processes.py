"""What each method learns on two processes is what it learns on one, to rounding.

LoRA too: the reference without the adapter, the sampler with it, and what is saved of it.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import methods_run
import pytest
from conftest import a_single_thread
from several_processes import found

from fastalign.train import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

CLOCKS = ("time", "tokens_per_s", "flops_per_s", "utilisation", "memory_gib", "joules")


@pytest.fixture(scope="module")
def folder(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    (folder / "road").symlink_to(road)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    return found("methods", folder, 2)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    with a_single_thread():
        return methods_run.check_methods(folder)


@pytest.mark.parametrize("name", methods_run.RUNS)
def test_one_process_and_two(name: str, one: dict[str, Any], two: dict[str, Any]) -> None:
    same(one[name], two[name])


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Sums in another order: float32's rounding, which AdamW may make a step of where a gradient
    is all but zero."""
    assert [(x["step"], x["phase"]) for x in a["metrics"]] == [
        (x["step"], x["phase"]) for x in b["metrics"]
    ]
    assert any(x["phase"] == "train" and x["grad_norm"] > 0 for x in a["metrics"])
    for x, y in zip(a["metrics"], b["metrics"], strict=True):
        assert x.keys() == y.keys()
        for key in x:
            if key.split("/")[0] not in CLOCKS and isinstance(x[key], float):
                # A prompt that two processes share is computed by both.
                near = 0.1 if key == "flops" else 2e-3
                close = math.isclose(x[key], y[key], rel_tol=near, abs_tol=2e-5)
                assert close, (key, x[key], y[key])
    assert a["weights"].keys() == b["weights"].keys()
    for key, weight in a["weights"].items():
        apart = (b["weights"][key] - weight).abs()
        assert apart.mean() < 1e-5 and (apart > 1e-3).float().mean() < 1e-3, key


def test_what_samples_are_worth(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Before and after, each process sampling for its share of the prompts: `same` compares the
    numbers, which here are those of a policy that moved."""
    for one_run in (one["mle"], two["mle"]):
        before, after = (x for x in one_run["metrics"] if "reward/gold" in x)
        assert before["n"] == after["n"] == 8
        assert before["kl/k1"] == pytest.approx(0.0, abs=1e-5)
        assert abs(after["kl/k1"]) > 1e-3


def test_an_adapter_of_two_processes_goes_on_with_one(
    folder: Path, one: dict[str, Any], two: dict[str, Any], tmp_path: Path
) -> None:
    """Its checkpoint holds the adapter, its moments and a fingerprint of the base."""
    assert two["lora-sft"]["weights"]
    shutil.copytree(folder / "lora-sft-2", tmp_path / "run")
    older, newer = checkpoint.found(tmp_path / "run" / "checkpoints")
    assert len(list(newer.glob("shard-*"))) == 2
    names = checkpoint.load(newer).shapes().keys()
    assert {n for n in names if "lora_" not in n} == {"policy.model.base_fingerprint"}
    shutil.rmtree(newer)
    shutil.rmtree(tmp_path / "run" / "model")
    options = {"resume": "auto"}
    same(one["lora-sft"], methods_run.run("lora-sft", folder / "road", tmp_path / "run", **options))


def test_an_engine_gets_the_merged_weights(two: dict[str, Any]) -> None:
    before, after = two["merged"]["before"], two["merged"]["after"]
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert (after[name] - weight).abs().max() < 1e-6, name
