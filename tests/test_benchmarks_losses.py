"""The benchmarks of the losses: the bytes they state, times that fit them, rivals that agree."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_policy_loss
from benchmarks.bench_policy_loss import CASES, LIGER, batch, loss_of
from benchmarks.peers import load

# Of each number of tokens n, on a CPU: one float32 each of the inputs, a mask of a byte; gradients
# are written once.
POLICY = {
    "PPO, KL, entropy": lambda n: n * (5 * 4 + 1 + 2 * 4),
    "actor-critic": lambda n: n * (8 * 4 + 1 + 3 * 4),
    "GRPO (dapo), KL": lambda n: n * (4 * 4 + 1 + 4),
    "APA": lambda n: n * (3 * 4 + 1 + 4),
}


def rows_of(
    name: str, shapes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    out = tmp_path / f"{name}.json"
    more = ["--repeats", "2", "--without", "compile", "Liger", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [f"benchmarks/{name}.py", "--shapes", *shapes, *more])
    importlib.import_module(f"benchmarks.{name}").main()
    return json.loads(out.read_text())["rows"]


def check(rows: list[dict[str, Any]], unit: str, size: str, ceiling: str) -> None:
    """Each row's numbers follow from its time, its bytes and the rows of its case."""
    scale = {"ms": 1e-3, "us": 1e-6}[unit]
    results = (unit, f"q1 {unit}", f"q3 {unit}", "GB/s", ceiling, "this / fastalign", "error")
    cases: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(value for name, value in row.items() if name not in (*results, "what"))
        cases.setdefault(key, []).append(row)
    for case in cases.values():
        times = {row["what"]: row[unit] for row in case}
        assert len(times) == len(case) >= 3
        for row in case:
            assert row[f"q1 {unit}"] <= row[unit] <= row[f"q3 {unit}"] and row["rounds"] == 2
            assert row["GB/s"] == pytest.approx(row[size] * 1e6 / (row[unit] * scale) / 1e9)
            assert row[ceiling] == pytest.approx(times["copy (ceiling)"] / row[unit])
            assert row["this / fastalign"] == pytest.approx(row[unit] / times["fastalign"])


def test_policy_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("bench_policy_loss", ["128", "192"], tmp_path, monkeypatch)
    check(rows, "ms", "MB", "of copy speed")
    cases = {(row["case"], row["tokens"]) for row in rows}
    assert cases == {(case, n) for case in POLICY for n in (128, 192)} and set(CASES) == set(POLICY)
    for row in rows:
        assert row["MB"] * 1e6 == pytest.approx(POLICY[row["case"]](row["tokens"]))
        assert ("error" in row) and (row["error"] is None or row["error"] < 1e-5)
    assert {"empty function (floor)", "eager and statistics"} <= {row["what"] for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_policy_loss_and_its_rivals_have_the_same_gradients(case: str) -> None:
    fused, plain, leaves, _ = CASES[case]
    found = []
    for f in (fused, *plain.values()):
        b = batch(128, "cpu")
        given = b | {name: b[name].requires_grad_() for name in leaves}
        found.append(torch.autograd.grad(loss_of(f(given)), [given[name] for name in leaves]))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_the_floor_computes_nothing() -> None:
    b = batch(128, "cpu")
    with torch.profiler.profile() as profile:
        bench_policy_loss.with_backward(bench_policy_loss.empty(b, ("logp",)), b, ("logp",))()
    ran = {event.name for event in profile.events() if event.name.startswith("aten::")}
    assert ran & {"aten::mul", "aten::add", "aten::sum", "aten::sub"} == set()


@pytest.mark.peers
def test_ligers_loss_on_log_probs_is_the_same() -> None:
    pytest.importorskip("liger_kernel")
    (rival,), absent = load([LIGER], "cpu")
    assert absent == {}
    found = []
    for f in (bench_policy_loss.fused_grpo, rival.function):
        b = batch(256, "cpu")
        loss = loss_of(f(b | {"logp": b["logp"].requires_grad_()}))
        found.append((loss.detach(), torch.autograd.grad(loss, b["logp"])[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kl_estimate(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        rows = rows_of("bench_kl_estimate", ["100", "--dtype", dtype], tmp_path, patch)
    check(rows, "us", "minimal MB", "of copy speed")
    narrow = 4 if dtype == "float32" else 2
    for row in rows:
        moved = 2 * narrow + 4
        if row["pass"] == "both" and row["kind"] != "k1":
            moved += 2 * narrow + 4 + narrow
        assert row["minimal MB"] * 1e6 == pytest.approx(100 * moved)
    assert {(row["kind"], row["pass"]) for row in rows} == {
        (kind, what) for kind in ("k1", "k2", "k3") for what in ("forward", "both")
    }


def test_bradley_terry_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("bench_bradley_terry_loss", ["16x3"], tmp_path, monkeypatch)
    check(rows, "us", "minimal MB", "of ceiling")
    for row in rows:  # two scores, the gap's slope; that again, two gradients; the counts
        moved = {"forward": 12, "both": 24}[row["pass"]] + 8 * (row["pairs"] == "bootstrap")
        assert row["minimal MB"] * 1e6 == pytest.approx(16 * 3 * moved)
    assert {(row["pairs"], row["pass"]) for row in rows} == {
        (pairs, what) for pairs in ("all", "bootstrap") for what in ("forward", "both")
    }


def test_token_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("bench_token_rewards", ["4x32"], tmp_path, monkeypatch)
    check(rows, "us", "minimal MB", "of copy speed")
    for row in rows:  # log-probs, a mask, rewards
        moved = (3 if row["task"] == "RTO" else 2) * 4 + 1 + 4
        assert row["minimal MB"] * 1e6 == pytest.approx(4 * 32 * moved)
    assert {row["task"] for row in rows} == {"PPO, k1", "PPO, k3", "RTO"}


def test_preference_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("bench_preference_loss", ["3x16"], tmp_path, monkeypatch)
    check(rows, "us", "minimal MB", "of ceiling")
    for row in rows:  # log-probs of both models; their gradient
        moved = 8 if row["pass"] == "forward" else 12
        assert row["minimal MB"] * 1e6 == pytest.approx(row["tokens"] * moved)
        assert row["error"] is None or row["error"] < 1e-5
    assert {"padded", "packed", "padded, loss only"} <= {row["what"] for row in rows}
