"""The formula for a model's FLOPs against torch's own count of the operations that ran.

torch counts the whole square of every attention; the formula counts half of it for a causal model.
"""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3MoeConfig,
)

from fastalign.data.packing import pack
from fastalign.models import Policy, RewardEnsemble
from fastalign.models.flops import forward_flops, training_flops
from fastalign.models.reward import EnsembleConfig

LENGTHS = [3, 17, 40]
SEQUENCES = [[(7 * i + t) % 90 for t in range(n)] for i, n in enumerate(LENGTHS)]
PROMPTS = [1, 9, 25]
ROWS = sum(LENGTHS) - sum(PROMPTS)
TOLERANCE = 1e-3  # the formula leaves out the angles of rotary embeddings, a product of their own
TOKENS, SQUARES = sum(LENGTHS), sum(t * t for t in LENGTHS)


def llama(**changes):
    return LlamaConfig(
        vocab_size=90,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        **{"num_key_value_heads": 4, "tie_word_embeddings": True, **changes},
    )


CONFIGS = {
    "llama": llama(),
    "grouped heads, untied": llama(num_key_value_heads=2, tie_word_embeddings=False),
    "head width of its own": llama(head_dim=32, attention_bias=True),
    "gpt2": GPT2Config(vocab_size=90, n_embd=64, n_layer=2, n_head=4, n_positions=64),
}
ATTENTION = {  # heads * head width * layers
    "llama": 64 * 3,
    "grouped heads, untied": 64 * 3,
    "head width of its own": 4 * 32 * 3,
    "gpt2": 64 * 2,
}


def policy(config):
    torch.manual_seed(0)
    return Policy(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


def forward(model):
    """All that runs with the head at the response rows, as plain products."""
    packed = pack(SEQUENCES, PROMPTS)
    return torch.nn.functional.linear(model.response_hidden(packed), model.head_weight)


def counted(work):
    # In plain products: torch does not count its fused attention on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_backward_against_torchs_count(name):
    model = policy(CONFIGS[name])
    half = 2 * ATTENTION[name] * SQUARES  # what the formula leaves out of the square
    once = counted(lambda: forward(model))
    assert forward_flops(model, LENGTHS, ROWS) == pytest.approx(once - half, rel=TOLERANCE)
    both = counted(lambda: forward(model).sum().backward())
    assert training_flops(model, LENGTHS, ROWS) == pytest.approx(
        3 * forward_flops(model, LENGTHS, ROWS)
    )
    assert training_flops(model, LENGTHS, ROWS) == pytest.approx(both - 3 * half, rel=TOLERANCE)


def test_by_hand():
    """Llama, 64 wide: q and o 64 x 64 each, k and v 64 x 32 each, three of 64 x 96; 3 layers."""
    model = policy(llama(num_key_value_heads=2))
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    attention = 3 * 2 * 2 * 64 / 2  # two products of 2 * 64 * T^2, half of them seen
    expected = 2 * matrices * TOKENS + attention * SQUARES
    assert forward_flops(model, LENGTHS, 0) == expected
    assert forward_flops(model, LENGTHS, 5) == expected + 5 * 2 * 64 * 90
    assert forward_flops(model, [], 0) == 0


def test_an_encoder_sees_the_whole_square():
    config = BertConfig(
        vocab_size=90,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    encoder = AutoModel.from_config(config, attn_implementation="sdpa")
    ensemble = RewardEnsemble(encoder, EnsembleConfig(n_heads=5))
    once = counted(lambda: ensemble(pack(SEQUENCES)))
    assert forward_flops(ensemble, LENGTHS, len(LENGTHS)) == pytest.approx(once, rel=TOLERANCE)


def test_what_is_frozen_has_no_weight_gradient():
    model = policy(llama())
    whole = forward_flops(model, LENGTHS, ROWS)
    head = 2 * ROWS * 64 * 90
    model.requires_grad_(False)
    assert training_flops(model, LENGTHS, ROWS) == whole
    model.head_weight.requires_grad_(True)  # tied: the embedding's, which costs nothing
    assert training_flops(model, LENGTHS, ROWS) == whole + head
    layer = model.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    own = 2 * TOKENS * layer.numel()
    assert training_flops(model, LENGTHS, ROWS) == whole + head + whole + own + (
        2 * 3 * 2 * 64 * SQUARES - 3 * 2 * 64 * SQUARES  # attention has no weights: twice, not once
    )


def test_of_a_mixture_the_experts_a_token_meets():
    def moe(per_token, experts=8):
        config = Qwen3MoeConfig(
            vocab_size=90,
            hidden_size=64,
            moe_intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=experts,
            num_experts_per_tok=per_token,
        )
        return forward_flops(AutoModelForCausalLM.from_config(config), LENGTHS, 0)

    expert = 2 * TOKENS * 2 * 3 * 64 * 48  # two layers, three matrices
    assert moe(3) - moe(2) == expert
    assert moe(2, 16) - moe(2, 8) == 2 * TOKENS * 2 * 64 * 8  # the router's rows


def test_what_is_not_known_is_not_a_number():
    model = policy(llama())
    model.model.config.kv_lora_rank = 8
    assert math.isnan(forward_flops(model, LENGTHS, ROWS))
    assert math.isnan(training_flops(model, LENGTHS, ROWS))
    model = policy(llama())
    model.model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(2, 3, 4))
    assert math.isnan(forward_flops(model, LENGTHS, ROWS))
