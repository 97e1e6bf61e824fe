"""benchmarks/bench_shared_prompts.py on a tiny model: both ways read the same responses."""

import json

import pytest

from benchmarks import bench_shared_prompts


@pytest.mark.usefixtures("one_thread")
def test_both_ways_are_timed_on_the_same_numbers(tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    arguments = ["--size", "tiny", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["benchmarks/bench_shared_prompts.py", *arguments])
    bench_shared_prompts.main()
    rows = {(row["task"], row["what"]): row for row in json.loads(out.read_text())["rows"]}
    for task in ("pairs", "answers"):
        ours, theirs = (rows[task, what] for what in ("fastalign", "prompts repeated"))
        assert theirs["tokens"] > 1.3 * ours["tokens"] and ours["log-probs differ"] < 1e-5
        assert min(ours["ms"], theirs["ms"]) > 0
    # Two prompts of 64 tokens with four responses of 50, all of them cut to the tiny model's room.
    assert rows["answers", "fastalign"]["tokens"] == 2 * (64 + 4 * 50)
    assert rows["answers", "prompts repeated"]["tokens"] == 8 * (64 + 50)
