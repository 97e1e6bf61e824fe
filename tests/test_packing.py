"""Packs against sequences taken one by one, and the promises of the batches."""

import random

import pytest
import torch

from fastalign.data.packing import (
    epochs_of_batches,
    pack,
    token_budget_batches,
)


def test_hand_worked_pack():
    packed = pack([[5, 6, 7, 8], [9], [1, 2, 3]], prompt_lengths=[2, 1, 0])
    assert packed.input_ids.tolist() == [5, 6, 7, 8, 9, 1, 2, 3]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert packed.cu_seqlens.tolist() == [0, 4, 5, 8]
    assert packed.max_seqlen == 4
    # [5, 6] is a prompt: 6 predicts 7, the first token after it. No token predicts 9 or 1.
    assert packed.kept.tolist() == [1, 2, 5, 6]
    assert packed.response_targets.tolist() == [7, 8, 2, 3]
    assert packed.lengths == (4, 1, 3) and packed.n_sequences == 3
    assert packed.last_index.tolist() == [3, 4, 7]


def test_without_prompt_lengths_every_next_token_counts():
    packed = pack([[5, 6, 7], [8, 9]])
    assert packed.kept.tolist() == [0, 1, 3] and packed.response_targets.tolist() == [6, 7, 9]


def test_types():
    packed = pack([[1, 2]], [1]).to("cpu")
    assert packed.input_ids.dtype == torch.int64
    assert packed.position_ids.dtype == torch.int64
    assert packed.response_targets.dtype == torch.int64
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.last_index.dtype == packed.kept.dtype == torch.int64
    moved = pack([[1, 2]], [1]).to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}


def test_no_sequences():
    packed = pack([], [])
    assert packed.input_ids.shape == packed.position_ids.shape == (0,)
    assert packed.cu_seqlens.tolist() == [0]
    assert packed.max_seqlen == packed.n_sequences == 0 and packed.lengths == ()
    assert packed.last_index.shape == packed.kept.shape == packed.response_targets.shape == (0,)


@pytest.mark.parametrize("seed", range(20))
def test_pack_equals_its_sequences(seed):
    rng = random.Random(seed)
    sequences = [
        [rng.randrange(100) for _ in range(rng.choice((1, 2, 3, 17, 64)))]
        for _ in range(rng.randrange(1, 12))
    ]
    prompts = [rng.randrange(len(s) + 1) for s in sequences]
    packed = pack(sequences, prompts)
    bounds = packed.cu_seqlens.tolist()
    predicted = 0
    for i, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        part = slice(bounds[i], bounds[i + 1])
        assert packed.input_ids[part].tolist() == sequence
        assert packed.position_ids[part].tolist() == list(range(len(sequence)))
        first = max(prompt, 1)
        rows = slice(predicted, predicted + len(sequence) - first)
        assert packed.response_targets[rows].tolist() == sequence[first:]
        places = range(bounds[i] + first - 1, bounds[i + 1] - 1)
        assert packed.kept[rows].tolist() == list(places)
        predicted = rows.stop
    assert len(packed.response_targets) == len(packed.kept) == predicted
    assert bounds[-1] == packed.input_ids.numel() == sum(map(len, sequences))
    assert packed.lengths == tuple(map(len, sequences)) and packed.max_seqlen == max(packed.lengths)
    assert packed.input_ids[packed.last_index].tolist() == [s[-1] for s in sequences]


def test_bad_packs():
    with pytest.raises(ValueError, match=r"pack: .*got empty ones at \[1\]"):
        pack([[1], []])
    with pytest.raises(ValueError, match=r"pack: expected one prompt length per sequence \(2\)"):
        pack([[1], [2]], [1])
    with pytest.raises(ValueError, match="pack: expected 0 <= prompt length <= 2 for sequence 1"):
        pack([[1], [2, 3]], [1, 3])


LENGTHS = random.Random(1).choices(range(1, 90), k=257)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("budget", [1, 89, 200, 10**9])
def test_batches_keep_every_index_and_the_budget(budget, shuffled):
    def batches():
        generator = torch.Generator().manual_seed(3) if shuffled else None
        return token_budget_batches(LENGTHS, budget, generator=generator)

    found = batches()
    assert sorted(i for batch in found for i in batch) == list(range(len(LENGTHS)))
    for batch in found:
        assert batch
        assert sum(LENGTHS[i] for i in batch) <= budget or len(batch) == 1
    assert found == batches()


def test_order_without_generator():
    assert token_budget_batches([3, 3, 3, 9, 1], 6) == [[0, 1], [2], [3], [4]]


def test_shuffling_mixes_lengths():
    """Long and short sequences meet: one batch spans most of the lengths, 1 to 89."""
    found = token_budget_batches(LENGTHS, 400, generator=torch.Generator().manual_seed(0))
    widths = [max(LENGTHS[i] for i in b) - min(LENGTHS[i] for i in b) for b in found if len(b) > 1]
    assert sum(widths) / len(widths) > 40


def test_shuffling_changes_with_the_seed_and_with_the_call():
    def batches(seed):
        return token_budget_batches([5] * 40, 20, generator=torch.Generator().manual_seed(seed))

    assert batches(0) != batches(1)
    generator = torch.Generator().manual_seed(0)
    first = token_budget_batches([5] * 40, 20, generator=generator)
    second = token_budget_batches([5] * 40, 20, generator=generator)
    assert first == batches(0) != second


def test_full_batches():
    """257 sequences under a budget that leaves little room: few more batches than the bound."""
    found = token_budget_batches(LENGTHS, 1000, generator=torch.Generator().manual_seed(0))
    least = -(-sum(LENGTHS) // 1000)
    assert least <= len(found) <= least + 2


def test_epochs_have_their_own_orders():
    batches = epochs_of_batches(LENGTHS, 3, 1000, seed=4)
    one = epochs_of_batches(LENGTHS, 1, 1000, seed=4)
    assert one == batches[: len(one)]  # another number of epochs leaves the first as it was
    first, second = batches[: len(one)], batches[len(one) : 2 * len(one)]
    assert sorted(i for b in batches for i in b) == sorted(3 * list(range(len(LENGTHS))))
    assert first != second and one != epochs_of_batches(LENGTHS, 1, 1000, seed=5)
    assert all(sum(LENGTHS[i] for i in b) <= 1000 for b in batches)


def test_bad_batches():
    with pytest.raises(ValueError, match="expected budget >= 1, got 0"):
        token_budget_batches([1], 0)
    with pytest.raises(ValueError, match="expected lengths >= 1, got 0"):
        token_budget_batches([1, 0], 5)
    assert token_budget_batches([], 5) == []
