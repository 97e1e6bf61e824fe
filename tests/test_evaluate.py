"""Evaluation: means, errors over prompts, paired errors of changes, and files that are JSON."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.models import Policy, RewardEnsemble
from fastalign.models.attention import attention
from fastalign.models.reward import EnsembleConfig
from fastalign.report import headline, write_report
from fastalign.report.compare import comparison_rows
from fastalign.rollout import Rollout, SamplingConfig
from fastalign.testing import TOLERANCES
from fastalign.train import apa, strict_json
from fastalign.train.evaluate import Evaluation, Evaluations, evaluate, standard_error
from fastalign.train.experience import Collector
from fastalign.train.reward_source import Scored, score_packed
from fastalign.train.run import Run, RunConfig

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32 = TOLERANCES[torch.float32].floor


def model(seed):
    torch.manual_seed(seed)
    found = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=24,
        )
    )
    torch.nn.init.normal_(found.lm_head.weight, std=0.3)
    return found


def logprobs(policy, rollout, temperature=1.0):
    ids = torch.tensor([rollout.prompt + rollout.completion])
    with torch.no_grad(), attention(policy.model, "eager"):
        logits = policy.model.eval()(input_ids=ids).logits[0].double() / temperature
    logp = logits.log_softmax(-1)
    at = range(len(rollout.prompt) - 1, ids.numel() - 1)
    picked = torch.stack([logp[t, ids[0, t + 1]] for t in at])
    return picked, -(logp.exp() * logp).sum(-1)[at.start : at.stop]


def near(expected):
    return pytest.approx(expected, rel=1e3 * FLOAT32, abs=1e3 * FLOAT32)


class Fixed:
    """An engine that gives two responses to each of three prompts, always the same ones."""

    def __init__(self, policy):
        lengths = (1, 4, 3, 2, 5, 3)
        draw = torch.Generator().manual_seed(5)
        self.rollouts = []
        for i, n in enumerate(lengths):
            tokens = torch.randint(24, (n,), generator=draw).tolist()
            rollout = Rollout(i // 2, [3 + i // 2, 7], tokens, [], i != 4)
            logp = logprobs(policy, rollout)[0].tolist()
            self.rollouts.append(Rollout(i // 2, rollout.prompt, tokens, logp, rollout.finished))

    def sync(self) -> None:
        pass

    def generate(self, prompts, n_samples, sampling):
        return self.rollouts[: len(prompts) * n_samples]


def setting(gold=None):
    """Policy, pi_init, ensemble, judge (all different) and a collector around them."""
    policy, reference = Policy(model(0)), Policy(model(1)).requires_grad_(False).eval()
    ensemble = RewardEnsemble(model(2).model, EnsembleConfig(n_heads=3, statistic="min")).eval()
    judge = RewardEnsemble(model(3).model, EnsembleConfig(n_heads=2, head_seed=9)).eval()
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))

    def score(rollouts, prompt_texts, response_texts):
        scores = score_packed(ensemble, rollouts, 9, "float32")
        return Scored(ensemble.reduce(scores), scores, {})

    reward: Any = SimpleNamespace(ensemble=ensemble, score=score)
    collector = Collector(
        Fixed(policy), reference, reward, tokenizer, SamplingConfig(), 9, "float32", gold
    )
    return policy, reference, ensemble, judge, collector


def scores_alone(ensemble, rollout):
    """One sequence through the plain trunk."""
    ids = torch.tensor([rollout.prompt + rollout.completion])
    with torch.no_grad(), attention(ensemble.encoder, "eager"):
        hidden = ensemble.encoder(input_ids=ids).last_hidden_state[0, -1]
        return ensemble.weight @ hidden


def test_every_number_against_its_definition():
    policy, reference, ensemble, judge, collector = setting(
        gold=lambda prompt, response: len(response) + 0.5 * len(prompt)
    )
    rollouts = collector.engine.rollouts
    texts = ["a", "bb", "ccc"]
    prompts = [[3, 7], [4, 7], [5, 7]]
    found = evaluate(collector, policy, prompts, texts, 2, judge)
    ours = [logprobs(policy, r) for r in rollouts]
    theirs = [logprobs(reference, r)[0] for r in rollouts]
    gaps = [a - b for (a, _), b in zip(ours, theirs, strict=True)]  # log pi - log pi_init
    columns = {
        "kl/k1": [g.sum() for g in gaps],
        "kl/k3": [(torch.expm1(-g) + g).sum() for g in gaps],
        "reward/proxy": [scores_alone(ensemble, r).min() for r in rollouts],
        "reward/held_out": [scores_alone(judge, r).mean() for r in rollouts],
        "reward/gold": [
            len(" ".join(map(str, r.completion))) + 0.5 * len(texts[r.prompt_index])
            for r in rollouts
        ],
        "length": [len(r.completion) for r in rollouts],
        "finished": [float(r.finished) for r in rollouts],
    }
    assert found.by_prompt.keys() == columns.keys()
    for name, values in columns.items():
        by_prompt = torch.tensor([float(v) for v in values], dtype=torch.float64).reshape(3, 2)
        means = by_prompt.mean(1)
        numbers = found.numbers
        assert numbers[name] == near(means.mean().item()), name
        assert numbers[f"{name}_stderr"] == near(means.std().item() / 3**0.5), name
        assert found.by_prompt[name] == near(means.tolist()), name
    assert abs(found.numbers["kl/k1"]) > 0.1 and found.numbers["kl/k3"] > 0.1
    held_out = torch.tensor([float(v) for v in columns["reward/held_out"]])
    assert found.numbers["reward/held_out_std"] == near(held_out.std().item())
    entropies = torch.cat([h for _, h in ours])
    assert found.numbers["entropy"] == near(entropies.mean().item())
    assert found.numbers["sampling_gap"] < 10 * FLOAT32 and found.numbers["n"] == 6
    assert [s["prompt"] for s in found.samples] == texts


@pytest.mark.parametrize(("n_prompts", "n_samples"), [(1, 2), (1, 1)])
def test_what_cannot_be_computed_is_left_out(n_prompts, n_samples):
    """No error of one prompt, no deviation of one response."""
    policy, _, _, judge, collector = setting(gold=lambda prompt, response: 1.0)
    found = evaluate(collector, policy, [[3, 7]] * n_prompts, ["a"], n_samples, judge)
    assert all(math.isfinite(v) for v in found.numbers.values())
    assert not [key for key in found.numbers if key.endswith("_stderr")]
    spreads = {key for key in found.numbers if key.endswith("_std")}
    every = {"reward/proxy_std", "reward/gold_std", "reward/held_out_std"}
    assert spreads == (every if n_samples > 1 else set())
    evaluations = Evaluations()
    evaluations.before = evaluations.after = found
    assert evaluations.change_stderr() == {}


# --- before and after ---------------------------------------------------------------------------


def test_standard_errors_are_over_prompts():
    """Means 2 and 6 of two prompts: std(2, 6) / sqrt(2) = 2."""
    assert standard_error(torch.tensor([2.0, 6.0])) == pytest.approx(2.0)
    assert standard_error(torch.tensor([1.0, 3.0, 5.0, 7.0])) == pytest.approx(1.2909944)
    assert standard_error(torch.tensor([1.0])) is None


def before_and_after():
    """Prompts of reward 0, 4, 8 gain 1, 2, 3: the change 2 has error std(1, 2, 3) / sqrt(3)."""
    sides = Evaluations()
    for side, rewards in (("before", [0.0, 4.0, 8.0]), ("after", [1.0, 6.0, 11.0])):
        values = torch.tensor(rewards)
        numbers = {
            "reward/gold": values.mean().item(),
            "reward/gold_std": values.std().item(),
            "reward/gold_stderr": standard_error(values) or 0.0,
            "n": 3,
        }
        sample = {"prompt": "p", "response": "r", "reward": {"proxy": math.nan}}
        setattr(sides, side, Evaluation(numbers, {"reward/gold": rewards}, [sample]))
    return sides


def test_the_error_of_a_change_is_paired(tmp_path):
    before_and_after().write(tmp_path, {"n_prompts": 3})
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["change_stderr"] == {"reward/gold": pytest.approx(1 / 3**0.5)}
    (row,) = comparison_rows(found)
    assert row.change == 2.0 and row.change_se == pytest.approx(0.5773503)
    assert row.verdict == "within noise"  # 2 < 4.30 * 0.577, Student's t of three prompts
    assert "it went from 4.0 to 6.0 (+2.00 ± 2.48 at 95%" in headline(found)
    of_many = found | {"n_prompts": 30}  # 2 > 2.045 * 0.577
    assert headline(of_many).startswith("Gold reward rose from 4.0 to 6.0 (+2.00 ± 1.18 at 95%")
    del found["change_stderr"]
    (row,) = comparison_rows(found)  # as if other prompts had been asked: 16 / 3 and 25 / 3
    assert row.change_se == pytest.approx((16 / 3 + 25 / 3) ** 0.5) and row.verdict != "rose"


def test_checkpoints_hold_what_the_paired_error_needs():
    again = Evaluations()
    again.load_state_dict(before_and_after().state_dict())
    assert again.change_stderr() == before_and_after().change_stderr()
    again.load_state_dict(Evaluations().state_dict())
    assert again.before is None and again.after is None


# --- files that are JSON ------------------------------------------------------------------------


def strictly(text):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_becomes_null(tmp_path):
    content = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, 2)}], "d": "NaN", "e": None}
    expected = {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": None}
    assert strictly(strict_json.dumps(content)) == expected
    before_and_after().write(tmp_path, {"seconds": math.nan})
    assert strictly((tmp_path / "evaluation.json").read_text())["seconds"] is None
    (line,) = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert strictly(line)["before_reward"] == {"proxy": None}


def test_a_metric_that_is_not_finite_is_null_and_said_once(tmp_path, caplog):
    run = Run(RunConfig(output=str(tmp_path)), "test", 3)
    for step in (1, 2):
        run.log(step, "eval", {"loss": 0.5, "spread": math.nan})
    lines = [strictly(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["loss"], line["spread"]) for line in lines] == [(0.5, None)] * 2
    assert [r.getMessage() for r in caplog.records] == [
        "step 1: spread is nan; metrics.jsonl has null for it"
    ]


def test_the_smallest_run_writes_json_and_has_a_report(road, tmp_path):
    """One prompt, one response, one token: nothing has a variance."""
    folder = tmp_path / "apa"
    config: dict[str, Any] = {
        "output": str(folder),
        "policy": str(road / "sft" / "model"),
        "reward": str(road / "reward" / "model"),
        "judge": str(road / "reward" / "model"),
        "steps": 2,
        "prompts_per_step": 1,
        "samples_per_prompt": 1,
        "eval_limit": 1,
        "eval_samples": 1,
        "sampling": SamplingConfig(max_new_tokens=1),
    }
    apa.train(apa.APAConfig(**config))
    lines = [strictly(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["eval", "train", "train", "eval"]
    for line in lines:
        assert None not in line.values()
        assert not [key for key in line if key.endswith(("_std", "_stderr", "/std"))]
    found = strictly((folder / "evaluation.json").read_text())
    assert found["before"]["n"] == 1 and found["change_stderr"] == {}
    assert all(row.change_se is None for row in comparison_rows(found))
    assert "no standard errors recorded, so noise cannot be judged" in headline(found)
    page = write_report(folder).read_text()
    assert "not finite" not in page and "1 prompts, 1 responses of each model" in page
