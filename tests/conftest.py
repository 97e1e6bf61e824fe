"""Shared by all tests: Triton's interpreter where there is no GPU, fixed seeds, what is skipped."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, which must come after this line.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter is NumPy, which warns of every exp that overflows on purpose.
    for module in ("triton.runtime.interpreter", "triton.language.core"):
        config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{module}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
