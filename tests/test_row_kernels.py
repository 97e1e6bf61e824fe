"""The row kernels at their limits: real vocabularies, every narrow number, each instruction set,
offsets beyond 2^31, precision.

What they compute is tested in tests/test_token_logprobs.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.token_logprobs import dlogits, row_stats
from fastalign.testing import (
    LAST_DIGITS,
    adversarial_logits,
    assert_as_precise,
    assert_no_worse,
    peaked_logits,
)

CUDA = torch.cuda.is_available()
KERNELS = ["cpp", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NARROW = [torch.bfloat16, torch.float16]
VOCABS = [
    2_048,  # half a block of the Triton kernel
    50_257,  # GPT-2: odd, rows begin anywhere
    151_936,  # Qwen
    262_144,  # Gemma: 64 parts, as many as are put together at once
    262_145,  # one more part
]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and CUDA else "cpu"


def rows_for(backend: str, logits: int, vocab: int) -> int:
    """How many rows make so many logits; fewer for the interpreter, which takes 5 ms a block."""
    wanted = 30_000 if backend == "triton" and not CUDA else logits
    return max(1, wanted // vocab)


def weights(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """g = dL/dlogp and e = dL/dentropy of some loss."""
    g, e = torch.randn(2, n, generator=torch.Generator().manual_seed(7)).to(dtype)
    return g, e


def run(
    backend: str, logits: Tensor, targets: Tensor, temperature: float, softcap: float = 0.0
) -> list[Tensor]:
    """logp, entropy and the gradient of sum(g logp + e entropy)."""
    device = device_of(backend)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    g, e = (x.to(device) for x in weights(len(targets), wide))
    x, y, t = logits.to(device), targets.to(device), torch.tensor([temperature], device=device)
    with fa.backend(backend):
        stats = row_stats(x, y, t.to(wide), softcap, -100)
        dx = dlogits(g, e, x, y, t.to(wide), softcap, -100, *stats)
    return [x.cpu() for x in (stats[0], stats[1], dx)]


def compare(
    backend: str, logits: Tensor, targets: Tensor, temperature: float, softcap: float = 0.0
) -> None:
    args = (targets, temperature, softcap)
    results = (
        run(backend, logits, *args),
        run("reference", logits, *args),
        run("reference", logits.double(), *args),
    )
    for index, (got, plain, true) in enumerate(zip(*results, strict=True)):
        assert_no_worse(got, plain, true, logits.dtype, grad=index == 2)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("backend", KERNELS)
def test_real_vocabularies(backend: str, vocab: int) -> None:
    """The last column is the row's maximum, and in the second row all there is."""
    dtype = torch.float32 if vocab % 2 else torch.bfloat16
    logits, targets = peaked_logits(2, vocab, dtype=dtype)
    logits[0, -1], logits[1, -1] = 13.0, 200.0
    compare(backend, logits, targets, 1.3, 30.0 if vocab == 50_257 else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_one_task_takes(dtype: torch.dtype) -> None:
    logits, targets = peaked_logits(70_000, 5, dtype=dtype)
    compare("cpp", logits, targets, 1.3)


@pytest.mark.parametrize("backend", KERNELS)
def test_bits_of_a_cut_row_do_not_depend_on_its_neighbours(backend: str) -> None:
    """Three parts: alone, among four and among forty rows."""
    logits, targets = peaked_logits(40, 9000)
    whole = run(backend, logits, targets, 1.0)
    for rows in ([3], [3, 0, 39, 7]):
        part = run(backend, logits[rows], targets[rows], 1.0)
        for got, want in zip(part[:2], whole[:2], strict=True):
            assert torch.equal(got, want[rows])


def softmax_eager(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """What ``run`` gives, by log_softmax in float32 (float64 for the truth)."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    g, e = weights(len(targets), wide)
    x = logits.clone().requires_grad_()
    log_p = torch.log_softmax(x.to(wide) / temperature, -1)
    logp = log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (dx,) = torch.autograd.grad((g * logp + e * entropy).sum(), x)
    return logp.detach(), entropy.detach(), dx


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("vocab", [2_000, 32_000, 151_936])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_as_precise_as_float32_from_the_same_logits(
    backend: str, dtype: torch.dtype, vocab: int, seed: int
) -> None:
    n = rows_for(backend, 500_000, vocab)
    logits, targets = peaked_logits(n, vocab, dtype=dtype, seed=seed)
    kernel = run(backend, logits, targets, 0.75)
    eager = softmax_eager(logits, targets, 0.75)
    truth = softmax_eager(logits.double(), targets, 0.75)
    for index, (got, plain, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        # The interpreter cuts bfloat16 off where processors round it.
        if index < 2 or not (backend == "triton" and not CUDA and dtype == torch.bfloat16):
            assert_as_precise(got, plain, true)


def stored(backend: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``values`` [N] as the dlogits kernel stores them: [N, 32] of ``dtype``.

    With all logits, row_max and log_sum at 0 every p is 1, and a column that is not the target's
    gets exactly -g.
    """
    n = len(values)
    zeros = torch.zeros(n)
    logits = torch.zeros(n, 33, dtype=dtype)
    targets = torch.full((n,), 32)
    with fa.backend(backend):
        dx = dlogits(
            -values, None, logits, targets, torch.ones(1), 0.0, -100, zeros, zeros, zeros, zeros
        )
    return dx[:, :32]


def awkward_floats() -> Tensor:
    """float32 numbers around every rounding boundary of the narrow dtypes, infinities, NaN."""
    high = torch.arange(0, 1 << 16, 7, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] + low).flatten()
    edges = torch.tensor([65504.0, 65519.9, 65520.0, 1e38, 3.4e38, 2.0**-24, 2.0**-25, 3e-8])
    special = torch.tensor([0.0, float("inf"), float("nan")])
    numbers = torch.cat((edges, special))
    return torch.cat(((bits - (1 << 31)).to(torch.int32).view(torch.float32), numbers, -numbers))


def check_every_narrow_number() -> None:
    """Stores round to nearest, ties to even, as PyTorch's do; loads are exact."""
    values = awkward_floats()
    for dtype in NARROW:
        want = values.to(dtype)
        for column in stored("cpp", values, dtype).unbind(1):
            assert torch.equal(column.isnan(), want.isnan())
            assert torch.equal(column[~want.isnan()], want[~want.isnan()])
        numbers = torch.arange(1 << 16).to(torch.uint16).view(dtype)
        numbers = numbers[numbers.isfinite()]
        for columns in (1, 32):  # a tail, and whole registers
            logits = numbers[:, None].expand(-1, columns).contiguous()
            targets = torch.zeros(len(numbers), dtype=torch.int64)
            with fa.backend("cpp"):
                row_max = row_stats(logits, targets, torch.ones(1), 0.0, -100)[2]
            assert torch.equal(row_max, numbers.float())


def check_exponentials() -> None:
    """p = exp(u): four units in the last place near 1, exactly 1 at 0 and 0 at -infinity."""
    u = torch.cat((torch.linspace(-1.0, 0.0, 4096), torch.tensor([-100.0, float("-inf"), 0.0])))
    zero = torch.zeros(1)
    args = (u[None], torch.tensor([len(u) - 1]), torch.ones(1), 0.0, -100, *[zero] * 4)
    with fa.backend("cpp"):
        p = dlogits(-torch.ones(1), None, *args)[0]
    near = slice(0, 4096)
    assert (p[near] / u[near].double().exp() - 1.0).abs().max() <= 2.0 * LAST_DIGITS
    assert p[4095] == 1.0 and p[4096] == 0.0 and p[4097] == 0.0


def check_values() -> None:
    check_exponentials()
    for dtype in DTYPES:
        compare("cpp", *peaked_logits(4, 1031, dtype=dtype), 0.7, 5.0)
        compare("cpp", *peaked_logits(2, 9001, dtype=dtype), 1.0)
        for logits, targets in adversarial_logits(75, dtype).values():
            compare("cpp", logits, targets, 1.0)


def test_exponentials() -> None:
    check_exponentials()


def test_every_narrow_number() -> None:
    check_every_narrow_number()


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    """The processor here may take another one: the others run in processes told to use them."""
    program = (
        "import test_row_kernels as t\n"
        "t.check_every_narrow_number()\n"
        "t.check_values()\n"
        "print('passed')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env=os.environ | {"FASTALIGN_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "passed\n", done.stderr


@pytest.mark.parametrize("backend", KERNELS)
def test_rows_further_apart_than_32_bits(backend: str) -> None:
    """Row 2 begins 2^31 + 80 numbers after row 0; the memory between is never touched."""
    apart = (1 << 30) + 40
    near, targets = peaked_logits(3, 40, dtype=torch.bfloat16)
    device = device_of(backend)
    storage = torch.empty(2 * apart + 40, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((3, 40), (apart, 1)).copy_(near)
    args = (targets.to(device), torch.ones(1, device=device), 0.0, -100)
    g = torch.ones(3, device=device)
    with fa.backend(backend):
        want = row_stats(near.to(device), *args)
        # As [N, V] and as [B, T, V], whose batches have the wide stride.
        for logits in (far, far[:, None]):
            got = row_stats(logits, *args)
            assert torch.equal(torch.stack(got), torch.stack(want))
            dx = dlogits(g, None, logits, *args, *want)
            expected = dlogits(g, None, near.to(device), *args, *want)
            assert torch.equal(dx.reshape(3, 40), expected)


def test_rows_that_begin_anywhere_are_not_read_16_bytes_at_once() -> None:
    """On a processor a wrong answer here is a misaligned address; the interpreter would not see."""
    from fastalign.kernels.token_logprobs import has_aligned_rows

    assert has_aligned_rows(torch.zeros(3, 5, 32)[:, 1:], torch.zeros(15, 48))
    for x in (
        torch.zeros(5, 64)[:, :17],  # V
        torch.zeros(5, 40)[:, :32],  # the stride of rows
        torch.zeros(3000).as_strided((3, 5, 32), (1000, 32, 1)),  # of batches
        torch.zeros(161)[1:].view(5, 32),  # where the first row begins
    ):
        assert not has_aligned_rows(x)
        assert not has_aligned_rows(torch.zeros(3, 5, 32), x)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_debug_names_the_wrong_target(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = peaked_logits(4, 7, device=device_of(backend))
    targets[1] = -100
    monkeypatch.setenv("FASTALIGN_DEBUG", "1")
    with fa.backend(backend):
        fa.ops.token_logprobs(logits, targets)
        for wrong in (7, -1):
            targets[2] = wrong
            message = rf"token_logprobs: expected .* in \[0, 7\) or -100, got {wrong} in row 2"
            with pytest.raises(ValueError, match=message):
                fa.ops.token_logprobs(logits, targets)


def test_cpp_errors_do_not_show_where_the_source_was_built() -> None:
    with fa.backend("cpp"), pytest.raises(RuntimeError, match=r"(^|[ ,])csrc/\w+\.h:\d+"):
        fa.ops.token_logprobs(torch.zeros(2, 5), torch.tensor([1, 5]))
