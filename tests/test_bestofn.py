"""bestofn: what is kept, the curve, and a run that was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_runs import lines_of, small
from safetensors.torch import load_file, save_file
from test_answers import SHORT, lines

from fastalign.commands import bestofn
from fastalign.data import source
from fastalign.rollout import SamplingConfig
from fastalign.theory import best_of_n_curve
from fastalign.train import mle
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")


def best(road: Path, output: Path, **options: Any) -> bestofn.BestOfNConfig:
    values: dict[str, Any] = {"limit": 5, "n": 4, "sampling": SHORT}
    return bestofn.BestOfNConfig(
        policy=str(road / "sft" / "model"),
        reward=str(road / "reward" / "model"),
        output=str(output),
        **(values | options),
    )


def test_best_of_n(road: Path, tmp_path: Path) -> None:
    folder = bestofn.run(best(road, tmp_path / "run", curve=True))
    samples, selected = lines(folder / "samples.jsonl"), lines(folder / "selected.jsonl")
    assert (len(samples), len(selected)) == (20, 5)
    proxy = torch.tensor([r["reward"] for r in samples], dtype=torch.float64).reshape(5, 4)
    assert [r["reward"] for r in selected] == proxy.max(1).values.tolist()
    for i, r in enumerate(selected):
        assert r["n"] == 4 and r["prompt"] == samples[4 * i]["prompt"]
        assert len(r["heads"]) == 3
    found = json.loads((folder / "curve.json").read_text())
    assert found["n"] == [1, 2, 3, 4]
    assert found["reward"][0] == pytest.approx(proxy.mean().item(), abs=1e-12)
    assert found["reward"][3] == pytest.approx(proxy.max(1).values.mean().item(), abs=1e-12)
    # Best of 2 over the six pairs of four: the third of the sorted counts 2/6 ...
    ordered = proxy.sort(1).values
    pairs = (ordered * torch.tensor([0, 1, 2, 3]) / 6).sum(1).mean().item()
    assert found["reward"][1] == pytest.approx(pairs, abs=1e-12)
    gold = torch.tensor([r["gold"] for r in samples], dtype=torch.float64).reshape(5, 4)
    by_prompt = best_of_n_curve(gold, proxy)
    assert found["gold"] == by_prompt.mean(0).tolist()
    assert found["gold_stderr"] == (by_prompt.std(0) / 5**0.5).tolist()
    assert found["kl_bound"][3] == pytest.approx(1.3862943611198906 - 0.75)
    assert list(found["kl_estimate"]) == ["1", "2", "4"]
    assert 0 < found["kl_estimate"]["4"] <= found["kl_bound"][3]
    assert (folder / "best_of_n.svg").read_text().count("gold reward") == 1
    assert (folder / "best_of_n.png").stat().st_size > 10_000
    read, _ = source.completions(str(folder / "selected.jsonl"), None, None, None)
    assert [r.reward for r in read] == [r["reward"] for r in selected]


def test_what_is_selected_is_imitated(road: Path, tmp_path: Path) -> None:
    """All of it, by `train mle`."""
    folder = bestofn.run(best(road, tmp_path / "run"))
    config = small(
        *(mle.MLEConfig, tmp_path / "distilled", road),
        **{"data": str(folder / "selected.jsonl"), "reward": None, "keep": 1.0},
        **{"limit": None, "epochs": 1, "batch_tokens": 4096},
    )
    mle.train(config)
    (facts,) = lines_of(tmp_path / "distilled", "data")
    assert facts["data/samples"] == facts["data/kept"] == 5
    selected = lines(folder / "selected.jsonl")
    mean = sum(r["reward"] for r in selected) / 5
    assert facts["data/reward_kept"] == pytest.approx(mean)


def test_a_stopped_best_of_n_goes_on(road: Path, tmp_path: Path) -> None:
    """Two prompts a chunk: cut within the second chunk, even within a line, all comes out the
    same."""
    whole = bestofn.run(best(road, tmp_path / "whole"))
    folder = tmp_path / "cut"
    folder.mkdir()
    text = (whole / "samples.jsonl").read_text()
    (folder / "config.yaml").write_text((whole / "config.yaml").read_text())
    cut = len("".join(line + "\n" for line in text.splitlines()[:11])) + 40
    (folder / "samples.jsonl").write_text(text[:cut])
    bestofn.run(best(road, folder, resume="auto"))
    for name in ("samples.jsonl", "selected.jsonl"):
        assert (folder / name).read_text() == (whole / name).read_text()
    with pytest.raises(RunError, match="already in use"):
        bestofn.run(best(road, folder))
    for changes, said in (
        ({"seed": 1}, "a run with seed 0, this one has 1: resume with the former"),
        ({"target_reward": 2.0}, "a run with target_reward None, this one has 2.0"),
        ({"sampling": SamplingConfig(max_new_tokens=7, batch_size=8)}, "sampling.max_new_tokens 8"),
        ({"statistic": "min"}, "a run with statistic None, this one has min"),
    ):
        with pytest.raises(RunError, match=said):
            bestofn.run(best(road, folder, resume="auto", **changes))


def test_a_best_of_n_goes_on_with_the_models_it_began_with(road: Path, tmp_path: Path) -> None:
    """Other weights, prompts or functions under the same names."""
    model, prompts, function = tmp_path / "model", tmp_path / "p.jsonl", tmp_path / "f.py"
    shutil.copytree(road / "sft" / "model", model)
    shorter = "def short(prompts, responses):\n    return [-float(len(r)) for r in responses]\n"
    function.write_text(shorter)
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    options: dict[str, Any] = {
        **{"policy": str(model), "prompts": str(prompts), "reward": f"{function}:short"},
        **{"gold": str(road / "reward" / "model"), "output": str(tmp_path / "run"), "n": 2},
        "sampling": SHORT,
    }
    bestofn.run(bestofn.BestOfNConfig(**options))
    again = bestofn.BestOfNConfig(**options, resume="auto")
    bestofn.run(again)
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    name = min(tensors)
    changed = {**tensors, name: tensors[name] * 1.01}
    for path, text, said in (
        (prompts, '{"prompt": "one"}\n{"prompt": "tow"}\n', "prompts"),
        (function, shorter + "\n", "reward f.short"),
    ):
        former = path.read_text()
        path.write_text(text)
        with pytest.raises(RunError, match=f"of a run with another {said} "):
            bestofn.run(again)
        path.write_text(former)
    save_file(changed, weights, {"format": "pt"})
    with pytest.raises(RunError, match="of a run with another policy .* resume with the former"):
        bestofn.run(again)
    save_file(tensors, weights, {"format": "pt"})
    bestofn.run(again)
