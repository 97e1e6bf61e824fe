"""V-trace: hand-worked rows, kernels against float64, and its limits, which are gae."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scans import BACKENDS, DTYPES, device_of, make_inputs, small_blocks, to_double
from torch import Tensor

import fastalign as fa
from fastalign.ops import gae, vtrace
from fastalign.ops.vtrace import VTrace, vtrace_reference
from fastalign.testing import assert_no_worse

NAN = float("nan")


def ratios(rewards: Tensor) -> Tensor:
    """Log-ratios around 0, some beyond any cap and one that overflows."""
    x = 0.7 * torch.randn(rewards.shape, generator=torch.Generator().manual_seed(1))
    x.view(-1)[::7] += 5.0
    x.view(-1)[0] = 100.0
    x.view(-1)[-1] = -200.0
    return x.to(rewards.device)


def check(backend: str, rewards: Tensor, values: Tensor, **kwargs) -> None:
    log_ratio = ratios(rewards)
    double = (rewards.double(), values.double(), log_ratio.double())
    truth = vtrace(*double, **to_double(kwargs))
    with fa.backend("reference"):
        eager = vtrace(rewards, values, log_ratio, **kwargs)
    with fa.backend(backend):
        got = vtrace(rewards, values, log_ratio, **kwargs)
    assert isinstance(got, VTrace)
    for one, same, true in zip(got, eager, truth, strict=True):
        assert one.dtype == torch.float32 and one.is_contiguous()
        assert_no_worse(one, same, true, rewards.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_worked_by_hand(backend: str) -> None:
    """gamma = 1/2, lam = 1, r = (1, 2, 4), V = (2, 4, 8), bootstrap 16, w = (2, 1/2, 1), caps 1.

    delta = (1 + 4/2 - 2, 2 + 8/2 - 4, 4 + 16/2 - 8) = (1, 2, 4).
    vs_3 - V_3 = 1 * 4 = 4                              vs_3 = 12   A_3 = 4 + 16/2 - 8 = 4
    vs_2 - V_2 = 1/2 * 2 + 1/2 * 1/2 * 4 = 2            vs_2 = 6    A_2 = 1/2 (2 + 12/2 - 4) = 2
    vs_1 - V_1 = 1 * 1 + 1/2 * 1 * 2 = 2                vs_1 = 4    A_1 = 1 (1 + 6/2 - 2) = 2

    rho_bar = 2: vs_1 - V_1 = 2 * 1 + 1/2 * 1 * 2 = 3, vs_1 = 5, A_1 = 2 * 2 = 4.
    Then c_bar = 2: vs_1 - V_1 = 2 + 1/2 * 2 * 2 = 4, vs_1 = 6; pg_rho_bar = 1: A_1 = 2.
    lam = 1/2, caps 1: vs_2 - V_2 = 1 + 1/4 * 1/2 * 4 = 1.5, vs_1 - V_1 = 1 + 1/4 * 1.5 = 1.375.
    Without the second token: delta_1 = 1 + 8/2 - 2 = 3, vs_1 - V_1 = 3 + 1/2 * 4 = 5,
    A_1 = 1 + 12/2 - 2 = 5.
    """
    device = device_of(backend)
    rewards = torch.tensor([[1.0, 2.0, 4.0]], device=device)
    values = torch.tensor([[2.0, 4.0, 8.0]], device=device)
    log_ratio = torch.tensor([[math.log(2.0), -math.log(2.0), 0.0]], device=device)
    end: dict[str, Any] = {"gamma": 0.5, "bootstrap": torch.tensor([16.0], device=device)}

    def found(**kwargs) -> tuple[list[float], list[float]]:
        with fa.backend(backend):
            vs, advantages = vtrace(rewards, values, log_ratio, **end, **kwargs)
        return vs[0].tolist(), advantages[0].tolist()

    def near(vs: list[float], advantages: list[float]) -> tuple:
        return pytest.approx(vs, rel=1e-6), pytest.approx(advantages, rel=1e-6)

    assert found() == near([4, 6, 12], [2, 2, 4])
    assert found(rho_bar=2.0) == near([5, 6, 12], [4, 2, 4])
    assert found(rho_bar=2.0, c_bar=2.0, pg_rho_bar=1.0) == near([6, 6, 12], [2, 2, 4])
    assert found(lam=0.5) == near([3.375, 5.5, 12], [1.75, 2, 4])
    rewards[0, 1] = values[0, 1] = log_ratio[0, 1] = NAN
    mask = torch.tensor([[1, 0, 1]], device=device)
    assert found(mask=mask) == near([7, 0, 12], [5, 0, 4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 1024), (2, 1025), (37, 33)], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_kernel_is_no_worse_than_eager(
    backend: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rewards, values, mask, bootstrap = make_inputs(*shape, dtype, device_of(backend))
    check(backend, rewards, values, gamma=0.99)
    caps = {"rho_bar": 1.5, "c_bar": 1.1, "pg_rho_bar": 2.0}
    check(backend, rewards, values, mask=mask, bootstrap=bootstrap, gamma=0.99, lam=0.9, **caps)


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
    small_blocks(monkeypatch)
    rewards, values, mask, bootstrap = make_inputs(2, 301, torch.float32, device_of("triton"))
    mask[0, 70:200] = False
    mask[1, 150:] = False
    check("triton", rewards, values, gamma=0.99, rho_bar=2.0, c_bar=1.0)
    check("triton", rewards, values, mask=mask, bootstrap=bootstrap, gamma=0.99)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_the_policy_itself(backend: str) -> None:
    """With w = 1 the targets are gae's returns, and at lam = 1 the advantages gae's too."""
    rewards, values, mask, bootstrap = make_inputs(3, 200, torch.float32, device_of(backend))
    kwargs: dict[str, Any] = {"gamma": 0.9, "mask": mask, "bootstrap": bootstrap}
    same = torch.zeros_like(rewards)
    with fa.backend(backend):
        for lam in (0.7, 1.0):
            advantages, returns = gae(rewards, values, lam=lam, **kwargs)
            vs, pg_advantages = vtrace(rewards, values, same, lam=lam, **kwargs)
            torch.testing.assert_close(vs, returns, atol=1e-5, rtol=0)
        torch.testing.assert_close(pg_advantages, advantages, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_a_kept_token_is_not_capped_away(backend: str) -> None:
    rewards, values, _, _ = make_inputs(1, 5, torch.float32, device_of(backend))
    log_ratio = torch.zeros_like(rewards)
    log_ratio[0, 2] = NAN
    with fa.backend(backend):
        vs, advantages = vtrace(rewards, values, log_ratio)
    for x in (vs, advantages):
        assert x.isnan().tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    with fa.backend(backend):
        for shape in [(0, 5), (3, 0)]:
            empty = torch.empty(shape, device=device_of(backend))
            assert [x.shape for x in vtrace(empty, empty, empty)] == [shape, shape]


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_views(backend: str) -> None:
    rewards, values, mask, _ = make_inputs(6, 40, torch.float32, device_of(backend))
    log_ratio = ratios(rewards)
    with fa.backend(backend):
        plain = vtrace(rewards, values, log_ratio, mask=mask)
        wide = torch.stack([values, log_ratio], dim=2)
        turned = rewards.t().contiguous().t()
        views = vtrace(turned, wide[..., 0], wide[..., 1], mask=mask.t().contiguous().t())
    for one, other in zip(plain, views, strict=True):
        assert torch.equal(one, other)


ISA_PROGRAM = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import test_gae, test_gae_statistics, test_lambda_returns, test_vtrace
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for steps in (1, 7, 16, 37, 300):
        rewards, values, mask, bootstrap = test_gae.make_inputs(5, steps, dtype, "cpu")
        mask[:, 3::5] = False
        for module in (test_gae, test_lambda_returns, test_vtrace):
            module.check("cpp", rewards, values, bootstrap=bootstrap, gamma=0.99)
            module.check("cpp", rewards, values, bootstrap=bootstrap, gamma=0.99, mask=mask)
        if steps > 1:
            mask[0, :2] = True
            test_gae_statistics.found("cpp", rewards, values)
            test_gae_statistics.found("cpp", rewards, values, mask=mask)
print("passed")
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """Of all scans. The processor here may take another one: others run in processes told so."""
    done = subprocess.run(
        [sys.executable, "-c", ISA_PROGRAM, Path(__file__).parent],
        env=os.environ | {"FASTALIGN_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "passed\n", done.stderr


def test_opcheck_and_compile() -> None:
    rewards, values, mask, bootstrap = make_inputs(2, 6, torch.float32, "cpu")
    offsets = torch.tensor([0, 5, 12])
    log_ratio = ratios(rewards)
    op = torch.ops.fastalign.vtrace.default
    settings = (0.9, 0.95, 1.0, 1.0, 2.0)
    inputs = (rewards, values, log_ratio)
    torch.library.opcheck(op, (*inputs, *settings, mask, None, bootstrap, None))
    flat = [x.flatten() for x in inputs]
    torch.library.opcheck(op, (*flat, *settings, None, offsets, None, torch.full((2, 2), 0.9)))

    def both(*inputs: Tensor) -> tuple[Tensor, ...]:
        packed = vtrace(*(x.flatten() for x in inputs), cu_seqlens=offsets)
        return *vtrace(*inputs, mask=mask), *packed

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs)
    for one, other in zip(compiled, both(*inputs), strict=True):
        assert torch.equal(one, other)


def test_reference_is_the_default_for_double() -> None:
    rewards, values, mask, bootstrap = make_inputs(2, 11, torch.float64, "cpu")
    log_ratio = ratios(rewards)
    args = (rewards, values, log_ratio.double(), 1.0, 1.0, 1.0, 1.0, 1.0)
    direct = vtrace_reference(*args, mask, None, bootstrap.double())
    public = vtrace(rewards, values, log_ratio, mask=mask, bootstrap=bootstrap)
    assert all(torch.equal(one, other) for one, other in zip(direct, public, strict=True))


def test_no_gradient_flows() -> None:
    x = torch.ones(1, 3, requires_grad=True)
    assert not any(y.requires_grad for y in vtrace(x, x, x))


ROW = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((ROW, ROW, ROW[0]), {}, r"vtrace: expected log_ratio of the shape of rewards.*got \(3,\)"),
        ((ROW, ROW, ROW.long()), {}, "vtrace: expected log_ratio of a floating dtype, got"),
        ((ROW, ROW, ROW.to("meta")), {}, "log_ratio on the device of rewards, cpu, got meta"),
        ((ROW, ROW[0], ROW), {}, "vtrace: expected values of the shape"),
        ((ROW, ROW, ROW), {"rho_bar": 0.0}, "vtrace: expected a finite rho_bar > 0, got 0"),
        ((ROW, ROW, ROW), {"c_bar": math.inf}, "vtrace: expected a finite c_bar > 0, got inf"),
        ((ROW, ROW, ROW), {"pg_rho_bar": NAN}, "expected a finite pg_rho_bar > 0, got nan"),
    ],
)
def test_bad_input(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtrace(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(256, 1024), (16, 70_001), (1000, 33)], ids=str)
def test_gpu_sizes(shape: tuple[int, int]) -> None:
    rewards, values, mask, bootstrap = make_inputs(*shape, torch.bfloat16, "cuda")
    check("triton", rewards, values, mask=mask, bootstrap=bootstrap, gamma=0.99)
