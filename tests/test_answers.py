"""generate, bestofn and evaluate: what they draw, what they write, what their numbers mean."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import fastalign

from fastalign.commands import bestofn, evaluate
from fastalign.commands.answers import Answers, AnswersConfig
from fastalign.commands.output import read_lines, write_lines
from fastalign.data import source
from fastalign.models import Policy, load_tokenizer
from fastalign.rollout import SamplingConfig
from fastalign.train import repeat
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = SamplingConfig(max_new_tokens=8, batch_size=8)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_writes_what_training_reads(road: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "answers.jsonl"
    argv = ["generate", "--policy", road / "sft" / "model", "--limit", 3, "--samples", 2]
    argv += ["--sampling.max_new_tokens", 6]
    assert fastalign(capsys, *argv, "--output", out)[0] == 0
    records = lines(out)
    assert len(records) == 6
    assert [r["prompt"] for r in records[::2]] == [r["prompt"] for r in records[1::2]]
    assert all(1 <= r["tokens"] <= 6 and r["logp"] < 0 for r in records)
    read, _ = source.completions(str(out), None, None, None)
    assert [r.completion for r in read] == [r["completion"] for r in records]
    status, printed, _ = fastalign(capsys, *argv)  # the same seed, to the screen
    assert status == 0 and printed == out.read_text()
    status, _, err = fastalign(capsys, *argv, "--output", out)
    assert status == 2 and f"output {out} is there already" in err


def test_generate_answers_a_text(road: Path, capsys: Any) -> None:
    argv = ["generate", "--policy", road / "sft" / "model", "--text", "a b"]
    status, printed, _ = fastalign(capsys, *argv, "--sampling.max_new_tokens", 3)
    assert status == 0
    (record,) = [json.loads(line) for line in printed.splitlines()]
    assert record["prompt"] == "a b"


def test_answers_to_conversations_are_messages(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    from fastalign.commands import answers as module

    tokenizer = load_tokenizer(str(road / "sft" / "model"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    monkeypatch.setattr(module, "load_tokenizer", lambda name: tokenizer)
    data = write({"prompt": [{"role": "user", "content": "hi"}]})
    config = AnswersConfig(policy=str(road / "sft" / "model"), prompts=data, sampling=SHORT)
    found = Answers(config)
    (rollout,) = next(found.draw(1))
    record = found.record(rollout, reward=1.5)
    assert record["prompt"] == [{"role": "user", "content": "hi"}]
    assert record["completion"] == [{"role": "assistant", "content": found.text(rollout)}]
    read, _ = source.completions(write(record, name="again.jsonl"), None, None, None)
    assert read[0].reward == 1.5


def test_a_chunk_is_drawn_the_same_whatever_came_before(road: Path) -> None:
    """Five prompts, two samples each, four prompts a chunk: the second chunk alone."""
    config = AnswersConfig(policy=str(road / "sft" / "model"), limit=5, sampling=SHORT)
    found = Answers(config)
    chunks = list(found.draw(2))
    assert [len(chunk) for chunk in chunks] == [8, 2]
    assert [r.prompt_index for r in chunks[1]] == [4, 4]
    assert list(found.draw(2, first=1)) == chunks[1:]


def test_no_room_for_a_prompt(road: Path) -> None:
    config = AnswersConfig(
        policy=str(road / "sft" / "model"), sampling=SamplingConfig(max_new_tokens=256)
    )
    with pytest.raises(RunError, match="256 leaves no room for a prompt in the 256 tokens"):
        Answers(config)


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_lines(path, [{"a": 1}, {"a": 2}])
    with path.open("a") as file:
        file.write('{"a": 3')
    assert read_lines(path) == [{"a": 1}, {"a": 2}]
    assert read_lines(tmp_path / "none") == []


def test_win_rate_by_hand() -> None:
    """Prompt 1: (1, 3) against (2, 3): 1<2, 1<3, 3>2, 3=3 -> 1.5 of 4. Prompt 2: all won."""
    ours, theirs = torch.tensor([1.0, 3.0, 5.0, 6.0]), torch.tensor([2.0, 3.0, 1.0, 2.0])
    found = evaluate.win_rate(ours, theirs, 2)
    assert found["rate"] == pytest.approx((0.375 + 1.0) / 2)
    error = 0.625 / 2**0.5 / 2**0.5  # std of (0.375, 1.0) is 0.625 / sqrt 2
    assert found["stderr"] == pytest.approx(error)
    # Wilson's of 0.6875 * 0.3125 / 0.3125^2 = 2.2 trials.
    assert (found["low"], found["high"]) == pytest.approx((0.17992, 0.95664), abs=1e-5)
    assert evaluate.win_rate(ours[:2], theirs[:2], 2)["low"] is None
    rounded = ours.double() + torch.tensor([0.0, 4e-7, 0.0, 0.0])  # in a pack of other neighbours
    assert evaluate.win_rate(rounded, theirs, 2)["rate"] == found["rate"]


def test_diversity_by_hand() -> None:
    """Tokens 7 7 8 | 7 7 8 | 9 | 7: 3 of 8 different; pairs 77 78 77 78: 2 of 4; answers 1/2, 1."""
    found = evaluate.diversity([[7, 7, 8], [7, 7, 8], [9], [7]], 2)
    assert found == {"distinct/1": 3 / 8, "distinct/2": 0.5, "distinct/answers": 0.75}
    assert "distinct/answers" not in evaluate.diversity([[1], [2]], 1)


def test_evaluate(road: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "evaluation"
    argv = ["evaluate", "--policy", road / "apa" / "model", "--baseline", road / "sft" / "model"]
    argv += ["--reward", road / "reward" / "model", "--judge", road / "reward" / "model"]
    argv += ["--limit", 4, "--samples", 2, "--sampling.max_new_tokens", 8, "--output", out]
    status, _, err = fastalign(capsys, *argv)
    assert status == 0, err
    found = json.loads((out / "evaluation.json").read_text())
    after, before = found["after"], found["before"]
    assert before["kl/k1"] == before["kl/exact"] == 0.0 and after["kl/exact"] > 0
    assert after["reward/held_out"] == after["reward/proxy"]  # the judge is the same model
    assert set(found["win_rate"]) == {"reward/proxy", "reward/gold", "reward/held_out"}
    assert found["seed"] == 0 and "evaluate" in (out / "report.html").read_text()
    assert "of the pairs" in (out / "report.html").read_text()
    assert len(lines(out / "samples.jsonl")) == 4
    status, _, err = fastalign(capsys, *argv)
    assert status == 2 and "already in use" in err


def test_exact_kl_and_entropy_against_whole_logits(
    road: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model reads a prompt once, and both of its answers."""
    config = evaluate.EvaluateConfig(
        policy=str(road / "apa" / "model"), limit=3, samples=2, sampling=SHORT, micro_tokens=100
    )
    answers = Answers(config)
    base = Policy.load(str(road / "sft" / "model"), answers.tokenizer).eval()
    rollouts = [r for chunk in answers.draw(2) for r in chunk]
    read, plain = [], Policy.hidden

    def hidden(self: Policy, packed: Any) -> torch.Tensor:
        read.append(packed.input_ids.numel())
        return plain(self, packed)

    monkeypatch.setattr(Policy, "hidden", hidden)
    entropy, kl = evaluate.per_token(config, answers.policy, rollouts, base)
    prompts = sum(len(r.prompt) for r in rollouts[::2])
    completions = sum(len(r.completion) for r in rollouts)
    assert sum(read) == 2 * (prompts + completions)
    at = 0
    for i, r in enumerate(rollouts):
        ids, start = torch.tensor([r.prompt + r.completion]), len(r.prompt) - 1
        with torch.no_grad():
            p, q = (
                m.model(ids, attention_mask=torch.ones_like(ids)).logits[0, start:-1].double()
                for m in (sdpa(answers.policy), sdpa(base))
            )
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        exact = (p.exp() * (p - q)).sum()
        assert kl["exact"][i].item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-6)
        k1 = (p - q).gather(1, ids[0, start + 1 :, None]).sum()
        assert kl["k1"][i].item() == pytest.approx(k1.item(), rel=1e-3, abs=1e-5)
        ours = entropy[at : at + len(r.completion)]
        torch.testing.assert_close(ours.double(), -(p.exp() * p).sum(-1), rtol=1e-5, atol=1e-6)
        at += len(r.completion)


def sdpa(policy: Policy) -> Policy:
    policy.model.set_attn_implementation("sdpa")
    return policy


def test_the_baseline_must_have_the_same_tokenizer(
    road: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastalign.data.tokenizer import train_tokenizer

    other = train_tokenizer(["something else entirely"], 270)
    real = evaluate.load_tokenizer
    monkeypatch.setattr(
        evaluate, "load_tokenizer", lambda name: other if "sft" in name else real(name)
    )
    status, _, err = fastalign(
        capsys,
        *["evaluate", "--policy", road / "apa" / "model", "--baseline", road / "sft" / "model"],
        *["--reward", road / "reward" / "model", "--output", tmp_path / "e"],
    )
    assert status == 2 and f"and the baseline '{road / 'sft' / 'model'}' have different" in err
    assert "reward model" not in err


def strict(path: Path) -> Any:
    """JSON without NaN and Infinity."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "my.py"
    path.write_text(
        "def short(prompts, responses):\n"
        "    return [-float(len(r)) for r in responses]\n"
        "def vowels(prompts, responses):\n"
        "    return [sum(r.count(v) for v in 'aeiou') for r in responses]\n"
    )
    return str(path)


def test_a_function_is_reward_enough(
    road: Path, tmp_path: Path, functions: str, write: Any, capsys: Any
) -> None:
    """One prompt, not of the built-in task: no ensemble, no gold, no standard error."""
    data = write({"prompt": "Say it."})
    common = ["--reward", f"{functions}:short", "--prompts", data, "--sampling.max_new_tokens", 6]
    out = tmp_path / "evaluation"
    argv = ["evaluate", "--policy", road / "apa" / "model", "--baseline", road / "sft" / "model"]
    argv += ["--judge", f"{functions}:vowels", "--samples", 1, *common, "--output", out]
    status, _, err = fastalign(capsys, *argv)
    assert status == 0, err
    found = strict(out / "evaluation.json")
    assert found["proxy"] == "my.short" and found["judge"]["proxy"] == "my.vowels"
    assert set(found["win_rate"]) == {"reward/proxy", "reward/held_out"}
    assert found["win_rate"]["reward/proxy"]["stderr"] is None and found["n_prompts"] == 1
    (line,) = lines(out / "samples.jsonl")
    for side in ("before", "after"):
        text = line[side]
        assert found[side]["reward/proxy"] == -len(text)
        assert found[side]["reward/held_out"] == sum(text.count(v) for v in "aeiou")
        assert not any(v is None for v in found[side].values())
        assert not any(name.endswith(("_stderr", "_std")) for name in found[side])
    assert found["change_stderr"] == {}

    best_folder = tmp_path / "best"
    argv = ["bestofn", "--policy", road / "sft" / "model", "--n", 4, "--curve", "true", *common]
    status, _, err = fastalign(capsys, *argv, "--output", best_folder)
    assert status == 0, err
    curve = strict(best_folder / "curve.json")
    samples = lines(best_folder / "samples.jsonl")
    lengths = [len(r["completion"]) for r in samples]
    assert curve["reward"][3] == -min(lengths) and "reward_stderr" not in curve
    assert curve["reward"][0] == pytest.approx(-sum(lengths) / 4)
    assert "heads" not in samples[0] and "gold" not in samples[0]


def test_entropy_is_a_mean_over_tokens_with_the_error_of_a_ratio() -> None:
    """Responses of 1, 3 and 4 tokens with 2, 3 and 11 nats: 16 / 8 = 2. Residuals 0, -3 and 3 over
    a mean length of 8 / 3."""
    sums, lengths = torch.tensor([2.0, 3.0, 11.0]), torch.tensor([1, 3, 4])
    found = evaluate.shares_of_mean(sums.double(), lengths)
    assert found.mean().item() == pytest.approx(2.0)
    assert (found - 2.0).tolist() == pytest.approx([0.0, -3 / (8 / 3), 3 / (8 / 3)])


def test_the_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--reward", "runs/r,0.5*my.py:f", "--text", "say it", "--lines", "2000:"]
    monkeypatch.setattr("sys.argv", ["fastalign", "generate", *words])
    assert shlex.split(repeat.command_line()) == ["fastalign", "generate", *words]


def test_what_it_took_and_who_is_who(road: Path, tmp_path: Path, functions: str) -> None:
    config = evaluate.EvaluateConfig(
        policy=str(road / "apa" / "model"),
        baseline=str(road / "sft" / "model"),
        reward=f"{functions}:short",
        output=str(tmp_path / "evaluation"),
        limit=2,
        samples=2,
        sampling=SHORT,
    )
    folder = evaluate.run(config)
    found, cost = strict(folder / "evaluation.json"), strict(folder / "accounting.json")
    assert found["names"] == {"before": "sft", "after": "apa"}
    page = (folder / "report.html").read_text()
    assert "<h1>apa against sft: gold reward" in page and "What it cost" in page
    assert "POLICY" not in page and "SFT" not in page and "KL to baseline" in page
    drawn = 0
    for name in ("sft", "apa"):
        answers = Answers(AnswersConfig(str(road / name / "model"), limit=2, sampling=SHORT))
        drawn += sum(len(r.prompt + r.completion) for chunk in answers.draw(2) for r in chunk)
    assert found["tokens"] == cost["phases"]["generate"]["tokens"] == drawn
    seconds = found["seconds"]
    assert seconds["generate"] > 0 and seconds["score"] > 0 and seconds["reference"] > 0
    parts = [value for name, value in seconds.items() if name != "total"]
    assert seconds["total"] == pytest.approx(sum(parts)) and cost["method"] == "evaluate"
    best = bestofn.BestOfNConfig(
        policy=str(road / "sft" / "model"),
        reward=str(road / "reward" / "model"),
        output=str(tmp_path / "best"),
        limit=5,
        n=4,
        sampling=SHORT,
    )
    curve_folder = bestofn.run(best)
    curve, records = strict(curve_folder / "curve.json"), lines(curve_folder / "samples.jsonl")
    assert curve["seconds"]["generate"] > 0 and curve["seconds"]["score"] > 0
    assert curve["tokens"] > sum(r["tokens"] for r in records)  # prompts count too
    assert strict(curve_folder / "accounting.json")["method"] == "bestofn"


@pytest.mark.parametrize(
    "policy, baseline, expected",
    [
        ("runs/apa/model", "runs/sft/model", ["apa", "sft"]),
        ("runs/apa/model", "Qwen/Qwen3-0.6B", ["runs/apa/model", "Qwen/Qwen3-0.6B"]),
        ("runs/x", "runs/x/model", ["x", "x/model"]),
        ("runs/x", "runs/x", ["runs/x", "runs/x"]),
    ],
)
def test_names(policy: str, baseline: str, expected: list[str]) -> None:
    assert evaluate.names(policy, baseline) == expected


def test_kl_that_is_not_finite(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, functions: str
) -> None:
    """A token that the baseline never gives: k1 is infinite. It is null, and the rest is told."""
    plain = Policy.logprobs

    def logprobs(self: Policy, *args: Any, **options: Any) -> Any:
        logp, entropy = plain(self, *args, **options)
        logp = logp.clone()
        logp[0] = -torch.inf
        return logp, entropy

    monkeypatch.setattr(Policy, "logprobs", logprobs)
    config = evaluate.EvaluateConfig(
        policy=str(road / "apa" / "model"),
        baseline=str(road / "sft" / "model"),
        reward=f"{functions}:short",
        output=str(tmp_path / "evaluation"),
        limit=2,
        samples=2,
        sampling=SHORT,
    )
    folder = evaluate.run(config)
    found = strict(folder / "evaluation.json")
    assert found["after"]["kl/k1"] is found["after"]["kl/exact"] is None
    assert found["after"]["entropy"] > 0 and found["after"]["reward/proxy"] < 0
    assert "1 of 4 answers have tokens that are impossible to one of the models" in caplog.text
    assert "at — nats" not in (folder / "report.html").read_text()
