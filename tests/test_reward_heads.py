"""Reward heads: three backends against float64, statistics, gradients, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reward_ensembles import BACKENDS, DTYPES, KERNELS, compare, device_of, make, run
from torch import Tensor

import fastalign as fa
from fastalign.ops.reduce_scores import STATISTICS
from fastalign.ops.reward_heads import (
    _reward_heads,
    _reward_heads_backward,
    reward_heads,
    reward_heads_backward_reference,
    reward_heads_reference,
)
from fastalign.testing import assert_no_worse

SHAPES = [  # rows, samples, width, heads
    (1, 1, 1, 1),
    (9, 5, 33, 3),  # tails in rows, columns and heads
    (40, 70, 128, 16),  # more samples than rows, exactly one block of columns
    (70, 66, 300, 5),  # several blocks, the last ones ragged
    (3, 5, 64, 64),  # as many heads as there may be
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_against_float64(
    backend: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    compare(backend, make(*shape, dtype, device_of(backend)))


@pytest.mark.parametrize("reduce", STATISTICS)
@pytest.mark.parametrize("backend", KERNELS)
def test_statistics_without_index_or_bias(backend: str, reduce: str) -> None:
    hidden, weight, _, _ = make(37, 1, 50, 6, torch.float32, device_of(backend))
    with fa.backend(backend):
        scores, reduced, std = reward_heads(
            hidden, weight, reduce=reduce, coef=0.5, return_std=True
        )
    truth = reward_heads_reference(hidden.double(), weight.double(), None, None, reduce, 0.5)
    eager = reward_heads_reference(hidden, weight, None, None, reduce, 0.5)
    for got, plain, true in zip((scores, reduced, std), eager, truth, strict=True):
        assert_no_worse(got, plain, true, torch.float32)
    # The statistic is that of the scores returned, to the bit where it is one of them.
    with fa.backend(backend):
        assert torch.equal(fa.ops.reduce_scores(scores, reduce, 0.5), reduced)


@pytest.mark.parametrize("backend", KERNELS)
def test_float32_heads_on_bfloat16_states(backend: str) -> None:
    """As under autocast: neither the scores nor the heads' gradient may fall back to bfloat16."""
    hidden, weight, bias, index = make(20, 30, 65, 4, torch.float32, device_of(backend))
    inputs = (hidden.bfloat16(), weight, bias, index)
    truth = run("reference", (*(x.double() for x in inputs[:3]), index), "mean")
    eager = run("reference", inputs, "mean")
    got = run(backend, inputs, "mean")
    assert [x.dtype for x in got[3:]] == [torch.bfloat16, torch.float32, torch.float32]
    for place in (0, 1, 2, 4, 5):
        assert_no_worse(got[place], eager[place], truth[place], torch.float32, grad=place > 2)
    assert_no_worse(got[3], eager[3], truth[3], torch.bfloat16, grad=True)


def test_scores_keep_float32_under_autocast() -> None:
    hidden, weight, bias, _ = make(20, 1, 65, 4, torch.float32)
    for backend in BACKENDS[:2]:
        with fa.backend(backend), torch.autocast("cpu", torch.bfloat16):
            scores = reward_heads(hidden, weight, bias)
        truth = hidden.double() @ weight.double().t() + bias
        assert_no_worse(scores, hidden @ weight.t() + bias, truth, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_at_real_sizes(dtype: torch.dtype) -> None:
    """Several blocks of columns and of rows, several tasks of threads."""
    compare("cpp", make(300, 200, 2500, 16, dtype))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_worked_by_hand(backend: str, index_dtype: torch.dtype) -> None:
    """Rows 2 and 0 of hidden; head 0 reads the first feature, head 1 the sum, biases 10 and 0.

    row 2 = (5, 6): 5 + 10 = 15 and 11; row 0 = (1, 2): 11 and 3. min = 11 and 3: the gradient of
    its sum goes to head 1, whose weights (1, 1) it is on rows 2 and 0; dweight of head 1 is
    (5 + 1, 6 + 2). std: 4 / sqrt(2) and 8 / sqrt(2).
    """
    device = device_of(backend)
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=device, requires_grad=True)
    bias = torch.tensor([10.0, 0.0], device=device, requires_grad=True)
    index = torch.tensor([2, 0], dtype=index_dtype, device=device)
    with fa.backend(backend):
        scores, reduced, std = reward_heads(
            hidden, weight, bias, index=index, reduce="min", return_std=True
        )
        gradients = torch.autograd.grad(reduced.sum(), (hidden, weight, bias))
    assert scores.tolist() == [[15.0, 11.0], [11.0, 3.0]]
    assert reduced.tolist() == [11.0, 3.0]
    assert std.tolist() == pytest.approx([4.0 / 2**0.5, 8.0 / 2**0.5], rel=1e-6)
    assert gradients[0].tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert gradients[1].tolist() == [[0.0, 0.0], [6.0, 8.0]]
    assert gradients[2].tolist() == [0.0, 2.0]


def test_what_is_returned() -> None:
    hidden, weight = torch.randn(3, 2), torch.randn(2, 2)
    assert isinstance(reward_heads(hidden, weight), Tensor)
    assert len(reward_heads(hidden, weight, reduce="min")) == 2
    scores, std = reward_heads(hidden, weight, return_std=True)
    assert torch.allclose(std, scores.std(1))


@pytest.mark.parametrize("reduce", STATISTICS)
def test_closed_form_gradient_is_autograds(reduce: str) -> None:
    """An index that names a row twice adds both gradients."""
    hidden, weight, bias, _ = make(6, 1, 5, 3, torch.float64)
    leaves = (hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())
    index = torch.tensor([4, 1, 4])

    def f(*inputs: Tensor) -> tuple[Tensor, ...]:
        return reward_heads(*inputs, index=index, reduce=reduce, coef=0.5, return_std=True)

    assert torch.autograd.gradcheck(f, leaves)
    out = reward_heads_reference(*leaves, index, reduce, 0.5)
    g = (torch.randn_like(out[0]), torch.randn_like(out[1]), torch.randn_like(out[2]))
    total = (g[0] * out[0]).sum() + (g[1] * out[1]).sum() + (g[2] * out[2]).sum()
    want = torch.autograd.grad(total, leaves)
    states, heads, scores = hidden.detach(), weight.detach(), out[0].detach()
    got = reward_heads_backward_reference(
        *g, states, heads, index, scores, reduce, 0.5, needs_hidden=True, needs_heads=True
    )
    for one, two in zip(got, want, strict=True):
        assert_no_worse(one, two, two, torch.float64, grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_alone_may_be_trained(backend: str) -> None:
    hidden, weight, bias, _ = make(5, 1, 40, 3, torch.bfloat16, device_of(backend))
    bias.requires_grad_()
    with fa.backend(backend):
        reward_heads(hidden, weight, bias).sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.bfloat16
    assert bias.grad.tolist() == [5.0] * 3


@pytest.mark.parametrize("backend", KERNELS)
def test_bfloat16_gradients_are_rounded_once(backend: str) -> None:
    """Rounding dL/dscores before the products as well would move about half of the numbers.

    Triton's interpreter cuts bfloat16 off where all others round it.
    """
    hidden, weight, bias, index = make(40, 60, 300, 5, torch.bfloat16, device_of(backend))
    got = run(backend, (hidden, weight, bias, index), "mean")
    exact = run("reference", (hidden.float(), weight.float(), bias.float(), index), "mean")
    for place in (3, 4):
        cut = (exact[place].view(torch.int32) & -65536).view(torch.float32)
        same = (got[place] == exact[place].bfloat16()) | (got[place].float() == cut)
        assert same.float().mean() > 0.98


ISA_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from reward_ensembles import DTYPES, compare, make
for dtype in DTYPES:
    compare("cpp", make(300, 70, 1203, 7, dtype))
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


@pytest.mark.parametrize("reduce", STATISTICS)
def test_opcheck_and_compile(reduce: str) -> None:
    hidden, weight, bias, _ = make(6, 1, 4, 3, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    index = torch.tensor([5, 0])
    torch.library.opcheck(_reward_heads, (hidden, weight, bias, index, reduce, 0.5))
    torch.library.opcheck(_reward_heads, (hidden, weight, None, None, reduce, 0.5))
    detached = (hidden.detach(), weight.detach())
    rest = (*detached, index, torch.randn(2, 3), reduce, 0.5)
    g = torch.randn(2)
    for needs in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(_reward_heads_backward, (None, g, None, *rest, *needs))

    def f(hidden: Tensor, weight: Tensor) -> Tensor:
        scores, reduced = reward_heads(hidden, weight, index=index, reduce=reduce, coef=0.5)
        return scores.sum() + reduced.square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(f(hidden, weight), (hidden, weight))
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


H, W = torch.zeros(4, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        (
            (H, torch.zeros(2, 5)),
            {},
            r"hidden \[N, D\] and weight \[K, D\], D >= 1, got \(4, 3\) and \(2, 5",
        ),
        ((H[None], W), {}, r"got \(1, 4, 3\) and \(2, 3\)"),
        ((H[:, :0], W[:, :0]), {}, r"D >= 1, got \(4, 0\) and \(2, 0\)"),
        ((H, W[:0]), {}, r"1 <= K <= 64 heads, got weight \(0, 3\)"),
        ((H, torch.zeros(65, 3)), {}, r"1 <= K <= 64 heads, got weight \(65, 3\)"),
        ((H, W, torch.zeros(3)), {}, r"bias \[K\] = \(2,\), got \(3,\)"),
        ((H, W), {"index": torch.zeros(2)}, r"int32 or int64, got \(2,\) torch.float32"),
        ((H.long(), W), {}, "hidden of a floating dtype, got torch.int64"),
        ((H, W.to("meta")), {}, "weight on the device of hidden, cpu, got meta"),
        ((H, W), {"reduce": "max"}, "mean, min, lcb, uwo, median, got 'max'"),
        ((H, W), {"reduce": "lcb"}, "coef >= 0 for 'lcb', got None"),
        ((H, W), {"reduce": "uwo", "coef": -1.0}, "coef >= 0 for 'uwo', got -1.0"),
    ],
)
def test_bad_input(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"reward_heads: .*{message}"):
        reward_heads(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8192, 8192, 4096, 16), (70_000, 100_000, 64, 5)], ids=str)
def test_gpu_at_real_sizes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs = make(*shape, dtype, "cuda")
    compare("triton", inputs)
    compare("triton", (*inputs[:3], None))


@pytest.mark.gpu
def test_gpu_capture_means_no_wait_for_the_device() -> None:
    hidden, weight, bias, index = make(500, 64, 256, 5, torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def step() -> tuple[Tensor, ...]:
        _, reduced = reward_heads(*leaves, index=index, reduce="median")
        return reduced.detach(), *torch.autograd.grad(reduced.sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)
