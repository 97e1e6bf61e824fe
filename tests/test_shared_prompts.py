"""Packs that hold a prompt once, batches and passes that count it so, and attention to it."""

import random
from typing import Any

import pytest
import torch
from ragged_kernels import STAND_INS, install

from fastalign.data.packing import (
    Prompts,
    batches_of,
    held,
    pack,
    same_prompts,
    token_budget_batches,
)
from fastalign.models.attention import NotCausal, packed_attention
from fastalign.models.attention_kernels import KERNELS, TOGETHER, installed, using
from fastalign.testing import assert_no_worse
from fastalign.train.distributed import Micro, plan_micros


def test_hand_worked_pack():
    sequences = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7], [1, 2, 3], [5, 6, 4]]
    packed = pack(sequences, [2, 2, 2, 1, 2], share=True)
    assert packed.input_ids.tolist() == [5, 6, 7, 8, 9, 7, 1, 2, 3, 5, 6, 4]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 2, 2, 0, 1, 2, 0, 1, 2]
    assert packed.cu_seqlens.tolist() == [0, 4, 5, 6, 9, 12] and packed.lengths == (4, 1, 1, 3, 3)
    assert packed.max_seqlen == 4 and packed.n_sequences == 5
    assert packed.last_index.tolist() == [3, 4, 5, 8, 11]
    # 6, in place 1, is followed by 7, 9 and 7. The last sequence comes too late to share it.
    assert packed.kept.tolist() == [1, 2, 1, 1, 6, 7, 10]
    assert packed.response_targets.tolist() == [7, 8, 9, 7, 2, 3, 4]
    assert packed.shared is not None
    assert packed.shared.spans == ((0, 0), (0, 2), (0, 2), (0, 0), (0, 0))
    assert packed.shared.keys.tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 1, 5, 6, 7, 8, 9, 10, 11]
    assert packed.shared.cu_seqlens.tolist() == [0, 4, 7, 10, 13, 16]
    assert packed.shared.cu_seqlens.dtype == torch.int32
    moved = packed.to("meta").shared
    assert moved is not None and moved.keys.device.type == moved.cu_seqlens.device.type == "meta"


def groups(seed, n_prompts=4):
    """Answers of 1 to 9 tokens, one to four for a prompt of 1 to 9; prompts from few tokens."""
    rng = random.Random(seed)
    sequences, prompts = [], []
    for _ in range(n_prompts):
        prompt = [rng.randrange(5) for _ in range(rng.choice((1, 2, 9)))]
        for _ in range(rng.choice((1, 1, 2, 4))):
            sequences.append(prompt + [rng.randrange(24) for _ in range(rng.choice((1, 3, 9)))])
            prompts.append(len(prompt))
    return sequences, prompts


@pytest.mark.parametrize("seed", range(20))
def test_what_a_shared_pack_reads_are_its_sequences(seed):
    sequences, prompts = groups(seed)
    packed, plain = pack(sequences, prompts, share=True), pack(sequences, prompts)
    assert packed.response_targets.equal(plain.response_targets)
    assert packed.position_ids[packed.kept].equal(plain.position_ids[plain.kept])
    assert packed.input_ids[packed.kept].equal(plain.input_ids[plain.kept])
    assert packed.input_ids[packed.last_index].tolist() == [s[-1] for s in sequences]
    assert packed.max_seqlen == plain.max_seqlen
    numbers = same_prompts(s[:n] for s, n in zip(sequences, prompts, strict=True))
    own, before = held([range(len(sequences))], [len(s) for s in sequences], numbers)
    assert list(packed.lengths) == own == packed.cu_seqlens.diff().tolist()
    assert sum(own) + sum(before) == plain.input_ids.numel()
    if packed.shared is None:
        assert packed.input_ids.equal(plain.input_ids) and sum(before) == 0
        return
    assert [n for _, n in packed.shared.spans] == before
    rows = packed.shared.keys.split(packed.shared.cu_seqlens.diff().tolist())
    for row, sequence in zip(rows, sequences, strict=True):
        assert packed.input_ids[row].tolist() == sequence
        assert packed.position_ids[row].tolist() == list(range(len(sequence)))


def test_what_is_not_shared():
    """Without being asked; a prompt that only begins like another; what is nothing but prompt."""
    assert pack([[1, 2, 3], [1, 2, 4]], [2, 2]).shared is None
    assert pack([[1, 2, 3], [1, 2, 4]], share=True).shared is None
    assert pack([[1, 2, 3], [1, 2, 4]], [1, 2], share=True).shared is None
    assert pack([[1, 2], [1, 2]], [2, 2], share=True).lengths == (2, 2)
    packed = pack([[1, 2], [1, 2, 3]], [2, 2], share=True)
    assert packed.lengths == (2, 1) and packed.kept.tolist() == [1]
    assert packed.response_targets.tolist() == [3] and packed.last_index.tolist() == [1, 2]
    assert pack([], [], share=True).shared is None


# --- batches and passes ---------------------------------------------------------------------------

LENGTHS = [7, 4, 6, 5, 9, 4, 8]
PROMPTS = Prompts([0, 1, 0, 2, 0, 1, 3], [4, 2, 4, 1, 4, 2, 3])
"""Together 14 (7 + 2 + 5), 6 (4 + 2), 5 and 8."""


def test_a_prompt_counts_once_in_a_batch_and_its_sequences_stay_together():
    def batches(budget):
        return token_budget_batches(LENGTHS, budget, prompts=PROMPTS)

    assert batches(33) == [[0, 2, 4, 1, 5, 3, 6]]
    assert batches(20) == [[0, 2, 4, 1, 5], [3, 6]]
    assert batches(19) == [[0, 2, 4], [1, 5, 3, 6]]  # 14 + 6 > 19, and 6 + 5 + 8 = 19
    # 14 has no room: 7 + 2, then 9 with the prompt again, which leaves no room for 6.
    assert batches(13) == [[0, 2], [4], [1, 5, 3], [6]]
    assert batches(1) == [[i] for i in (0, 2, 4, 1, 5, 3, 6)]
    assert held(batches(13), LENGTHS, PROMPTS) == ([7, 2, 9, 4, 2, 5, 8], [0, 4, 0, 0, 2, 0, 0])
    assert batches_of([6, 5, 4, 2, 1], LENGTHS, 20, PROMPTS) == [[6, 5, 1], [4, 2]]


@pytest.mark.parametrize("seed", range(10))
def test_batches_keep_every_index_and_the_budget(seed):
    sequences, prompts = groups(seed, 12)
    order = random.Random(seed).sample(range(len(sequences)), len(sequences))
    sequences = [sequences[i] for i in order]
    prompts = [prompts[i] for i in order]
    asked = same_prompts(s[:n] for s, n in zip(sequences, prompts, strict=True))
    lengths = [len(s) for s in sequences]
    found = token_budget_batches(lengths, 25, prompts=asked)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        packed = pack([sequences[i] for i in batch], [prompts[i] for i in batch], share=True)
        assert sum(held([batch], lengths, asked)[0]) == packed.input_ids.numel() <= 25
    for number in set(asked.ids):
        members = [i for i in range(len(lengths)) if asked.ids[i] == number]
        together = sum(held([members], lengths, asked)[0]) <= 25
        assert sum(bool(set(members) & set(batch)) for batch in found) == 1 or not together


def test_a_prompts_sequences_go_to_one_process():
    """An even share is 17 tokens: 14 | 8, then 6 to the second and 5 to the first."""
    plans = plan_micros(range(7), LENGTHS, 100, 2, PROMPTS)
    assert plans == [[Micro([0, 2, 4, 3])], [Micro([1, 5, 6])]]
    # Of 14 tokens of one prompt an even share is 7: each of its sequences goes where it fits.
    assert plan_micros([0, 2, 4], LENGTHS, 100, 2, PROMPTS) == [[Micro([4])], [Micro([0, 2])]]
    one = plan_micros(range(7), LENGTHS, 20, 1, PROMPTS)
    assert one == [[Micro([0, 2, 4, 1, 5]), Micro([3, 6])]]


def test_a_plan_looks_at_each_sequence_a_few_times():
    """And not once for every prompt: a million times here."""

    class Counted(list[int]):
        looked = 0

        def __getitem__(self, i: Any) -> Any:
            Counted.looked += 1
            return super().__getitem__(i)

    asked = Prompts(Counted(range(1000)), [3] * 1000)
    (plan,) = plan_micros(range(1000), [5] * 1000, 50, 1, asked)
    assert [micro.rows for micro in plan] == [list(range(k, k + 10)) for k in range(0, 1000, 10)]
    assert 1000 <= Counted.looked <= 20_000


# --- attention ------------------------------------------------------------------------------------

PROMPT_SIZES = [3, 1, TOGETHER, 1, 40]
ANSWERS = [[2, 4, 2, 2], [1, 1], [5, 30], [6], [90, 90, 7]]


def ragged(heads, kv_heads, dtype=torch.float32, device="cpu"):
    """Queries, keys and values of the pack, and its segments."""
    made = [
        (p, [100 * p] * p + [j + 1] * a)
        for p, answers in zip(PROMPT_SIZES, ANSWERS, strict=True)
        for j, a in enumerate(answers)
    ]
    packed = pack([s for _, s in made], [p for p, _ in made], share=True).to(device)
    g = torch.Generator().manual_seed(2)
    n = packed.input_ids.numel()
    assert n == sum(PROMPT_SIZES) + sum(map(sum, ANSWERS)) and packed.shared is not None
    tensors = [
        torch.randn(1, h, n, 16, generator=g).to(device, dtype) for h in (heads, kv_heads, kv_heads)
    ]
    return tensors, packed


def attend(tensors, packed, causal=True):
    query, key, value = tensors
    return packed_attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        cu_seq_lens_q=packed.cu_seqlens,
        max_length_q=packed.max_seqlen,
        segment_lengths=packed.lengths,
        shared_prompts=packed.shared,
        scaling=0.4,
        is_causal=causal,
    )[0]


def alone(tensors, packed):
    """Each sequence whole and by itself; of the prompt's rows those of the first that has it."""
    query, key, value = tensors
    many = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(many, 1), value.repeat_interleave(many, 1)
    out = []
    for rows, n in zip(
        packed.shared.keys.split(packed.shared.cu_seqlens.diff().tolist()),
        packed.lengths,
        strict=True,
    ):
        q, k, v = (t.index_select(2, rows) for t in (query, key, value))
        scores = q @ k.transpose(2, 3) * 0.4
        ahead = torch.ones(len(rows), len(rows), device=q.device).triu(1).bool()
        out.append((scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v)[:, :, -n:])
    return torch.cat(out, dim=2).transpose(1, 2)


def compare(tensors, packed):
    def with_gradients(attention, given):
        leaves = [t.clone().requires_grad_() for t in given]
        out = attention(leaves, packed)
        out.square().sum().backward()
        return [out.detach(), *(t.grad for t in leaves)]

    ours = with_gradients(attend, tensors)
    eager = with_gradients(alone, tensors)
    truth = with_gradients(alone, [t.double() for t in tensors])
    assert ours[0].shape == (1, tensors[0].shape[2], 4, 16)
    for found, plain, true in zip(ours, eager, truth, strict=True):
        assert_no_worse(found, plain, true, tensors[0].dtype, grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_sdpa_equals_sequences_alone(kv_heads, dtype):
    compare(*ragged(4, kv_heads, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["auto", *KERNELS])
def test_every_kernel_that_is_there_equals_sequences_alone(name, dtype, kv_heads):
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    if dtype == torch.float32 and name not in ("auto", "sdpa"):
        pytest.skip(f"{name} has no float32")
    with using(name):
        compare(*ragged(4, kv_heads, dtype, "cuda"))


def test_alike_answers_share_a_call_and_masks_are_of_answers(monkeypatch):
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        mask = None if attn_mask is None else tuple(attn_mask.shape)
        seen.append((len(q), q.shape[2], k.shape[2], mask, options["is_causal"]))
        return plain(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    attend(*ragged(4, 4))
    assert seen == [
        (1, 5, 5, None, True),
        (1, 4, 7, (4, 7), False),
        (2, 2, 5, (2, 5), False),
        (1, 2, 2, None, True),
        (1, 1, 2, (1, 2), False),
        (1, 133, 133, None, True),
        (1, 30, 158, (30, 158), False),
        (1, 7, 7, None, True),
        (1, 130, 130, None, True),
        (1, 90, 130, (90, 130), False),
        (1, 7, 47, (7, 47), False),
    ]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", STAND_INS)
def test_what_ragged_kernels_are_given(monkeypatch, name, kv_heads):
    def check(cu_q, cu_k, max_q, max_k):  # the longest of what a sequence holds, and reads
        assert (max_q, max_k) == (TOGETHER + 5, TOGETHER + 30)

    install(monkeypatch, name, check)
    compare(*ragged(4, kv_heads))


def test_attention_that_looks_ahead_shares_nothing():
    tensors, packed = ragged(4, 4)
    with pytest.raises(NotCausal, match="only causal attention can share prompts"):
        attend(tensors, packed, causal=False)
