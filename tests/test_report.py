"""The page of a run: what it holds, and that it needs nothing but itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import (
    EVALUATION,
    POLICY_PLOTS,
    make_apa,
    make_reward,
    make_sft,
    parse,
    plots_of,
    write_lines,
)

from fastalign.report import headline, write_report


@pytest.fixture
def road(tmp_path: Path) -> Path:
    make_sft(tmp_path / "road" / "sft")
    make_reward(tmp_path / "road" / "reward")
    make_apa(tmp_path / "road" / "apa")
    return tmp_path / "road"


def test_road(road: Path) -> None:
    path = write_report(road)
    html, page = path.read_text(encoding="utf-8"), parse(path)
    assert path == road / "report.html"
    assert path.stat().st_size < 3_000_000
    expected = (*POLICY_PLOTS, "reward-accuracy", "reward-loss", "sft-loss", "sft-speed")
    assert plots_of(html) == dict.fromkeys(expected, True)
    assert headline(EVALUATION) in page.text
    order = [
        "before-after",
        "training",
        "reward-model",
        "sft",
        "samples",
        "configuration",
        "repeat",
    ]
    assert sorted(order, key=page.ids.index) == order
    for words in (
        "Held-out accuracy 79.7 ± 2.4% (95% interval), 3 heads",
        "fastalign quickstart --seed 0",
        "reward_statistic: min",
        "reward, head_seed",
        "2.13.0",
        "6 min 52 s",
        "nats² / token",
        "The first 8 of 12 stored prompts",
        "generate 53%",
    ):
        assert words in page.text, words


def test_page_loads_nothing_and_runs_nothing(road: Path) -> None:
    path = write_report(road)
    html, page = path.read_text(encoding="utf-8"), parse(path)
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert not page.tags & {"script", "link", "img", "image", "iframe", "object", "embed", "base"}
    assert "http:" not in html and "https:" not in html and "data:" not in html
    assert "@import" not in html and "default-src 'none'" in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    assert len(page.ids) == len(set(page.ids))


def test_outside_text_is_escaped(road: Path) -> None:
    evil = "<script>alert(1)</script><img src=https://example.org/x>\"'&\x1b[31m\ud800"
    reward = {"<b>proxy": 1.0}
    sample = {"prompt": evil, "before": evil, "after": "", "after_reward": reward}
    write_lines(road / "apa" / "samples.jsonl", [sample])
    evaluation = {**EVALUATION, "command": evil, "method": evil, "machine": {evil: evil}}
    (road / "apa" / "evaluation.json").write_text(json.dumps({**evaluation, "proxy": evil}))
    (road / "apa" / "config.yaml").write_text(f"seed: {evil[:60]}\n")
    path = write_report(road)
    html, page = path.read_text(encoding="utf-8"), parse(path)
    assert not page.tags & {"script", "img", "b" if "<b>proxy" in html else ""}
    assert html.count("&lt;script&gt;alert(1)") >= 5
    assert all(address.startswith("#") for address in page.addresses)
    assert "␛[31m?" in page.text and "(empty)" in page.text


def test_long_text_is_cut(road: Path) -> None:
    write_lines(road / "apa" / "samples.jsonl", [{"prompt": "p", "before": "x" * 1501, "after": 7}])
    text = parse(write_report(road)).text
    assert "x" * 1500 + " … 1 more characters" in text


def test_single_run_unfinished_without_gold(tmp_path: Path) -> None:
    make_apa(tmp_path / "run", steps=30, gold=False, finished=False)
    path = write_report(tmp_path / "run", tmp_path / "out" / "page.html")
    html, page = path.read_text(encoding="utf-8"), parse(path)
    assert path == tmp_path / "out" / "page.html"
    assert "This run is not finished: evaluation.json is missing." in page.text
    assert "training log up to step 29" in page.text
    assert "So far, the proxy reward of the training samples went from" in page.text
    assert "No gold reward was recorded." in page.text and "Gold reward" not in page.text
    assert "reward-model" not in page.ids
    assert plots_of(html) == dict.fromkeys(POLICY_PLOTS, True)


def test_missing_stages_are_named(tmp_path: Path) -> None:
    make_sft(tmp_path / "sft", steps=20)
    page = parse(write_report(tmp_path))
    assert "No policy run yet: no apa/metrics.jsonl." in page.text
    assert "No reward model run: no reward/metrics.jsonl." in page.text
    assert "Held-out loss went from 4.600 to 3.33" in page.text


@pytest.mark.parametrize("method", ["apa-offline", "awr-offline"])
def test_an_offline_method_is_a_stage(tmp_path: Path, method: str) -> None:
    make_sft(tmp_path / "sft", steps=20)
    make_apa(tmp_path / method, steps=20)
    page = parse(write_report(tmp_path))
    assert "No policy run yet" not in page.text and f"{method}/config.yaml" in page.text


@pytest.mark.parametrize("maker, words", [(make_sft, "Held-out loss"), (make_reward, "ranks 79.7")])
def test_single_stage(tmp_path: Path, maker: Any, words: str) -> None:
    maker(tmp_path)
    page = parse(write_report(tmp_path))
    assert words in page.text and "No policy run" not in page.text


def test_write_is_whole_or_not_at_all(road: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(road)
    before = path.read_bytes()
    assert write_report(road).read_bytes() == before  # the same run gives the same bytes

    def stop(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("fastalign.report.files.os.replace", stop)
    with (road / "apa" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "phase": "train", "kl/k1": 1.0}\n')
    with pytest.raises(OSError, match="disk full"):
        write_report(road)
    assert path.read_bytes() == before
    assert sorted(file.name for file in road.iterdir()) == ["apa", "report.html", "reward", "sft"]
