"""benchmarks/bench_theory.py at tiny sizes: every row is there and checked; checks can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_theory
from fastalign import theory


def run(out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[dict[str, Any]]]:
    arguments = ["--shapes", "12x1100x400", "--repeats", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["benchmarks/bench_theory.py", *arguments])
    return bench_theory.main(), json.loads(out.read_text())["rows"]


def test_every_row_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, rows = run(tmp_path / "result.json", monkeypatch)
    assert status == 0
    assert [(row["task"], row["N"]) for row in rows] == [
        ("types", 12),
        ("curve", 1100),
        ("curve", 1100),
        ("curve", 1100),
        ("frontier", 400),
    ]
    for row in rows:
        assert row["agrees"] and row["error"] < 1e-9 and row["ms"] > 0
        own = row["of"] == "fastalign"
        assert (row["goal ms"] is None) == (row["in time"] is None) == (not own)
        assert row["rounds"] == (2 if own else 1)


def test_a_wrong_curve_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = theory.best_of_n_curve
    monkeypatch.setattr(theory, "best_of_n_curve", lambda gold, proxy: right(gold, proxy) + 1e-8)
    status, rows = run(tmp_path / "result.json", monkeypatch)
    assert status == 1 and [row["agrees"] for row in rows] == [True, False, True, True, True]


def test_integer_weights() -> None:
    """N = 5, n = 3: (0, 0, .1, .3, .6) on (5, 1, 4, 2, 3) is 2.8."""
    assert bench_theory.integer_weights([5, 1, 4, 2, 3], [1, 3, 5]) == [3.0, 2.8, 3.0]
    plain = bench_theory.log_gamma_weights(
        torch.tensor([5.0, 1, 4, 2, 3]).double(), torch.arange(5)
    )
    assert plain.tolist() == pytest.approx([3.0, 2.7, 2.8, 2.8, 3.0], abs=1e-12)
