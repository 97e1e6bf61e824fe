"""Lambda-returns and discounted returns: rows worked by hand, kernels against float64, gae."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scans import BACKENDS, DTYPES, device_of, make_inputs, small_blocks, to_double
from torch import Tensor

import fastalign as fa
from fastalign.ops import discounted_returns, gae, lambda_returns
from fastalign.ops.lambda_returns import lambda_returns_reference
from fastalign.testing import assert_no_worse

NAN = float("nan")


def check(backend: str, rewards: Tensor, values: Tensor, **kwargs) -> None:
    """Both functions against their references in float64."""
    plain = {name: x for name, x in kwargs.items() if name != "lam"}
    runs = {
        "lambda": lambda r, v, double: lambda_returns(r, v, **double(kwargs)),
        "discounted": lambda r, v, double: discounted_returns(r, **double(plain)),
    }
    for run in runs.values():
        truth = run(rewards.double(), values.double(), to_double)
        with fa.backend("reference"):
            eager = run(rewards, values, dict)
        with fa.backend(backend):
            got = run(rewards, values, dict)
        assert got.dtype == torch.float32 and got.is_contiguous()
        assert_no_worse(got, eager, truth, rewards.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_by_hand(backend: str) -> None:
    """gamma = lam = 1/2, r = (1, 2, 4), V = (2, 4, 8), bootstrap 16.

    Lambda-returns: G_3 = 4 + (16/2 + 16/2) / 2 = 12, G_2 = 2 + (8/2 + 12/2) / 2 = 7,
    G_1 = 1 + (4/2 + 7/2) / 2 = 3.75. Discounted: G_3 = 4 + 16/2 = 12, G_2 = 2 + 12/2 = 8,
    G_1 = 1 + 8/2 = 5.

    Without the second token: G_1 = 1 + (8/2 + 12/2) / 2 = 6, and discounted 1 + 12/2 = 7.
    """
    device = device_of(backend)
    rewards = torch.tensor([[1.0, 2.0, 4.0]], device=device)
    values = torch.tensor([[2.0, 4.0, 8.0]], device=device)
    end: dict[str, Any] = {"gamma": 0.5, "bootstrap": torch.tensor([16.0], device=device)}
    with fa.backend(backend):
        assert lambda_returns(rewards, values, lam=0.5, **end).tolist() == [[3.75, 7.0, 12.0]]
        assert discounted_returns(rewards, **end).tolist() == [[5.0, 8.0, 12.0]]
        rewards[0, 1] = values[0, 1] = NAN
        end["mask"] = torch.tensor([[1, 0, 1]], device=device)
        assert lambda_returns(rewards, values, lam=0.5, **end).tolist() == [[6.0, 0.0, 12.0]]
        assert discounted_returns(rewards, **end).tolist() == [[7.0, 0.0, 12.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 1025), (37, 33)], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_kernel_is_no_worse_than_eager(
    backend: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rewards, values, mask, bootstrap = make_inputs(*shape, dtype, device_of(backend))
    check(backend, rewards, values, gamma=0.99)
    check(backend, rewards, values, mask=mask, bootstrap=bootstrap, gamma=0.99, lam=0.9)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_packed_with_rates(backend: str) -> None:
    device = device_of(backend)
    rewards, values, mask, bootstrap = make_inputs(4, 100, torch.float32, device)
    check(
        backend,
        rewards.flatten(),
        values.flatten(),
        cu_seqlens=torch.tensor([0, 70, 70, 71, 400], device=device),
        mask=mask.flatten(),
        bootstrap=bootstrap,
        gamma=torch.tensor([0.99, 0.5, 0.5, 1.0], device=device),
        lam=torch.tensor([0.0, 0.5, 0.5, 1.0], device=device),
    )


def test_triton_splits_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bootstrap of discounted returns goes through the maps of all chunks."""
    small_blocks(monkeypatch)
    rewards, values, mask, bootstrap = make_inputs(2, 301, torch.float32, device_of("triton"))
    mask[0, 70:200] = False
    mask[1, 150:] = False
    check("triton", rewards, values, bootstrap=100 * bootstrap, gamma=0.999, lam=1.0)
    check("triton", rewards, values, mask=mask, bootstrap=100 * bootstrap, gamma=0.999)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_the_returns_of_gae(backend: str) -> None:
    """The same bits: one kernel, which leaves out the advantages."""
    rewards, values, mask, bootstrap = make_inputs(3, 300, torch.float32, device_of(backend))
    kwargs: dict[str, Any] = {"gamma": 0.9, "lam": 0.7, "mask": mask, "bootstrap": bootstrap}
    with fa.backend(backend):
        returns = gae(rewards, values, **kwargs)[1]
        assert torch.equal(lambda_returns(rewards, values, **kwargs), returns)


def test_rewards_to_go_of_a_long_row() -> None:
    """r = 1, gamma = 1: the number of tokens left, exactly."""
    steps = 70_001
    with fa.backend("cpp"):
        found = discounted_returns(torch.ones(steps, 2).t())
    assert torch.equal(found, torch.arange(steps, 0, -1.0).expand(2, steps))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    with fa.backend(backend):
        for shape in [(0, 5), (3, 0)]:
            empty = torch.empty(shape, device=device_of(backend))
            assert discounted_returns(empty).shape == shape
            assert lambda_returns(empty, empty).shape == shape


def test_opcheck_and_compile() -> None:
    rewards, values, mask, bootstrap = make_inputs(2, 6, torch.float32, "cpu")
    offsets = torch.tensor([0, 5, 12])
    op = torch.ops.fastalign.lambda_returns.default
    torch.library.opcheck(op, (rewards, values, 0.9, 0.95, mask, None, bootstrap, None))
    torch.library.opcheck(op, (rewards[0], None, 0.9, 1.0, None, offsets // 2, None, None))

    def both(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        flat = discounted_returns(rewards.flatten(), gamma=0.9, cu_seqlens=offsets)
        return lambda_returns(rewards, values, mask=mask), flat

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(rewards, values)
    for one, other in zip(compiled, both(rewards, values), strict=True):
        assert torch.equal(one, other)


def test_reference_is_the_default_for_double() -> None:
    rewards, values, mask, bootstrap = make_inputs(2, 11, torch.float64, "cpu")
    direct = lambda_returns_reference(rewards, values, 1.0, 0.95, mask, None, bootstrap.double())
    assert torch.equal(direct, lambda_returns(rewards, values, mask=mask, bootstrap=bootstrap))


ROW = torch.zeros(2, 3)


def test_bad_input_names_the_op() -> None:
    with pytest.raises(ValueError, match=r"lambda_returns: expected values of the shape.*\(3, 2\)"):
        lambda_returns(ROW, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"lambda_returns: expected lam in \[0, 1\], got 2"):
        lambda_returns(ROW, ROW, lam=2.0)
    with pytest.raises(ValueError, match=r"discounted_returns: expected gamma in \[0, 1\]"):
        discounted_returns(ROW, gamma=-0.5)
    with pytest.raises(ValueError, match=r"discounted_returns: expected rewards \[B, T\]"):
        discounted_returns(ROW[0])
    with pytest.raises(ValueError, match="cu_seqlens to rise from 0 to N = 3, got 0 to 2"):
        discounted_returns(ROW[0], cu_seqlens=torch.tensor([0, 2]))
