"""`fastalign frontier`: numbers by hand, runs on it, what it refuses, its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import fastalign

from fastalign.commands import frontier as command
from fastalign.commands.frontier import read_samples
from fastalign.theory import for_kl_budget
from fastalign.theory import frontier as frontier_at

pytestmark = pytest.mark.usefixtures("one_thread")

# In the base's proportions: prompt a has rewards 0 and 1, half each; b 0 (three quarters) and 2.
TWO_PROMPTS = [("a", 0.0, 20), ("a", 1.0, 20), ("b", 0.0, 30), ("b", 2.0, 10)]


def scored(path: Path, rows: list[tuple[str, float, int]] = TWO_PROMPTS, **more: Any) -> Path:
    lines = [
        {"prompt": prompt, "completion": "x", "reward": reward, **more}
        for prompt, reward, times in rows
        for _ in range(times)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def entropy_term(p: torch.Tensor, base: float) -> torch.Tensor:
    """KL of (p, 1 - p) to (base, 1 - base), where 0 log 0 is 0."""
    return torch.special.xlogy(p, p / base) + torch.special.xlogy(1 - p, (1 - p) / (1 - base))


def evaluation(kl: float, reward: float, before: float = 0.5, error: float = 0.01) -> dict:
    """What `evaluate` writes, as far as it is read here."""
    sides = {
        side: {
            "reward/proxy": r,
            "reward/proxy_stderr": error,
            "reward/gold": r + 1,
            "reward/gold_stderr": error,
            "kl/k1": k + 9.0,  # noisier than the exact one, which counts
            "kl/exact": k,
            "kl/exact_stderr": error,
        }
        for side, r, k in (("before", before, 0.0), ("after", reward, kl))
    }
    return {**sides, "names": {"before": "base", "after": "mine"}}


def run_folder(path: Path, **numbers: Any) -> Path:
    path.mkdir(parents=True)
    (path / "evaluation.json").write_text(json.dumps(evaluation(**numbers)))
    return path


def computed(tmp_path: Path, capsys: Any, *more: Any) -> tuple[dict[str, Any], str]:
    out = tmp_path / "out"
    argv = ["frontier", "--samples", scored(tmp_path / "scored.jsonl"), "--output", out, *more]
    status, printed, err = fastalign(capsys, *argv)
    assert status == 0, err

    def no_constant(word: str) -> None:
        pytest.fail(f"{word} in JSON")

    return json.loads((out / "frontier.json").read_text(), parse_constant=no_constant), printed


def test_two_prompts_are_exact_by_enumeration(tmp_path: Path, capsys: Any) -> None:
    """A policy is (P(1 | a), P(2 | b)): of all on a grid that keep within a mean KL, the one with
    the highest mean reward is the frontier's. One alpha for both prompts, not one KL."""
    found, _ = computed(tmp_path, capsys, "--kl", "0.1,0.4")
    assert (found["prompts"], found["samples"]) == (2, 40)
    p, q = torch.meshgrid(*[torch.linspace(0, 1, 801, dtype=torch.float64)] * 2, indexing="ij")
    kl = 0.5 * (entropy_term(p, 0.5) + entropy_term(q, 0.25))
    reward = 0.5 * (p + 2 * q)
    for budget in found["budgets"]:
        best = float(reward[kl <= budget["kl"]].max())
        assert budget["reward"] == pytest.approx(best, abs=2e-3)
        assert budget["reward"] >= best
        a = budget["alpha"]
        at = 0.5 * (math.exp(a) / (1 + math.exp(a)) + 2 * math.exp(2 * a) / (3 + math.exp(2 * a)))
        assert budget["reward"] == pytest.approx(at, abs=1e-12)
        assert budget["beta"] == pytest.approx(1 / a)
        # The trade-offs differ: at one KL each, the mean reward would be lower.
        assert budget["n"] == {0.1: 1, 0.4: 2}[budget["kl"]]
    # 20 and 10 answers share the highest rewards: the curve goes on to 99 % of the largest KL.
    assert found["end"]["is_saturated"]
    largest = 0.5 * (math.log(2) + math.log(4))
    assert found["end"]["kl"] == pytest.approx(0.99 * largest, rel=1e-6)
    assert found["curve"]["reward"][0] == pytest.approx(0.5, abs=1e-12)
    best = found["best_of_n"]
    assert best["n"] == [1, 2, 4, 8, 16, 32]
    # A reward's share goes from s to 1 - (1 - s)^2: KL of (3/4, 1/4) to a half each, and of
    # (7/16, 9/16) to (1/4, 3/4). The bound, 0.193, knows nothing of ties.
    by_ties = 0.5 * sum(entropy_term(torch.tensor(p), s) for p, s in ((0.75, 0.5), (0.4375, 0.25)))
    assert best["kl_estimate"][1] == pytest.approx(float(by_ties), abs=1e-6)
    assert best["kl_estimate"][5] == pytest.approx(largest, abs=1e-3)
    # Two of forty: both are not 1 with 20 * 19 / (40 * 39); not 2 with 30 * 29 / (40 * 39).
    by_hand = 0.5 * ((1 - 380 / 1560) + 2 * (1 - 870 / 1560))
    assert best["reward"][1] == pytest.approx(by_hand, abs=1e-12)


def test_rewards_keep_all_their_digits(tmp_path: Path, capsys: Any) -> None:
    """10^9 + k: in single precision all of them would be the same."""
    samples = scored(tmp_path / "s.jsonl", [("a", 1e9 + k, 1) for k in range(20)])
    assert fastalign(capsys, "frontier", "--samples", samples, "--output", tmp_path / "out")[0] == 0
    found = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert found["curve"]["reward"][0] == pytest.approx(1e9 + 9.5, abs=1e-4)
    assert "kl_estimate" not in found["best_of_n"]  # nothing ties


def test_a_run_s_regret_is_known(tmp_path: Path, capsys: Any) -> None:
    """At alpha 0.8 KL and reward are known; a run that has 0.1 less misses 0.1."""
    a, b = math.exp(0.8), math.exp(1.6)
    p, q = a / (1 + a), b / (3 + b)
    kl = 0.5 * (0.8 * p - math.log((1 + a) / 2) + 0.8 * 2 * q - math.log((3 + b) / 4))
    run = run_folder(tmp_path / "runs" / "one", kl=kl, reward=0.5 * (p + 2 * q) - 0.1)
    run_folder(tmp_path / "runs" / "two", kl=0.0, reward=0.25)
    found, printed = computed(tmp_path, capsys, "--runs", tmp_path / "runs")
    one, two = found["runs"]
    assert (one["name"], two["name"]) == ("mine", "mine (two)")
    assert one["regret"] == pytest.approx(0.1, abs=1e-3) and one["kl_by"] == "kl/exact"
    at = for_kl_budget(torch.tensor([[0.0, 1.0] * 20, [0.0, 0.0, 0.0, 2.0] * 10]), kl)
    expected = math.sqrt(at.reward_se**2 + (0.01 / 0.8) ** 2 + 0.01**2)
    assert one["regret_se"] == pytest.approx(expected, rel=0.02)
    assert two["regret"] == pytest.approx(0.25, abs=1e-12)  # without KL: what the base has more
    row = next(line.split() for line in printed.splitlines() if line.startswith(" mine "))
    assert row[-3:-1] == ["0.10", "±"]
    (alone,), _ = (
        command.read_runs(str(run / "evaluation.json")).items(),
        command.read_runs(f"{run}, {tmp_path / 'runs' / 'two'}"),
    )
    assert alone[0] == "mine"


def test_past_the_end_best_of_n_bounds_the_regret(tmp_path: Path, capsys: Any) -> None:
    """40 rewards 0..39 to each of two prompts: the curve ends where ESS is 10, at a KL that 2 nats
    are past; best of 16 keeps within log 16 - 15/16 = 1.84, best of 32 does not."""
    rows = [(prompt, float(k), 1) for prompt in "ab" for k in range(40)]
    samples = scored(tmp_path / "s.jsonl", rows, logp=-3.0)
    run = run_folder(tmp_path / "run", kl=2.0, reward=30.0, before=19.5)
    argv = ["frontier", "--samples", samples, "--output", tmp_path / "out", "--runs", run]
    status, printed, err = fastalign(capsys, *argv)
    assert status == 0, err
    found = json.loads((tmp_path / "out" / "frontier.json").read_text())
    end = found["end"]
    assert not end["is_saturated"] and end["ess"] == pytest.approx(10) and end["kl"] < 1.39
    assert all(ess >= 9.999 for ess in found["curve"]["ess"])
    assert None not in found["curve"]["reward"]
    (placed,) = found["runs"]
    assert placed["is_past_end"] and placed["regret"] is None
    best = found["best_of_n"]
    assert best["kl_bound"][4] < 2.0 < best["kl_bound"][5]
    assert placed["at_least"] == pytest.approx(best["reward"][4] - 30.0)
    # Of 16 of 0..39 the highest is 41 * 16 / 17 - 1 on average.
    assert best["reward"][4] == pytest.approx(41 * 16 / 17 - 1)
    slope = 1 / found["curve"]["alpha"][-1]
    at_most = found["curve"]["reward"][-1] + slope * (2.0 - end["kl"]) - 30.0
    assert placed["at_most"] == pytest.approx(at_most)
    assert "past end" in printed and "fewer than 10 answers a prompt" in " ".join(printed.split())
    assert 0 < best["kl_estimate"][4] <= best["kl_bound"][4]
    page = (tmp_path / "out" / "frontier.svg").read_text()
    assert "the samples end here" in page and "misses at least" in page


def test_another_base_is_told_by_its_reward(tmp_path: Path, capsys: Any) -> None:
    """The base here has 0.5; a run whose own baseline had 2.5 is not placed."""
    run = run_folder(tmp_path / "run", kl=0.2, reward=2.9, before=2.5)
    found, printed = computed(tmp_path, capsys, "--runs", run)
    (one,) = found["runs"]
    assert set(one) == {"name", "note"} and "another model, other prompts" in one["note"]


def test_a_column_of_gold(tmp_path: Path, capsys: Any) -> None:
    rows = [(prompt, float(k), 1) for prompt in "ab" for k in range(20)]
    path = scored(tmp_path / "s.jsonl", rows)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**r, "gold": -r["reward"]}) + "\n" for r in lines))
    run = run_folder(tmp_path / "run", kl=0.1, reward=-9.0, before=-10.5)
    argv = ["frontier", "--samples", path, "--column", "gold", "--runs", run]
    assert fastalign(capsys, *argv, "--output", tmp_path / "out")[0] == 0
    found = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert found["curve"]["reward"][0] == pytest.approx(-9.5)
    assert found["runs"][0]["reward"] == pytest.approx(-8.0)  # the run's gold: proxy + 1
    argv = ["frontier", "--samples", path, "--column", "length", "--runs", run]
    path.write_text("".join(json.dumps({**r, "length": -r["reward"]}) + "\n" for r in lines))
    assert fastalign(capsys, *argv, "--output", tmp_path / "other")[0] == 0
    (other,) = json.loads((tmp_path / "other" / "frontier.json").read_text())["runs"]
    assert other == {
        "name": "mine",
        "note": "reward/length was not measured",
    }  # nor is it its proxy


@pytest.mark.parametrize(
    ("rows", "argv", "said"),
    [
        ([("a", 1.0, 20)], [], "expected rewards that differ, got the same one"),
        ([("a", 1.0, 6), ("a", 2.0, 4)], [], "expected more than 10 samples a prompt, got 10"),
        (TWO_PROMPTS, ["--n", 41], "--n 41: a prompt has 40 answers only"),
        (TWO_PROMPTS, ["--n", 10], "--n: expected more than 10 answers a prompt, got 10"),
        (TWO_PROMPTS, ["--limit", 1], "--limit is for answers that are drawn here, with --base"),
        (
            TWO_PROMPTS,
            ["--sampling.max_new_tokens", 5],
            "--sampling is for answers that are drawn here",
        ),
        ([("a", 10**400, 20)], [], "expected a number as reward, got 1000"),
        ([*TWO_PROMPTS, ("b", 2.0, 1)], [], "got 40 to 41: give --n"),
        (TWO_PROMPTS, ["--kl", "3"], "got 3.0"),
        (TWO_PROMPTS, ["--kl", "3"], "expected a KL under 1.03972 nats"),
        (TWO_PROMPTS, ["--n", 40, "--kl", "3"], "3 need --n 201 or more"),
        (TWO_PROMPTS, ["--kl", "0.1,-1"], "--kl: expected positive numbers as in 0.5,1,2"),
        (TWO_PROMPTS, ["--kl", "x"], "--kl: expected positive numbers"),
        (
            TWO_PROMPTS,
            ["--column", "gold"],
            "expected a number as gold, got None (numbers: reward)",
        ),
        ([("a", math.nan, 20)], [], "expected finite rewards, got nan"),
        ([], [], "expected scored answers, got none"),
        (TWO_PROMPTS, ["--base", "x"], "give --samples (scored answers of the base) or --base"),
        (TWO_PROMPTS, ["--runs", "nowhere"], "--runs: no evaluation.json in nowhere"),
    ],
)
def test_bad_input(
    rows: list[tuple[str, float, int]], argv: list[Any], said: str, tmp_path: Path, capsys: Any
) -> None:
    samples = scored(tmp_path / "s.jsonl", rows)
    out = tmp_path / "out"
    status, printed, err = fastalign(
        capsys, "frontier", "--samples", samples, "--output", out, *argv
    )
    assert (status, printed) == (2, "") and err.startswith("fastalign: frontier: ")
    assert said in err and err.count("\n") == 1
    assert not list(out.glob("*"))


def test_bad_files(tmp_path: Path, capsys: Any) -> None:
    def said(samples: Path, *more: Any) -> str:
        argv = ["frontier", "--samples", samples, "--output", tmp_path / "out", *more]
        status, _, err = fastalign(capsys, *argv)
        assert status == 2
        return err

    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "reward": 1}\n[1]\n')
    assert "broken.jsonl:2 is not a JSON object" in said(broken)
    assert "--samples: no file" in said(tmp_path)
    inside = scored(tmp_path / "out" / "samples.jsonl")
    (tmp_path / "out" / "config.yaml").write_text("")
    assert "lies in the output folder" in said(inside, "--overwrite")
    assert inside.exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    good = scored(tmp_path / "good.jsonl")
    assert said(good).endswith("already in use; choose another --output, or --overwrite\n")
    assert "is damaged or holds no before" in said(good, "--overwrite", "--runs", tmp_path / "run")


def test_log_probs_above_0_are_refused(tmp_path: Path, capsys: Any) -> None:
    for wrong, told in ((1e-7, "1e-07"), (math.nan, "nan")):
        samples = scored(tmp_path / "s.jsonl", logp=wrong)
        argv = ["frontier", "--samples", samples, "--output", tmp_path / "out"]
        status, _, err = fastalign(capsys, *argv)
        assert status == 2
        assert f"expected logp of every answer as a log-probability, <= 0, got {told}" in err


def test_best_of_n_of_a_verifier_lies_on_the_frontier(tmp_path: Path, capsys: Any) -> None:
    """Of one prompt with rewards 0 and 1 every policy that treats equal rewards alike is a tilt,
    best-of-n too: at its KL the frontier has its reward."""
    samples = scored(tmp_path / "s.jsonl", [("a", 0.0, 700), ("a", 1.0, 300)])
    argv = ["frontier", "--samples", samples, "--output", tmp_path / "out"]
    assert fastalign(capsys, *argv)[0] == 0
    best = json.loads((tmp_path / "out" / "frontier.json").read_text())["best_of_n"]
    rewards = torch.cat([torch.zeros(700), torch.ones(300)])
    kls = best["kl_estimate"][1:5]
    there = frontier_at(rewards, kls=kls).reward.tolist()
    assert best["reward"][1:5] == pytest.approx(there, abs=1e-3)
    assert kls[3] < 1.21 < best["kl_bound"][4]
    assert "nearly always the highest" in (tmp_path / "out" / "frontier.svg").read_text()


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    """Other programs write U+2028 and U+0085 as they are."""
    samples = scored(tmp_path / "s.jsonl", [("a", 1.0, 2)])
    text = samples.read_text().replace('"prompt": "', '"prompt": "\u2028\x85')
    samples.write_text(text, encoding="utf-8")
    records, _ = read_samples(samples, tmp_path / "out")
    assert [record["prompt"] for record in records] == ["\u2028\x85a"] * 2


def test_of_a_model(road: Path, tmp_path: Path, capsys: Any) -> None:
    """It samples and scores by itself, and again from what it wrote; the same numbers."""
    out = tmp_path / "frontier"
    common = ["frontier", "--runs", road / "apa", "--kl", "0.05"]
    argv = [*common, "--base", road / "sft" / "model", "--reward", road / "reward" / "model"]
    argv += ["--limit", 3, "--n", 12, "--sampling.max_new_tokens", 6, "--output", out]
    status, printed, err = fastalign(capsys, *argv)
    assert status == 0, err
    assert "12 answers of the base to each of 3 prompts" in " ".join(printed.split())
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("config.yaml", "samples.jsonl", "accounting.json"),
        *("frontier.json", "frontier.svg", "frontier.png"),
    }
    found = json.loads((out / "frontier.json").read_text())
    assert found["base"] == str(road / "sft" / "model") and found["source"]["proxy"]
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "KL to the base, nats / response" in (out / "frontier.svg").read_text()
    again = tmp_path / "again"
    status, _, err = fastalign(capsys, *common, "--samples", out, "--output", again)
    assert status == 0, err
    held = json.loads((again / "frontier.json").read_text())
    for key in ("curve", "budgets", "best_of_n", "runs"):
        assert held[key] == found[key]
    status, _, err = fastalign(capsys, *argv)
    assert status == 2 and "already in use" in err
