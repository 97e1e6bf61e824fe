"""Sharing batches between processes, and sharded weights trained as unsharded ones are.

What needs two processes runs in two, started by torchrun, on gloo.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from several_processes import LENGTHS, found, steps, tiny_policy
from torch import nn

from fastalign.train import distributed
from fastalign.train.distributed import Micro, micros, plan_micros, shares


def test_shares_are_balanced_and_whole() -> None:
    """17 to the one, 9 and 8 to the other, then 5 | 4 3 | 2 to whoever has least."""
    taken = shares(LENGTHS, 2)
    assert taken == [[0, 3, 5], [1, 2, 4, 6]]
    assert [sum(LENGTHS[i] for i in rows) for rows in taken] == [24, 24]
    assert sorted(i for rows in shares(LENGTHS, 3) for i in rows) == list(range(7))


def test_every_process_makes_as_many_passes() -> None:
    """24 tokens each under a budget of 17: 5 | 17 | 2 beside 9 3 4 | 8, and 2 for nothing."""
    plans = plan_micros(range(7), LENGTHS, 17, 2)
    assert plans[0] == [Micro([0]), Micro([3]), Micro([5])]
    assert plans[1] == [Micro([1, 2, 4]), Micro([6]), Micro([5], counts=False)]


def test_fewer_sequences_than_processes() -> None:
    """The idle process passes the shortest sequence with weight 0."""
    assert plan_micros([3, 1], LENGTHS, 100, 3) == [
        [Micro([3])],
        [Micro([1])],
        [Micro([1], counts=False)],
    ]


def test_one_process_keeps_the_order_of_the_batch() -> None:
    found_ = list(micros(nn.Identity(), [4, 0, 6, 2], LENGTHS, 12))
    assert found_ == [Micro([4, 0]), Micro([6, 2])]


def test_alone_nothing_is_done() -> None:
    policy = tiny_policy(True)
    distributed.shard(policy, "hidden")
    assert not distributed.is_sharded(policy)
    numbers = torch.tensor([1.0, 2.0])
    assert distributed.total(numbers) is numbers
    assert distributed.gather([1]) == [[1]]
    assert distributed.any_true(True, torch.device("cpu"))
    assert distributed.world() == distributed.World(0, 1)
    assert distributed.whole(numbers) is numbers and distributed.local(numbers) is numbers


def test_alone_a_module_is_whole() -> None:
    policy = tiny_policy(True)
    assert distributed.unsharded(policy) is policy


def test_like_checks_shapes() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        distributed.like(torch.zeros(3), torch.zeros(2))


def test_a_pass_that_does_not_count() -> None:
    assert Micro([0]).divisor(7) == 7
    assert Micro([0], counts=False).divisor(7) == math.inf


def test_split_alone() -> None:
    assert distributed.split(lambda x: x * x, [3, 1, 2]) == [9, 1, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


def test_two_processes_talk(folder: Path) -> None:
    assert found("words", folder, 2) == {
        "summed": [2.0, 10.0],
        "lists": [[0, "a"], [1, "a"]],
        "anyone": True,
        "nobody": False,
        "chosen": {"rank": 0},
        "part": 49,  # 97 rows over two processes: 49 and 48
        "tied": True,
        "whole": 0.0,
        "split": [0, 10, 20, 30, 40],
        "split by": [0, 1, 0, 1, 0],
        "error": "of the main process",
    }


def test_two_processes_train_as_one_does(folder: Path) -> None:
    """Losses, gradient norms and weights to rounding, with tied and with untied embeddings, several
    passes a step and one process with a pass of weight 0."""
    two = found("steps", folder, 2)
    for name, tied in (("tied", True), ("untied", False)):
        one = steps(tied)
        torch.testing.assert_close(
            torch.tensor(two[name]["history"]), torch.tensor(one["history"]), rtol=2e-6, atol=0
        )
        for key, weight in one["weights"].items():
            torch.testing.assert_close(two[name]["weights"][key], weight, rtol=0, atol=2e-5)
