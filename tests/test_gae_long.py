"""GAE on long sequences: C++ walks pieces of them at once, Triton composes the maps of chunks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scans import check_gae as check
from scans import device_of, make_inputs, small_blocks, to_double
from torch import Tensor

import fastalign as fa
from fastalign.ops import discounted_returns, gae, lambda_returns, vtrace
from fastalign.testing import assert_no_worse

PIECE = 16384  # tokens of a piece in csrc/gae.cpp


def test_cpp_threads() -> None:
    """Enough tokens for several tasks, of rows that differ in length."""
    rewards, values, mask, bootstrap = make_inputs(40, 1025, torch.float32, "cpu")
    check("cpp", rewards, values, mask=mask, bootstrap=bootstrap)
    flat, offsets = rewards.flatten(), torch.tensor([0, 20_000, 20_001, 41_000])
    check("cpp", flat, values.flatten(), mask=mask.flatten(), cu_seqlens=offsets)


RATES = torch.tensor([[1, 1], [0.99, 0.95], [1, 0.999], [1, 0.999], [1, 1], [0, 0.5]]).double()


def long_inputs() -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Rows of three pieces with rates of their own: a short first piece, and two full ones."""
    rewards, values, mask, bootstrap = make_inputs(6, 2 * PIECE + 3, torch.float32, "cpu")
    mask[:3] = True
    mask[4, 200 : PIECE + 300] = False  # nothing kept in the second piece
    gamma, lam = RATES.float().unbind(1)
    return rewards, values, dict(mask=mask, bootstrap=bootstrap, gamma=gamma, lam=lam)


def assert_rows_no_worse(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Row by row: their magnitudes differ a hundredfold."""
    for row in range(len(got)):
        assert_no_worse(got[row], eager[row], truth[row], torch.float32)


def test_cpp_pieces() -> None:
    """One decay leaves nothing of what follows, .999 a seventh at the end of what a map takes at
    once, 1 all of it."""
    rewards, values, kwargs = long_inputs()
    truth = gae(rewards.double(), values.double(), **to_double(kwargs))
    with fa.backend("reference"):
        eager = gae(rewards, values, **kwargs)
    got = gae(rewards, values, **kwargs)
    for one, same, true in zip(got, eager, truth, strict=True):
        assert_rows_no_worse(one, same, true)
    flat = {name: x.flatten() for name, x in kwargs.items()}
    offsets = torch.arange(7) * rewards.shape[1]
    packed = gae(rewards.flatten(), values.flatten(), **flat, cu_seqlens=offsets)
    for one, other in zip(packed, got, strict=True):
        assert torch.equal(one.view_as(other), other)
    assert torch.equal(lambda_returns(rewards, values, **kwargs), got[1])


def test_cpp_pieces_of_the_siblings() -> None:
    """V-trace with weights that are capped and weights that are not; sums of rewards that go on
    after a bootstrap, whose weights are powers of two and so exact."""
    rewards, values, kwargs = long_inputs()
    log_ratio = 0.1 * torch.randn(rewards.shape, generator=torch.Generator().manual_seed(1))
    caps: dict[str, Any] = {"c_bar": 1.0, "rho_bar": 1.5}
    double = to_double(kwargs | {"log_ratio": log_ratio})
    truth = vtrace(rewards.double(), values.double(), **double, **caps)
    with fa.backend("reference"):
        eager = vtrace(rewards, values, log_ratio, **kwargs, **caps)
    got = vtrace(rewards, values, log_ratio, **kwargs, **caps)
    for one, same, true in zip(got, eager, truth, strict=True):
        assert_rows_no_worse(one, same, true)
    ones = torch.ones(1, 3 * PIECE + 1)
    sums = discounted_returns(ones, bootstrap=torch.tensor([7.0]))
    assert torch.equal(sums[0], torch.arange(3 * PIECE + 1, 0, -1) + 7.0)
    halves = discounted_returns(ones, gamma=0.5)
    assert halves[0, :-30].eq(2.0).all() and halves[0, -2:].tolist() == [1.5, 1.0]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_cpp_what_is_not_finite_reaches_all_tokens_before_it(number: float) -> None:
    """As in a loop over time, however far: maps of pieces are formed only as far as numbers reach,
    and this one stands beyond that in the third of four pieces."""
    rewards = torch.zeros(1, 3 * PIECE + 5)
    at = 2 * PIECE + 9000
    rewards[0, at] = number
    zeros = torch.zeros_like(rewards)
    advantages, returns, statistics = gae(rewards, zeros, gamma=0.99, return_statistics=True)
    for found in (advantages, returns):
        wanted = found.isnan() if number != number else found == number
        assert wanted[0, : at + 1].all() and found[0, at + 1 :].eq(0.0).all()
    assert not statistics[1].isfinite() and statistics[0] == rewards.numel()


def test_cpp_same_bits_with_any_number_of_threads() -> None:
    """Many rows, and few that are walked in pieces."""
    before = torch.get_num_threads()
    for shape in [(70, 1025), (3, 2 * PIECE + 77)]:
        rewards, values, mask, _ = make_inputs(*shape, torch.float32, "cpu")
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(gae(rewards, values, mask=mask, return_statistics=True))
        finally:
            torch.set_num_threads(before)
        for one, two, three in zip(*found, strict=True):
            assert torch.equal(one, two) and torch.equal(one, three)


ISA_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from test_gae_long import test_cpp_pieces, test_cpp_pieces_of_the_siblings
test_cpp_pieces()
test_cpp_pieces_of_the_siblings()
print("passed")
"""


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    """The processor here may take another one: the others run in processes told to use them."""
    done = subprocess.run(
        [sys.executable, "-c", ISA_PROGRAM, Path(__file__).parent],
        env=os.environ | {"FASTALIGN_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "passed\n", done.stderr


def test_triton_splits_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 tokens in chunks of 32, whose maps are composed four at a time; ragged ends.

    gamma = .99 and lam = 1 keep far chunks in play: .99^32 = .72.
    """
    small_blocks(monkeypatch)
    device = device_of("triton")
    rewards, values, mask, bootstrap = make_inputs(2, 301, torch.float32, device)
    mask[0, 70:200] = False  # whole chunks without a kept token
    mask[1, 150:] = False
    check("triton", rewards, values, gamma=0.99, lam=1.0)
    check("triton", rewards, values, mask=mask, bootstrap=bootstrap, gamma=0.99, lam=1.0)
    check(
        "triton",
        rewards.flatten(),
        values.flatten(),
        mask=mask.flatten(),
        cu_seqlens=torch.tensor([0, 409, 409, 410, 602], device=device),
        bootstrap=bootstrap.repeat(2),
        gamma=torch.tensor([0.99, 0.5, 0.5, 1.0], device=device),
        lam=1.0,
    )
