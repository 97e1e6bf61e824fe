"""benchmarks/bench_reward_step.py on a tiny model: all heads take part in a step."""

import json

import pytest
import torch

from benchmarks import bench_reward_step


@pytest.mark.usefixtures("one_thread")
def test_every_number_of_heads_is_timed_and_all_heads_learn(tmp_path, monkeypatch):
    kept = {}
    plain = bench_reward_step.step

    def spy(ensemble, optimizer, pairs):
        before = {n: p.detach().clone() for n, p in ensemble.named_parameters()}
        plain(ensemble, optimizer, pairs)
        after = dict(ensemble.named_parameters())
        kept[ensemble.config.n_heads] = [n for n in before if torch.equal(before[n], after[n])]
        assert bool((before["weight"] != after["weight"]).any(1).all())  # of every head

    monkeypatch.setattr(bench_reward_step, "step", spy)
    out = tmp_path / "result.json"
    arguments = ["--size", "tiny", "--repeats", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["benchmarks/bench_reward_step.py", *arguments])
    bench_reward_step.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["what"] for row in rows] == list(bench_reward_step.HEADS) and rows[0][
        "time / one head's"
    ] == 1.0
    assert all(row["ms"] > 0 and row["rounds"] == 2 for row in rows)
    assert kept == dict.fromkeys((1, 5, 16), ["bias"])  # both scores of a pair have it
