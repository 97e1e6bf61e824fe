"""The benchmarks: they run at tiny shapes, judge every candidate, measure memory, hide nothing."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_linear_logprobs, bench_linear_loss, head, peers, timing
from benchmarks import bench_token_logprobs as bench_token
from benchmarks.all import names, run_all
from benchmarks.plot import draw, over_ours, plot
from benchmarks.table import markdown

MIB = 2**20
# Libraries and torch.compile are left out where their speed is not the point: seconds each.
OTHERS = ["compile", "TRL", "Liger", "CCE", "chunked"]
HEADS = {"bench_linear_loss": bench_linear_loss, "bench_linear_logprobs": bench_linear_logprobs}
TASKS = {
    "bench_linear_loss": set(bench_linear_loss.TASKS),
    "bench_linear_logprobs": {"logp", "logp + entropy"},
    "bench_token_logprobs": {"logp", "logp + entropy"},
}


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", [f"benchmarks/{name}.py", *arguments])
    return importlib.import_module(f"benchmarks.{name}").main()


@pytest.mark.parametrize("name", TASKS)
def test_runs_and_judges_every_candidate(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = ["16x96", "8x33"] if name == "bench_token_logprobs" else ["16x8x96", "8x8x33"]
    out = tmp_path / "new" / "result.json"
    arguments = ["--shapes", *shapes, "--repeats", "2", "--without", *OTHERS, "--out", str(out)]
    assert run(name, monkeypatch, *arguments) == 0
    data = json.loads(out.read_text())
    assert data["notes"]["failed"] == {}
    assert data["notes"]["absent"][
        "TRL chunked" if "linear" in name else "TRL selective_log_softmax"
    ]
    assert {row["V"] for row in data["rows"]} == {96, 33}
    judged = [row for row in data["rows"] if row["of"] != "ceiling"]
    assert {row["task"] for row in judged if row["of"] == "fastalign"} == TASKS[name]
    assert {row["task"] for row in judged if row["of"] == "torch"} == TASKS[name]
    assert {row["pass"] for row in judged} == {"forward", "forward+backward"}
    ratio = data["ratio"]
    for row in data["rows"]:
        assert row["q1 ms"] <= row["ms"] <= row["q3 ms"] and row["rounds"] == 2
        assert row[ratio] == pytest.approx(1 / row["of ceiling"])
        if row["of"] == "ceiling":
            assert row[ratio] == 1.0
        if "minimal MB" in row:  # read; and with the backward pass read again and written
            passes = {"forward": 1, "forward+backward": 3}[row["pass"]]
            assert row["minimal MB"] == pytest.approx(passes * 4 * row["N"] * row["V"] / 1e6)
    for row in judged:
        assert row["agrees"] and max(row["error"], row["gradient error"]) < 1e-5, row
        own = [r for r in judged if r["of"] == "fastalign" and r["V"] == row["V"]]
        own = [r for r in own if (r["task"], r["pass"]) == (row["task"], row["pass"])]
        if own:
            assert row["x fastalign"] == pytest.approx(row["ms"] / own[0]["ms"])
    facts = data["machine"]
    assert facts["versions"]["torch"] == torch.__version__ and facts["cores"] >= 1
    assert facts["command"].startswith(f"python -m benchmarks.{name} --shapes {shapes[0]}")
    assert ratio in out.with_suffix(".svg").read_text()


def test_flops_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    arguments = ["--shapes", "16x8x96", "--repeats", "1", "--without", *OTHERS, "--out", str(out)]
    run("bench_linear_logprobs", monkeypatch, *arguments)
    for row in json.loads(out.read_text())["rows"]:
        products = {"forward": 1, "forward+backward": 3}[row["pass"]]
        work = row["TFLOP/s"] * 1e12 * row["ms"] / 1e3
        assert work == pytest.approx(products * 2 * 16 * 8 * 96)


def scaled(factor: float) -> Callable[..., tuple[Tensor, ...]]:
    def f(hidden: Tensor, weight: Tensor, problem: head.Problem) -> tuple[Tensor, ...]:
        return (factor * peers.cross_entropy(hidden, weight, problem.targets),)

    return f


def test_what_computes_something_else_is_shown_as_wrong() -> None:
    truth = head.Candidate("MLE", "truth", "torch", scaled(1.0))
    right = head.Candidate("MLE", "right", "torch", scaled(1.0))
    wrong = head.Candidate("MLE", "wrong", "torch", scaled(1.001))
    options = timing.arguments("").parse_args(["--repeats", "1"])
    rows, failures = head.bench((16, 8, 96), [right, wrong], {"MLE": truth}, options)
    assert failures == {}
    agrees = {row["what"]: row["agrees"] for row in rows if row["of"] != "ceiling"}
    assert agrees == {"right": True, "wrong": False}
    errors = [row["gradient error"] for row in rows if row["what"] == "wrong"]
    assert errors == [pytest.approx(1e-3, rel=1e-2)] * 2


def test_a_wrong_gradient_alone_is_shown_as_wrong() -> None:
    def f(hidden: Tensor, weight: Tensor, problem: head.Problem) -> tuple[Tensor, ...]:
        loss = peers.cross_entropy(hidden, weight, problem.targets)
        return (2.0 * loss - loss.detach(),)

    truth = head.Candidate("MLE", "truth", "torch", scaled(1.0))
    candidate = head.Candidate("MLE", "doubled gradient", "torch", f)
    options = timing.arguments("").parse_args(["--repeats", "1"])
    rows, _ = head.bench((16, 8, 96), [candidate], {"MLE": truth}, options)
    for row in (row for row in rows if row["of"] == "torch"):
        assert row["error"] < 1e-5 and not row["agrees"]
        assert row["gradient error"] == pytest.approx(1.0, rel=1e-3)


def test_the_dpo_task_compares_the_sequences_of_each_pair() -> None:
    problem = head.make_problem(32, 8, 96, torch.float32, "cpu")
    assert problem.sequences == 4
    logp, _ = peers.naive(problem.hidden, problem.weight, problem.targets)
    of_sequence = [part.sum() for part in logp.split(8)]
    margins = torch.stack([of_sequence[0] - of_sequence[1], of_sequence[2] - of_sequence[3]])
    expected = -torch.log(torch.sigmoid(peers.BETA * margins)).mean()
    (got,) = bench_linear_loss.own("DPO").f(problem.hidden, problem.weight, problem)
    torch.testing.assert_close(got, expected)


def test_nan_is_not_agreement() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert head.distance([nan], [torch.ones(2).double()]) == float("inf")


def broken(hidden: Tensor, weight: Tensor, problem: head.Problem) -> tuple[Tensor, ...]:
    raise RuntimeError("no such\nkernel")


def breaks_when_large(hidden: Tensor, weight: Tensor, problem: head.Problem) -> tuple[Tensor, ...]:
    if len(hidden) == 16:
        raise MemoryError("too large")
    return scaled(1.0)(hidden, weight, problem)


@pytest.mark.parametrize("package, status", [("trl", 0), ("fastalign", 1)])
def test_a_failing_candidate_is_reported_and_the_others_go_on(
    package: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = head.Candidate("MLE", "truth", "torch", scaled(1.0))
    candidates = [
        head.Candidate("MLE", "broken", package, broken),
        head.Candidate("MLE", "large", "torch", breaks_when_large),
        truth,
    ]
    options = timing.arguments("").parse_args(["--repeats", "1"])
    rows, failures = head.bench((16, 8, 96), candidates, {"MLE": truth}, options)
    assert failures[f"judged | MLE | {package}: broken"] == "RuntimeError: no such kernel"
    assert failures["forward | MLE | torch: large"] == "MemoryError: too large"
    assert [row["what"] for row in rows if row["of"] == "torch"] == ["truth", "truth"]
    assert "FAILED at 16x8x96" in capsys.readouterr().out
    assert head.status(failures) == status


def test_absent_libraries_are_named() -> None:
    def missing() -> Callable[..., Any]:
        return importlib.import_module("no_such_library").f

    found, absent = peers.load(
        [
            peers.Peer("here", "torch", lambda: peers.naive),
            peers.Peer("gone", "no-such-library", missing),
            peers.Peer("elsewhere", "torch", missing, devices=("cuda",)),
            peers.Peer("Unwanted thing", "torch", missing),
        ],
        "cpu",
        without=["unwanted"],
    )
    assert [(loaded.peer.name, loaded.function) for loaded in found] == [("here", peers.naive)]
    assert absent == {
        "gone": "not installed: no module no_such_library",
        "elsewhere": "runs on cuda only",
        "Unwanted thing": "left out by --without",
    }


def test_rounds_are_interleaved_and_bounded() -> None:
    """Each round calls each candidate, twice in turn on a CPU, in an order of its own."""
    calls: list[str] = []
    runs = {name: partial(calls.append, name) for name in "abc"}
    taken = timing.timings(runs, "cpu", 5)
    rounds = ["".join(calls[i : i + 6]) for i in range(0, len(calls), 6)]
    orders = [once[::2] for once in rounds]
    assert len(rounds) == taken["a"].rounds == 5
    assert all(once[::2] == once[1::2] and sorted(once[::2]) == list("abc") for once in rounds)
    assert len({*orders}) > 1
    calls.clear()
    assert timing.timings(runs, "cpu", 5, limit=0.0)["b"].rounds == timing.LEAST_ROUNDS
    assert len(calls) == 6 * timing.LEAST_ROUNDS


def test_median_and_quartiles() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 100.0]
    assert timing.spread(values) == (4.0, 2.0, 5.0, 5)
    assert timing.spread(values).median == statistics.median(values)
    assert timing.spread([3.0]) == (3.0, 3.0, 3.0, 1)


def alone(code: str) -> list[float]:
    """The numbers that a new process prints: in this one, other tests left free memory about."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


def test_peak_memory_on_cpu() -> None:
    """Also of what malloc would rather keep than give back, and of what the thread has kept."""
    found = alone(
        """
        import torch
        from benchmarks.timing import peak_bytes
        for size in (8, 24, 64):
            use = lambda: torch.ones(size << 20, dtype=torch.uint8)
            for _ in range(3):
                use()
                print(peak_bytes(use, "cpu") / 2**20)
        """
    )
    for size, peaks in zip((8, 24, 64), (found[:3], found[3:6], found[6:]), strict=True):
        assert all(size - 0.5 < peak < size + 2.5 for peak in peaks)


def test_loss_head_memory_is_seen() -> None:
    """linear_loss keeps its workspace from call to call; the benchmark counts it all the same."""
    extra = alone(
        """
        import contextlib, sys, torch
        from benchmarks import bench_linear_loss, head, timing
        def plain(h, w, problem):
            return (torch.nn.functional.cross_entropy(h @ w.t(), problem.targets),)
        truth = head.Candidate("MLE", "truth", "torch", plain)
        options = timing.arguments("").parse_args(["--repeats", "1"])
        with contextlib.redirect_stdout(sys.stderr):
            rows, _ = head.bench(
                (256, 8, 20_000), [bench_linear_loss.own("MLE")], {"MLE": truth}, options
            )
        for row in rows:
            if row["of"] == "fastalign":
                print(row["extra MiB"])
        """
    )
    logits = 256 * 20_000 * 4 / MIB
    assert len(extra) == 2 and all(logits - 1 < mib < logits + 8 for mib in extra)


def data_of(device: str) -> dict[str, Any]:
    row = {"N": 4096, "V": 96, "pass": "forward", "task": "MLE", "ms": 123.456}
    rows: list[dict[str, Any]] = [
        row | {"what": "one | two", "of": "trl", "x GEMMs": 7.654, "agrees": False, "error": 0.5},
        row | {"what": "mine", "of": "fastalign", "x GEMMs": 1.056, "agrees": True, "error": 1e-7},
    ]
    machine = {"device": device, "name": "Chip", "threads": 2, "date": "2026-01-02T03:04:05"}
    versions = {"torch": "2.13", "trl": "absent"}
    notes = {"dtype": "float32", "absent": {"X": "not installed"}, "failed": {}}
    return {
        "machine": machine | {"versions": versions},
        "notes": notes,
        "ratio": "x GEMMs",
        "rows": rows,
    }


def test_table_has_no_absolute_times_of_a_cpu() -> None:
    text = markdown(data_of("cpu"), "name").splitlines()
    assert text[2] == "Chip, 2 thread(s), float32; torch 2.13; 2026-01-02."
    assert text[4] == "**N = 4,096, V = 96**"
    assert text[6] == "| pass | task | what | x GEMMs | agrees | error |"
    assert text[8] == "| forward | MLE | one \\| two | 7.65 | no | 5e-01 |"
    assert text[9].startswith("| **forward** | **MLE** | **mine** | **1.06** | **yes** |")
    assert text[-1] == "Not measured: X (not installed)."
    assert "123" not in "\n".join(text)
    assert "| 123 |" in markdown(data_of("cuda"), "name")


def test_a_size_may_be_a_word() -> None:
    row = {"B": 1024, "rows": "gathered", "what": "mine", "of": "fastalign", "ms": 1.0}
    assert "**rows: gathered, B = 1,024**" in markdown(data_of("cpu") | {"rows": [row]}, "heads")


def test_plot_names_every_candidate(tmp_path: Path) -> None:
    plot(data_of("cpu"), tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    for part in ("MLE: mine", "1.06", "7.65   differs from float64", "N = 4,096, V = 96, forward"):
        assert part in text


def test_all_reports_a_failing_benchmark_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "no_such.json").write_text("an old result")
    more = ["--shapes", "8x33", "--repeats", "1", "--without", *OTHERS]
    failures = run_all(["no_such", "bench_token_logprobs"], "cpu", tmp_path, 10.0, more)
    assert failures == {"no_such": "exit status 1"}
    assert not (tmp_path / "no_such.json").exists()
    assert "No module named benchmarks.no_such" in (tmp_path / "no_such.log").read_text()
    data = json.loads((tmp_path / "bench_token_logprobs.json").read_text())
    assert {row["V"] for row in data["rows"]} == {33}
    assert "--minutes" in data["machine"]["command"]


def test_all_stops_in_time(tmp_path: Path) -> None:
    failures = run_all(["bench_gae", "bench_gae"], "cpu", tmp_path, 0.02, [])
    assert failures["bench_gae"] == "not run: no time left"
    assert set(TASKS) | {"bench_gae"} <= set(names())


@pytest.mark.peers
@pytest.mark.parametrize("name", HEADS)
def test_rivals_compute_the_same(name: str) -> None:
    """Else a comparison with them would be of different things."""
    for library in ("trl", "liger_kernel", "cut_cross_entropy"):
        pytest.importorskip(library)
    module = HEADS[name]
    candidates, absent = module.candidates_on("cpu", [])
    assert set(absent.values()) <= {"runs on cuda only"}
    truth = peers.Loaded(peers.Peer("float64", "torch", lambda: peers.naive), peers.naive)
    make = module.on_logp if module is bench_linear_loss else module.rival
    truths = {task: make(task, truth) for task in TASKS[name]}
    errors, failures = head.judge(candidates, truths, torch.float32, "cpu")
    assert failures == {} and set(errors) == set(candidates)
    for candidate, found in errors.items():
        assert max(found.values()) <= 1e-5, (candidate.what, found)
    packages = {candidate.package for candidate in candidates}
    assert {"trl", "liger-kernel"} <= packages


@pytest.mark.peers
def test_rivals_on_logits_compute_the_same() -> None:
    pytest.importorskip("trl")
    candidates, _ = bench_token.candidates_on("cpu", [])
    assert "trl" in {candidate.package for candidate in candidates}
    for candidate in candidates:
        found = bench_token.judge(candidate, torch.float32, "cpu")
        assert max(found.values()) <= 1e-5, (candidate.what, found)


def test_times_over_fastalign(tmp_path: Path) -> None:
    """A panel a shape: 6 us beside 2 us is 3; ceilings, and shapes without fastalign, are not
    drawn."""
    times = {8: {"copy (ceiling)": 1.0, "fastalign": 2.0, "eager": 6.0}, 9: {"eager": 5.0}}
    rows = [{"N": n, "what": what, "us": us} for n, of in times.items() for what, us in of.items()]
    assert over_ours(rows) == {"N 8": [("fastalign", 1.0), ("eager", 3.0)]}
    data = data_of("cpu") | {"ratio": None, "rows": rows}
    assert draw(data, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert all(words in text for words in ("N 8", "eager", "3.00")) and "ceiling" not in text
    assert not draw(data | {"rows": rows[-1:]}, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
