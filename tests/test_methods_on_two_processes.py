"""What each method learns on two processes is what it learns on one, to rounding.

LoRA too: the reference without the adapter, the sampler with it, and what is saved of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import methods_run
import pytest
from conftest import a_single_thread
from several_processes import found

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
    """Sums in another order: float32's rounding, which AdamW may make a step of where a gradient
    is all but zero."""
    a, b = one[name], two[name]
    assert [(x["step"], x["phase"]) for x in a["metrics"]] == [
        (x["step"], x["phase"]) for x in b["metrics"]
    ]
    assert any(x["phase"] == "train" and x["grad_norm"] > 0 for x in a["metrics"])
    for x, y in zip(a["metrics"], b["metrics"], strict=True):
        assert x.keys() == y.keys()
        for key in x:
            if key.split("/")[0] not in CLOCKS and isinstance(x[key], float):
                close = math.isclose(x[key], y[key], rel_tol=2e-3, abs_tol=2e-5)
                assert close, (key, x[key], y[key])
    assert a["weights"].keys() == b["weights"].keys()
    for key, weight in a["weights"].items():
        apart = (b["weights"][key] - weight).abs()
        assert apart.mean() < 1e-5 and (apart > 1e-3).float().mean() < 1e-3, key
