"""Packed attention: a pack gives what a padded batch gives, and its sequences do not meet."""

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, MistralConfig, MistralModel

from fastalign.data.packing import pack
from fastalign.errors import UserError
from fastalign.models.attention import (
    NAME,
    _varlen,
    attention,
    packed_attention,
    packed_hidden,
    register,
)
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


def ragged(heads, kv_heads, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(2)
    lengths = [3, 1, 11, 5]
    q, k, v = (
        torch.randn(1, h, 20, 16, generator=g).to(device, dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    cu = torch.tensor([0, 3, 4, 15, 20], dtype=torch.int32, device=device)
    segments = {"cu_seq_lens_q": cu, "max_length_q": 11, "segment_lengths": lengths}
    return (q, k, v), segments


def attend(qkv, segments, **options):
    query, key, value = qkv
    return packed_attention(torch.nn.Identity(), query, key, value, None, **segments, **options)[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("signature", ["window", "is_causal"])
def test_what_flash_attention_is_given(monkeypatch, signature, kv_heads, causal):
    """torch's ragged attention needs CUDA; one with its two signatures stands in for it here."""

    def by_rows(q, k, v, cu, causal, scale):
        out = []
        for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False):
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
            if causal:
                scores = scores.masked_fill(~torch.ones(b - a, b - a).tril().bool(), -torch.inf)
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b]))
        return torch.cat(out)

    def newer(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
    ):
        assert (max_q, max_k) == (11, 11) and torch.equal(cu_seq_q, cu_seq_k)
        return by_rows(query, key, value, cu_seq_q, window_size == (-1, 0), scale)

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        assert (max_q, max_k) == (11, 11) and torch.equal(cu_seq_q, cu_seq_k)
        return by_rows(query, key, value, cu_seq_q, is_causal, query.shape[-1] ** -0.5)

    stand_in = newer if signature == "window" else older
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    qkv, segments = ragged(4, kv_heads)
    options = {"scaling": 0.4, "is_causal": causal}
    eager = attend(qkv, segments, **options)
    truth = attend([t.double() for t in qkv], segments, **options)
    query, key, value = qkv
    ours = _varlen(query, key, value, segments["cu_seq_lens_q"], 11, 0.4, causal)
    assert ours.shape == (1, 20, 4, 16)
    assert_no_worse(ours, eager, truth, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_attention_equals_segment_by_segment(dtype, kv_heads, causal):
    (q, k, v), segments = ragged(4, kv_heads, dtype, "cuda")
    options = {"scaling": 0.25, "is_causal": causal}
    on_cpu = segments | {"cu_seq_lens_q": segments["cu_seq_lens_q"].cpu()}
    results = []
    for tensors, where in (
        ((q, k, v), segments),
        ((q.cpu(), k.cpu(), v.cpu()), on_cpu),
        ((q.double().cpu(), k.double().cpu(), v.double().cpu()), on_cpu),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = attend(leaves, where, **options)
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    for ours, eager, truth in zip(*results, strict=True):
        assert_no_worse(ours, eager, truth, dtype, grad=True)
