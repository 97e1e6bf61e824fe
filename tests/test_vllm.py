"""The vLLM engine against a stand-in that answers as vLLM does, sampling from a model of its own.

vLLM itself needs a GPU; what is tested is what this side asks for, what it makes of the answers,
and that an engine with old weights is found out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from several_processes import tiny_policy

from fastalign.errors import UserError
from fastalign.rollout import Rollout, SamplingConfig, agreement
from fastalign.rollout.vllm import VLLMEngine

EOS = 3


@dataclass
class SamplingParams:
    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: list[int]
    logprobs: int
    seed: int
    detokenize: bool


@dataclass
class LLM:
    """Draws every token from the softmax of its own model's logits over the temperature."""

    model: str
    skip_tokenizer_init: bool
    load_format: str
    dtype: str
    max_model_len: int
    gpu_memory_utilization: float
    logprobs_mode: str
    seed: int
    disable_log_stats: bool
    calls: list[Any] = field(default_factory=list)
    deaf: bool = False

    def __post_init__(self) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(99)  # a dummy load: weights that are nobody's
        self.net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.model)).eval()

    def apply_model(self, function: Any) -> list[Any]:
        def load_weights(named: Any) -> set[str]:
            if not self.deaf:
                self.net.load_state_dict(dict(named))
            return {"loaded"}

        return [function(SimpleNamespace(load_weights=load_weights))]

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    @torch.no_grad()
    def generate(self, requests: Any, parameters: list[SamplingParams], use_tqdm: bool) -> Any:
        self.calls.append(parameters)
        return [
            SimpleNamespace(
                outputs=[self._one(r["prompt_token_ids"], p, k) for k in reversed(range(p.n))]
            )
            for r, p in zip(requests, parameters, strict=True)
        ]

    def _one(self, prompt: list[int], p: SamplingParams, index: int) -> Any:
        generator = torch.Generator().manual_seed(p.seed + index)
        ids, steps = list(prompt), []
        reason = "length"
        for _ in range(p.max_tokens):
            logits = self.net(torch.tensor([ids])).logits[0, -1] / p.temperature
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            steps.append({token: SimpleNamespace(logprob=float(logits.log_softmax(-1)[token]))})
            ids.append(token)
            if token in p.stop_token_ids:
                reason = "stop"
                break
        return SimpleNamespace(
            index=index, token_ids=ids[len(prompt) :], logprobs=steps, finish_reason=reason
        )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> VLLMEngine:
    stand_in = ModuleType("vllm")
    stand_in.LLM, stand_in.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # put back after the test
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    policy = tiny_policy(False)
    monkeypatch.setattr(
        policy, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))])
    )
    return VLLMEngine(
        policy,
        SimpleNamespace(eos_token_id=EOS),
        lambda: policy.model.state_dict().items(),
        tmp_path / "engine",
    )


SAMPLING = SamplingConfig(max_new_tokens=6, temperature=0.7)


def test_asks_for_the_policys_own_distribution(engine: VLLMEngine) -> None:
    """No top-p, no top-k, log-probs after the temperature, no second load of weights."""
    engine.generate([[5, 6], [7]], 2, SAMPLING)
    asked = engine.llm.calls[-1]
    assert [(p.n, p.temperature, p.top_p, p.top_k, p.max_tokens) for p in asked] == [
        (2, 0.7, 1.0, 0, 6)
    ] * 2
    assert asked[0].seed != asked[1].seed
    assert (engine.llm.logprobs_mode, engine.llm.load_format) == ("processed_logprobs", "dummy")
    assert engine.llm.max_model_len == engine.policy.max_length


def test_answers_become_rollouts_in_order(engine: VLLMEngine) -> None:
    torch.manual_seed(0)
    found = engine.generate([[5, 6], [7]], 2, SAMPLING)
    assert [r.prompt_index for r in found] == [0, 0, 1, 1]
    assert [r.prompt for r in found] == [[5, 6], [5, 6], [7], [7]]
    for r in found:
        assert len(r.logp) == len(r.completion) <= 6
        assert r.finished == (r.completion[-1] == EOS)
    torch.manual_seed(0)
    assert engine.generate([[5, 6], [7]], 2, SAMPLING) == found


def test_log_probs_are_the_policys(engine: VLLMEngine) -> None:
    found = engine.generate([[5, 6], [7]], 2, SAMPLING)
    assert engine.gap < 1e-5
    assert [r.prompt for r in found] == [[5, 6], [5, 6], [7], [7]]
    assert agreement.gap(engine.policy, found, 0.7) < 1e-5
    assert agreement.gap(engine.policy, found, 1.0) > 1e-2


def test_an_engine_that_missed_an_update_is_found_out(engine: VLLMEngine) -> None:
    engine.generate([[5, 6]], 1, SAMPLING)
    with torch.no_grad():
        for p in engine.policy.model.parameters():
            p.mul_(3.0)
    engine.llm.deaf = True
    engine.sync()
    with pytest.raises(agreement.Disagreement, match="vLLM samples from another policy .* nats"):
        engine.generate([[5, 6]], 1, SAMPLING)
    engine.llm.deaf = False
    engine.sync()
    assert engine.llm.calls[-1] == "reset"
    engine.generate([[5, 6]], 1, SAMPLING)
    assert engine.gap < 1e-4


def test_the_gap_looks_at_whole_rollouts_within_its_tokens(engine: VLLMEngine) -> None:
    """Only the first rollout fits into 4 tokens; a second one that is far off does not count."""
    found = engine.generate([[5, 6]], 1, SamplingConfig(max_new_tokens=2, temperature=1.0))
    wrong = Rollout(0, [5], [6, 7], [-50.0, -50.0], False)
    assert agreement.gap(engine.policy, [*found, wrong], 1.0, tokens=4) < 1e-5
    assert agreement.gap(engine.policy, [*found, wrong], 1.0, tokens=7) > 10
    assert agreement.gap(engine.policy, [wrong, *found], 1.0, tokens=1) > 10


def test_without_a_gpu_or_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(False)
    arguments: Any = (policy, SimpleNamespace(eos_token_id=EOS), dict, tmp_path)
    with pytest.raises(UserError, match="expected a policy on a GPU, got one on cpu"):
        VLLMEngine(*arguments)
    monkeypatch.setattr(
        policy, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))])
    )
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'fastalign\[vllm\]'"):
        VLLMEngine(*arguments)
