"""Shared by all tests: Triton's interpreter where there is no GPU, fixed seeds, what is skipped.

FASTALIGN_REQUIRE=cpp,triton (`make test` sets it) makes an absent backend an error, and a skipped
test a failure unless it is marked gpu, data or peers.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, which must come after this line.
    os.environ["TRITON_INTERPRET"] = "1"

REQUIRED = [name for name in os.environ.get("FASTALIGN_REQUIRE", "").split(",") if name]
MAY_BE_SKIPPED = {"gpu", "data", "peers"}


def why_absent(backend: str) -> str | None:
    """Why the backend's tests would be skipped here; None when they run."""
    module = {"cpp": "fastalign._C", "triton": "triton"}.get(backend)
    if module is None:
        return "expected cpp or triton"
    if importlib.util.find_spec(module) is None:
        return f"{module} is not there (pip install --no-build-isolation -e '.[dev]' brings it)"
    return None


def pytest_configure(config: pytest.Config) -> None:
    for name in REQUIRED:
        why = why_absent(name)
        if why is not None:
            raise pytest.UsageError(f"FASTALIGN_REQUIRE names {name}: {why}")
    # The interpreter is NumPy, which warns of every exp that overflows on purpose.
    for module in ("triton.runtime.interpreter", "triton.language.core"):
        config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{module}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def refuse_skip(
    report: pytest.TestReport | pytest.CollectReport, node: pytest.Item | pytest.Collector
) -> None:
    """Turns a skip into a failure when FASTALIGN_REQUIRE is set and no mark allows it."""
    allowed = any(node.get_closest_marker(name) for name in MAY_BE_SKIPPED)
    if REQUIRED and report.skipped and not allowed and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{why}; only tests marked {', '.join(sorted(MAY_BE_SKIPPED))} may skip"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, Any]:
    report = yield
    refuse_skip(report, item)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, Any]:
    report = yield
    refuse_skip(report, collector)
    return report


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@contextmanager
def a_single_thread() -> Iterator[None]:
    """For tiny models: threads have nothing to share, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with a_single_thread():
        yield


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model along the whole road, a few steps of each: the runs sft, reward and apa."""
    folder = tmp_path_factory.mktemp("road")
    with a_single_thread():
        train_road(folder)
    return folder


def train_road(folder: Path) -> None:
    from fastalign.rollout import SamplingConfig
    from fastalign.train import apa, reward, sft

    model = str(folder / "sft" / "model")
    sft.train(
        sft.SFTConfig(
            output=str(folder / "sft"),
            model="scratch:1m",
            vocab_size=300,
            max_length=256,
            limit=60,
            epochs=2,
            batch_tokens=1024,
            eval_limit=8,
        )
    )
    reward.train(
        reward.RewardConfig(
            output=str(folder / "reward"),
            model=model,
            max_length=256,
            heads=3,
            limit=40,
            batch_tokens=2048,
            eval_limit=8,
        )
    )
    apa.train(
        apa.APAConfig(
            output=str(folder / "apa"),
            policy=model,
            reward=str(folder / "reward" / "model"),
            steps=2,
            prompts_per_step=4,
            samples_per_prompt=2,
            eval_limit=4,
            eval_samples=2,
            sampling=SamplingConfig(max_new_tokens=12),
        )
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes records (a str as it stands) as JSON lines; the path."""

    def write(*records: Any, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write
