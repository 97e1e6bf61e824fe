"""Sampling: recorded log-probs, where responses end, order, padding, ids as they are."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.data.packing import pack
from fastalign.data.tokenizer import train_tokenizer
from fastalign.errors import UserError
from fastalign.models import Policy
from fastalign.rollout import SamplingConfig, TransformersEngine
from fastalign.testing import assert_no_worse

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 40
PROMPTS = [[5, 9, 3, 30, 31, 32, 33], [7], [11, 12, 13], [20, 19, 18, 17, 16]]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["$$ $$ $$"], 260)  # EOS is 0, padding 1, $ is 5


@pytest.fixture
def policy():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=64,
        )
    )
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    return Policy(model)


def recomputed(policy, rollouts, temperature, dtype=torch.float32):
    """Log-probs of the responses by transformers' forward on each whole sequence alone."""
    policy.model.to(dtype).set_attn_implementation("eager")
    rows = []
    with torch.no_grad():
        for r in rollouts:
            logits = policy.model(input_ids=torch.tensor([r.prompt + r.completion])).logits[0]
            logp = (logits / temperature).log_softmax(-1)[len(r.prompt) - 1 : -1]
            rows.append(logp.gather(1, torch.tensor(r.completion)[:, None])[:, 0])
    return torch.cat(rows)


def recorded(rollouts):
    return torch.tensor([x for r in rollouts for x in r.logp])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("defaults", [{}, {"top_k": 3, "top_p": 0.5, "repetition_penalty": 1.9}])
def test_recorded_logprobs_are_those_of_the_policy(policy, tokenizer, defaults, temperature):
    """Whatever the model's own generation_config holds: it must not bend the distribution."""
    for name, value in defaults.items():
        setattr(policy.model.generation_config, name, value)
    kept = policy.model.generation_config.to_dict()
    sampling = SamplingConfig(max_new_tokens=12, temperature=temperature)
    rollouts = TransformersEngine(policy, tokenizer).generate(PROMPTS, 8, sampling)
    assert policy.model.generation_config.to_dict() == kept
    packed = pack([r.prompt + r.completion for r in rollouts], [len(r.prompt) for r in rollouts])
    with torch.no_grad():
        trainer = policy.logprobs(packed, temperature=temperature)[0]
    eager = recomputed(policy, rollouts, temperature)
    truth = recomputed(policy, rollouts, temperature, torch.float64)
    assert_no_worse(recorded(rollouts), eager, truth, torch.float32)
    assert_no_worse(trainer, eager, truth, torch.float32)
    # With top_k = 3 no more than three tokens could follow a prompt.
    first = {r.completion[0] for r in rollouts if r.prompt_index == 1}
    assert len(first) > 3


def test_samples_follow_the_distribution(policy, tokenizer):
    """4,000 first tokens against the model's own probabilities, by chi-square."""
    sampling = SamplingConfig(max_new_tokens=1, temperature=0.7, batch_size=4000)
    rollouts = TransformersEngine(policy, tokenizer).generate([PROMPTS[0]], 4000, sampling)
    policy.model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = 4000 * (logits / 0.7).softmax(-1)
    seen = Counter(r.completion[0] for r in rollouts)
    counts = torch.tensor([float(seen[i]) for i in range(VOCAB)])
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 39 + 5 * (2 * 39) ** 0.5  # 39 degrees of freedom, five deviations


def test_every_token_of_a_larger_vocabulary_can_be_drawn(tokenizer):
    """`generate` keeps the 50 likeliest unless told otherwise; here 400 are all but equal."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=400,
    )
    policy = Policy(LlamaForCausalLM(config))
    sampling = SamplingConfig(max_new_tokens=1, batch_size=4000)
    rollouts = TransformersEngine(policy, tokenizer).generate([PROMPTS[0]], 4000, sampling)
    assert len({r.completion[0] for r in rollouts}) > 380


def make_eos_likely(policy, shift):
    """EOS's logit gets a constant: the hidden state gets a coordinate that is always 1."""
    base = policy.model.get_output_embeddings()
    head = torch.nn.Linear(32, VOCAB)
    head.weight = base.weight
    torch.nn.init.zeros_(head.bias)
    head.bias.data[0] = shift
    policy.model.set_output_embeddings(head)


def test_a_response_ends_at_its_eos(policy, tokenizer):
    make_eos_likely(policy, 2.0)
    sampling = SamplingConfig(max_new_tokens=10, batch_size=16)
    rollouts = TransformersEngine(policy, tokenizer).generate(PROMPTS, 16, sampling)
    finished = [r for r in rollouts if r.finished]
    unfinished = [r for r in rollouts if not r.finished]
    assert len(finished) > 20 and len(unfinished) > 2
    for r in finished:
        assert r.completion[-1] == 0 and 0 not in r.completion[:-1] and len(r.completion) <= 10
    for r in unfinished:
        assert 0 not in r.completion and len(r.completion) == 10
    assert all(len(r.logp) == len(r.completion) for r in rollouts)
    lengths = {len(r.completion) for r in finished}
    assert len(lengths) > 3
    truth = recomputed(policy, rollouts, 1.0, torch.float64)
    policy.model.float()
    eager = recomputed(policy, rollouts, 1.0)
    assert_no_worse(recorded(rollouts), eager, truth, torch.float32)


def test_all_end_at_once(policy, tokenizer):
    make_eos_likely(policy, 60.0)
    rollouts = TransformersEngine(policy, tokenizer).generate(
        PROMPTS, 2, SamplingConfig(max_new_tokens=10)
    )
    assert [r.completion for r in rollouts] == [[0]] * 8
    assert all(r.finished for r in rollouts)
    assert recorded(rollouts).abs().max() < 1e-6


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_samples_of_a_prompt_stand_together_in_prompt_order(policy, tokenizer, batch_size):
    sampling = SamplingConfig(max_new_tokens=3, batch_size=batch_size)
    rollouts = TransformersEngine(policy, tokenizer).generate(PROMPTS, 3, sampling)
    assert [r.prompt_index for r in rollouts] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(r.prompt == PROMPTS[r.prompt_index] for r in rollouts)
    assert len({tuple(r.completion) for r in rollouts}) > 8


def test_token_ids_are_what_the_model_saw(policy, tokenizer):
    """Ids that decode to other text, and text that encodes to other ids, come through untouched."""
    odd = [[5, 5, 5, 5], [39, 38, 2]]
    assert len(tokenizer(tokenizer.decode(odd[0]))["input_ids"]) == 2  # as text: $$ twice
    rollouts = TransformersEngine(policy, tokenizer).generate(
        odd, 2, SamplingConfig(max_new_tokens=4)
    )
    assert [r.prompt for r in rollouts] == [odd[0]] * 2 + [odd[1]] * 2
    assert all(0 <= t < VOCAB for r in rollouts for t in r.completion)


def test_the_seed_decides_and_the_policy_is_left_as_it_was(policy, tokenizer):
    engine = TransformersEngine(policy, tokenizer)
    policy.train()
    found: list[Any] = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(engine.generate(PROMPTS, 2, SamplingConfig(max_new_tokens=8)))
    assert found[0] == found[1] != found[2]
    assert policy.training and policy.model.config._attn_implementation == "fastalign_packed"


def test_a_prompt_that_does_not_fit_is_an_error(policy, tokenizer):
    engine = TransformersEngine(policy, tokenizer)
    sampling = SamplingConfig(max_new_tokens=60)
    fits = engine.generate([[5] * 4], 1, sampling)
    assert len(fits) == 1
    with pytest.raises(
        ValueError, match=r"prompt 1 has 5 tokens; expected 1 to 4 \(context 64 less max_new_tokens"
    ):
        engine.generate([[5] * 4, [5] * 5], 1, sampling)
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        engine.generate([[]], 1, sampling)


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": -1.0}, {"batch_size": 0}]
)
def test_sampling_that_makes_no_sense_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"sampling: expected {name} >"):
        SamplingConfig(**wrong)


@pytest.mark.parametrize("prompts", [PROMPTS, [[7], [9]]])
def test_a_prompt_is_read_once_whatever_the_number_of_its_responses(
    policy, tokenizer, monkeypatch, prompts
):
    """The same draws and log-probs as of every response with a prompt of its own."""
    shapes = []
    plain = type(policy.model.model).forward

    def forward(self, input_ids=None, **options):
        shapes.append(tuple(input_ids.shape))
        return plain(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(policy.model.model), "forward", forward)
    engine, sampling = TransformersEngine(policy, tokenizer), SamplingConfig(max_new_tokens=6)
    torch.manual_seed(4)
    shared = engine.generate(prompts, 5, sampling)
    width = max(len(p) for p in prompts)
    read = [(len(prompts), width - 1)] if width > 1 else []
    assert shapes[: len(read) + 1] == [*read, (5 * len(prompts), 1)]
    monkeypatch.setattr(TransformersEngine, "_read", lambda *_: None)
    torch.manual_seed(4)
    alone = engine.generate(prompts, 5, sampling)
    assert [r.completion for r in shared] == [r.completion for r in alone]
    assert (recorded(shared) - recorded(alone)).abs().max() < 1e-5
    assert len({tuple(r.completion) for r in shared}) > len(prompts)
