"""Packed attention: a pack gives what a padded batch gives, and its sequences do not meet."""

import types
from typing import Any

import pytest
import torch
from ragged_kernels import STAND_INS, install
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, MistralConfig, MistralModel

from fastalign.data.packing import pack
from fastalign.errors import UserError
from fastalign.models import attention_kernels
from fastalign.models.attention import (
    NAME,
    attention,
    check_packed,
    packed_attention,
    packed_hidden,
    register,
)
from fastalign.models.attention_kernels import KERNELS, chosen, installed, using
from fastalign.testing import assert_no_worse
from fastalign.train.optim import OptimConfig

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


def test_no_mask_of_tokens_by_tokens_is_made_and_like_lengths_share_a_call(monkeypatch):
    """The cost is the sum of squares: what SDPA gets are sequences, no mask, no padding."""
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((q.shape[0], q.shape[2], attn_mask))
        return plain(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    packed_hidden(trunk("llama"), pack(SEQUENCES))
    assert seen == [(1, 3, None), (1, 1, None), (1, 11, None), (1, 5, None)] * 2
    seen.clear()
    long = [7] * 129  # a long one has enough to do by itself
    packed_hidden(trunk("llama"), pack([[1, 2, 3], [4], long, [5, 6, 7], long, [8, 9, 10]]))
    assert seen == [(3, 3, None), (1, 1, None), (1, 129, None), (1, 129, None)] * 2


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


# --- the kernels, on the same packed queries, keys and values ------------------------------------

LENGTHS = [3, 1, 11, 5, 3, 130, 3, 1, 130]


def ragged(heads, kv_heads, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(2)
    tensors = [
        torch.randn(1, h, sum(LENGTHS), 16, generator=g).to(device, dtype)
        for h in (heads, kv_heads, kv_heads)
    ]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    segments = {"cu_seq_lens_q": cu, "max_length_q": max(LENGTHS), "segment_lengths": LENGTHS}
    return tensors, segments


def attend(qkv, segments, **options):
    query, key, value = qkv
    return packed_attention(torch.nn.Identity(), query, key, value, None, **segments, **options)[0]


def alone(qkv, segments, scaling, is_causal):
    """Each sequence by itself, keys and values of shared heads written out; [1, N, heads, d]."""
    query, key, value = qkv
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    rows = [t.split(LENGTHS, dim=2) for t in (query, key, value)]
    out = []
    for q, k, v in zip(*rows, strict=True):
        scores = q @ k.transpose(2, 3) * scaling
        if is_causal:
            n = q.shape[2]
            scores = scores.masked_fill(
                ~torch.ones(n, n, device=q.device).tril().bool(), -torch.inf
            )
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, dim=2).transpose(1, 2)


def with_gradients(attention_, tensors, segments, **options):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = attention_(leaves, segments, **options)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


def compare(made, causal):
    qkv, segments = made
    options = {"scaling": 0.4, "is_causal": causal}
    ours = with_gradients(attend, qkv, segments, **options)
    eager = with_gradients(alone, qkv, segments, **options)
    truth = with_gradients(alone, [t.double() for t in qkv], segments, **options)
    assert ours[0].shape == (1, sum(LENGTHS), 4, 16)
    for found, plain, true in zip(ours, eager, truth, strict=True):
        assert_no_worse(found, plain, true, qkv[0].dtype, grad=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sdpa_equals_sequences_alone(kv_heads, causal):
    compare(ragged(4, kv_heads), causal)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["auto", *KERNELS])
def test_every_kernel_that_is_there_equals_sequences_alone(name, dtype, kv_heads, causal):
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    with using(name):
        compare(ragged(4, kv_heads, dtype, "cuda"), causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", STAND_INS)
def test_what_ragged_kernels_are_given(monkeypatch, name, kv_heads, causal):
    def check(cu_q, cu_k, max_q, max_k):
        assert (max_q, max_k) == (130, 130) and torch.equal(cu_q, cu_k)

    install(monkeypatch, name, check)
    compare(ragged(4, kv_heads), causal)


def test_a_kernel_asked_for_by_name_runs_or_says_why_not(monkeypatch):
    qkv, segments = ragged(4, 4)
    with pytest.raises(UserError, match="unknown attention 'flash3': expected auto, sdpa, varlen"):
        OptimConfig(attention="flash3")
    for name, package in (("flash2", "flash-attn"), ("flash4", "flash-attn-4")):
        monkeypatch.setattr(attention_kernels, "find_spec", lambda _: None)
        assert not installed(name)
        with pytest.raises(UserError, match=f"attention {name} needs the package {package}, "):
            OptimConfig(attention=name)
    with using("varlen"):
        with pytest.raises(UserError, match="attention varlen: expected CUDA tensors of float16"):
            attend(qkv, segments)
        # A model is loaded and checked all the same: on a CPU, say, before it goes to the GPU.
        register()
        check_packed(
            (model := trunk("llama")),
            lambda packed: packed_hidden(model, packed),
            lambda ids: model(input_ids=ids).last_hidden_state,
        )
    assert attend(qkv, segments).shape == (1, sum(LENGTHS), 4, 16)
    for low in (torch.bfloat16, torch.float16):
        fits: Any = types.SimpleNamespace(is_cuda=True, dtype=low, device=torch.device("cuda"))
        assert (chosen(fits, 0.0), chosen(fits, 0.1)) == ("varlen", "sdpa")
        with using("sdpa"):
            assert chosen(fits, 0.0) == "sdpa"


def test_which_kernel_runs_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr("fastalign.models.attention._announced", set())
    qkv, segments = ragged(4, 4)
    model = trunk("llama")
    with caplog.at_level("INFO", logger="fastalign"):
        check_packed(
            model,
            lambda packed: packed_hidden(model, packed),
            lambda ids: model(input_ids=ids).last_hidden_state,
        )
        assert caplog.messages == []  # a look at the model, before it is where it will run
        for _ in range(2):
            attend(qkv, segments)
    assert caplog.messages == ["packed attention: sdpa (cpu, torch.float32)"]
