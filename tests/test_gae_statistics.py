"""The statistics of advantages that gae returns for whitening: count, mean, unbiased variance."""

from __future__ import annotations

import pytest
import torch
from scans import BACKENDS, DTYPES, device_of, make_inputs, small_blocks
from torch import Tensor

import fastalign as fa
from fastalign.ops import gae, whiten
from fastalign.testing import TOLERANCES, assert_no_worse

NAN = float("nan")


def found(backend: str, rewards: Tensor, values: Tensor, **kwargs) -> list[float]:
    """The statistics, after a check against the float64 statistics of the advantages returned."""
    with fa.backend(backend):
        plain = gae(rewards, values, **kwargs)
        advantages, returns, statistics = gae(rewards, values, **kwargs, return_statistics=True)
    assert torch.equal(plain[0], advantages) and torch.equal(plain[1], returns)
    assert statistics.dtype == torch.float64 and statistics.shape == (3,)
    mask = kwargs.get("mask")
    kept = advantages.double() if mask is None else advantages[mask].double()
    want = [kept.numel(), kept.mean().item(), kept.var().item()]
    got = statistics.tolist()
    assert got == pytest.approx(want, rel=2e-6, abs=1e-6 * want[2] ** 0.5)
    return got


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_by_hand(backend: str) -> None:
    """gamma = 0 and V = 0, so A = r. Kept: 1, 2, 6. Mean 3; variance (4 + 1 + 9) / 2 = 7."""
    device = device_of(backend)
    rewards = torch.tensor([[1.0, NAN, 2.0], [NAN, 6.0, NAN]], device=device)
    values = torch.zeros_like(rewards)
    mask = ~rewards.isnan()
    with fa.backend(backend):
        *_, statistics = gae(rewards, values, gamma=0.0, mask=mask, return_statistics=True)
    assert statistics.tolist() == [3.0, 3.0, 7.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (2, 1025), (37, 33)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Part of a register, several blocks of moments, several rows of a program."""
    rewards, values, mask, bootstrap = make_inputs(*shape, dtype, device_of(backend))
    mask[0, :2] = True
    found(backend, rewards, values)
    found(backend, rewards, values, mask=mask, bootstrap=bootstrap)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend: str) -> None:
    rewards, values, mask, _ = make_inputs(1, 3000, torch.float32, device_of(backend))
    offsets = torch.tensor([0, 0, 2, 2200, 2207, 3000], device=rewards.device)
    found(backend, rewards[0], values[0], cu_seqlens=offsets, mask=mask[0])


def test_triton_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk has moments of its own; four are added up at a time."""
    small_blocks(monkeypatch)
    rewards, values, mask, _ = make_inputs(2, 101, torch.float32, device_of("triton"))
    mask[0, 30:70] = False
    found("triton", rewards, values)
    found("triton", rewards, values, mask=mask)
    offsets = torch.tensor([0, 139, 139, 140, 202], device=rewards.device)
    found("triton", rewards.flatten(), values.flatten(), cu_seqlens=offsets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_blocks_of_moments(backend: str) -> None:
    """More tokens in a row than have their moments taken at once."""
    steps = {"triton": 1500, "reference": 5000, "cpp": 40_000}[backend]  # three pieces in C++
    rewards, values, mask, _ = make_inputs(2, steps, torch.float32, device_of(backend))
    found(backend, rewards, values)
    found(backend, rewards, values, mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_far_from_zero(backend: str) -> None:
    """A = r = 30000 + noise of spread 1: the squares of the numbers have no room for the noise."""
    rewards = 3e4 + torch.randn(2, 2000, device=device_of(backend))
    _, _, variance = found(backend, rewards, torch.zeros_like(rewards), gamma=0.0)
    assert 0.9 < variance < 1.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_advantages_have_no_variance(backend: str) -> None:
    """Else whitening would blow up the rounding of the mean."""
    rewards = torch.full((3, 1111), 12345.678, device=device_of(backend))
    with fa.backend(backend):
        *_, statistics = gae(rewards, torch.zeros_like(rewards), gamma=0.0, return_statistics=True)
    assert statistics[0] == 3333
    assert statistics[1].item() == pytest.approx(rewards[0, 0].item(), rel=1e-9)
    assert statistics[2] < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_than_two_cells(backend: str) -> None:
    device = device_of(backend)
    rewards = torch.tensor([[NAN, 5.0], [NAN, NAN]], device=device)
    with fa.backend(backend):
        for mask, want in [(~rewards.isnan(), [1.0, 5.0, 0.0]), (rewards > 9, [0.0, 0.0, 0.0])]:
            args = (rewards, torch.zeros_like(rewards))
            assert gae(*args, mask=mask, return_statistics=True)[2].tolist() == want
        for shape in [(0, 5), (3, 0)]:
            empty = torch.empty(shape, device=device)
            assert gae(empty, empty, return_statistics=True)[2].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_whiten_takes_them_and_looks_once(backend: str, masked: bool, shift_mean: bool) -> None:
    rewards, values, mask, _ = make_inputs(7, 333, torch.float32, device_of(backend))
    given = mask if masked else None
    with fa.backend(backend):
        advantages, _, statistics = gae(rewards, values, mask=given, return_statistics=True)
        looks = whiten(advantages, given, shift_mean=shift_mean)
        takes = whiten(advantages, given, shift_mean=shift_mean, statistics=statistics)
        others = whiten(advantages, given, statistics=torch.tensor([9.0, 1.0, 4.0]).to(statistics))
    truth = whiten(advantages.double(), given, shift_mean=shift_mean)
    assert_no_worse(takes, looks, truth, torch.float32)
    kept = torch.ones_like(mask) if given is None else given
    by_hand = torch.where(kept, (advantages.double() - 1.0) / 2.0, 0.0)  # mean 1, variance 4
    assert (others - by_hand).abs().max() <= 4 * TOLERANCES[torch.float32].floor


@pytest.mark.parametrize("backend", BACKENDS)
def test_whitening_by_the_statistics_of_fewer_than_two_cells(backend: str) -> None:
    x = torch.tensor([[NAN, 5.0]], device=device_of(backend))
    one, none = ([[1.0, 5.0, 0.0]], [[0.0, 0.0, 0.0]])
    with fa.backend(backend):
        for (row,), mask in ((one, ~x.isnan()), (none, x > 9)):
            statistics = torch.tensor(row, dtype=torch.float64, device=x.device)
            assert whiten(x, mask, statistics=statistics).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    "statistics, message",
    [
        (torch.zeros(2).double(), r"\[3\] of float64 \(count, mean, variance\), got \(2,\)"),
        (torch.zeros(3), r"\[3\] of float64.*got \(3,\) torch.float32"),
        (torch.zeros(3, device="meta").double(), "on the device of x, cpu, got meta"),
    ],
)
def test_statistics_that_whiten_refuses(statistics: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"whiten: expected statistics {message}"):
        whiten(torch.zeros(2, 3), statistics=statistics)
    with pytest.raises(ValueError, match="x that requires no gradient with statistics"):
        whiten(torch.zeros(3, requires_grad=True), statistics=torch.zeros(3).double())


def test_the_same_in_a_compiled_graph() -> None:
    rewards, values, mask, _ = make_inputs(3, 20, torch.float32, "cpu")

    def run(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gae(rewards, values, mask=mask, return_statistics=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(rewards, values)
    for one, other in zip(compiled, run(rewards, values), strict=True):
        assert torch.equal(one, other)
