"""Packed attention: a pack gives what a padded batch gives, and its sequences do not meet."""

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, MistralConfig, MistralModel

from fastalign.data.packing import pack
from fastalign.errors import UserError
from fastalign.models.attention import NAME, attention, packed_attention, packed_hidden, register
from fastalign.testing import assert_no_worse

SEQUENCES = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [20, 19, 18, 17, 16]]
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 40,
}


def trunk(kind):
    register()
    torch.manual_seed(1)
    model: Any
    if kind == "bert":
        model = BertModel(BertConfig(**SMALL, num_attention_heads=4), add_pooling_layer=False)
    else:
        heads = 1 if kind == "grouped" else 4
        model = LlamaModel(LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=heads))
    model.set_attn_implementation(NAME)
    return model.eval()


def padded_hidden(model, sequences):
    """Right-padded with an attention mask, by transformers' own eager attention."""
    longest = max(len(s) for s in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, s in enumerate(sequences):
        ids[i, : len(s)] = torch.tensor(s)
        mask[i, : len(s)] = 1
    with attention(model, "eager"):
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return torch.cat([out[i, : len(s)] for i, s in enumerate(sequences)])


def one_by_one(model, sequences):
    with attention(model, "eager"):
        rows = [model(input_ids=torch.tensor([s])).last_hidden_state[0] for s in sequences]
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["llama", "grouped", "bert"])
def test_packed_equals_padded(kind):
    model = trunk(kind)
    packed = packed_hidden(model, pack(SEQUENCES))
    padded = padded_hidden(model, SEQUENCES)
    truth = one_by_one(model.double(), SEQUENCES)
    assert packed.shape == (20, 32)
    assert_no_worse(packed, padded, truth, torch.float32)


@pytest.mark.parametrize("kind", ["llama", "grouped", "bert"])
def test_gradients_of_packed_equal_those_of_padded(kind):
    model = trunk(kind)
    weight = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))

    def gradients(hidden, of=torch.float32):
        model.zero_grad()
        (hidden * weight.to(of)).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed = gradients(packed_hidden(model, pack(SEQUENCES)))
    padded = gradients(padded_hidden(model, SEQUENCES))
    model.double()
    truth = gradients(one_by_one(model, SEQUENCES), torch.float64)
    assert len(packed) == len(padded) == len(truth) > 10
    largest = max(t.abs().max() for t in truth)
    for ours, theirs, true in zip(packed, padded, truth, strict=True):
        # Relative to the largest gradient of the model: a key's bias has a gradient of 0.
        one = torch.ones(1)
        assert_no_worse(
            torch.cat([ours.flatten() / largest, one]),
            torch.cat([theirs.flatten() / largest, one]),
            torch.cat([true.flatten() / largest, one]),
            torch.float32,
            grad=True,
        )


@pytest.mark.parametrize("kind", ["llama", "grouped", "bert"])
def test_sequences_of_a_pack_do_not_see_each_other(kind):
    """Other tokens, and another length, in one sequence leave the others' rows bit for bit."""
    model = trunk(kind)
    before = packed_hidden(model, pack(SEQUENCES))
    other = packed_hidden(model, pack([*SEQUENCES[:2], [30] * 11, SEQUENCES[3]]))
    assert torch.equal(before[:4], other[:4]) and torch.equal(before[15:], other[15:])
    assert (before[4:15] - other[4:15]).abs().max() > 0.1
    longer = packed_hidden(model, pack([*SEQUENCES[:2], [30] * 17, SEQUENCES[3]]))
    assert_no_worse(longer[:4], before[:4], before[:4].double(), torch.float32)
    assert_no_worse(longer[21:], before[15:], before[15:].double(), torch.float32)


def test_a_causal_trunk_does_not_see_the_future_and_an_encoder_does():
    changed = [*SEQUENCES[:3], [20, 19, 18, 17, 39]]
    for kind, equal in (("llama", True), ("bert", False)):
        model = trunk(kind)
        one, two = (packed_hidden(model, pack(s))[15:19] for s in (SEQUENCES, changed))
        assert torch.equal(one, two) is equal


def test_no_mask_of_tokens_by_tokens_is_made(monkeypatch):
    """The cost is the sum of squares: what SDPA gets is one sequence at a time and no mask."""
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((q.shape[2], attn_mask))
        return plain(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    packed_hidden(trunk("llama"), pack(SEQUENCES))
    assert seen == [(3, None), (1, None), (11, None), (5, None)] * 2


def test_a_sliding_window_shorter_than_a_sequence_is_refused():
    register()
    config = MistralConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=4, head_dim=8, sliding_window=8
    )
    model = MistralModel(config).eval()
    model.set_attn_implementation(NAME)
    short = [s for s in SEQUENCES if len(s) <= 8]
    truth = one_by_one(model, short)
    assert_no_worse(packed_hidden(model, pack(short)), truth, truth.double(), torch.float32)
    with pytest.raises(UserError, match="sliding window is 8 tokens, a sequence has 11"):
        packed_hidden(model, pack(SEQUENCES))


def test_what_packed_attention_cannot_do_is_refused():
    q = torch.randn(1, 2, 4, 8)
    segments: dict[str, Any] = {
        "cu_seq_lens_q": torch.tensor([0, 4]),
        "max_length_q": 4,
        "segment_lengths": [4],
    }
    with pytest.raises(ValueError, match="expected cu_seq_lens_q"):
        packed_attention(torch.nn.Identity(), q, q, q, None)
    for name in ("softcap", "position_bias", "s_aux"):
        with pytest.raises(UserError, match=f"the model needs {name}"):
            packed_attention(torch.nn.Identity(), q, q, q, None, **(segments | {name: 1.0}))
    out, _ = packed_attention(torch.nn.Identity(), q, q, q, None, softcap=None, **segments)
    assert out.shape == (1, 4, 2, 8)
