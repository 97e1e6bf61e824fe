"""linear_logprobs and linear_kl keep logits for the backward pass: no more than planned, only of
rows that count, and none where a GPU has no room for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from heads import products
from torch import Tensor

from fastalign.ops import linear_kl, linear_logprobs, slab
from fastalign.ops.linear_kl import linear_kl_op
from fastalign.ops.linear_logprobs import linear_logprobs_op
from fastalign.ops.plan import CPU_SLAB, Plan, plan
from fastalign.testing import assert_no_worse, peaked_head

N, H, V = 512, 8, 3000
OPS = ["linear_logprobs", "linear_kl"]
Run = Callable[..., Tensor]


def problem(op: str, dtype: torch.dtype = torch.float32, drop: int = 0) -> tuple[Run, list[Tensor]]:
    """The op as a function of hidden states, weight and bias, and these; every ``drop``-th row does
    not count. linear_kl's reference is float32."""
    hidden, weight, targets = peaked_head(N, H, V, dtype=dtype)
    bias = torch.randn(V, generator=torch.Generator().manual_seed(5)).to(dtype)
    ref_hidden, ref_weight, _ = peaked_head(N, H, V, seed=1)
    mask = None
    if drop:
        mask = torch.arange(N) % drop != 0
        targets = targets.where(mask, -100)

    def run(h: Tensor, w: Tensor, b: Tensor, **options: Any) -> Tensor:
        if op == "linear_kl":
            return linear_kl(h, w, ref_hidden, ref_weight, bias=b, mask=mask, **options)
        return linear_logprobs(h, w, targets, bias=b, **options)

    return run, [x.requires_grad_() for x in (hidden, weight, bias)]


def row(op: str, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the logits of one token."""
    return V * (dtype.itemsize + (4 if op == "linear_kl" else 0))


def planned(op: str, dtype: torch.dtype, tokens: int, workspace: int) -> Plan:
    width, ref_dtype = (H, torch.float32) if op == "linear_kl" else (None, None)
    return plan(
        tokens,
        H,
        V,
        op=op,
        dtype=dtype,
        device="cpu",
        bias_grad=True,
        reference_width=width,
        reference_dtype=ref_dtype,
        workspace=workspace,
    )


def results(run: Run, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The op's result, and the gradients of a sum with another weight for each token."""
    out = run(*tensors, **options)
    up = torch.sin(torch.arange(1.0, 1.0 + len(out)))
    return [out.detach(), *torch.autograd.grad(out, tensors, up)]


def peak(f: Callable[[], object]) -> int:
    """The most bytes that were allocated at any one time while f ran."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        f()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def scratch(dtype: torch.dtype) -> int:
    """Bytes that torch's own product of a slab's dlogits and the weight allocates besides."""
    dz, weight, out = (torch.zeros(*shape, dtype=dtype) for shape in ((N, V), (V, H), (N, H)))
    return peak(lambda: torch.mm(dz, weight, out=out))


@pytest.mark.parametrize(
    ("op", "dtype", "room", "mode", "slabs"),
    [
        ("linear_logprobs", torch.float32, 2.0, "keep logits", 1),
        ("linear_logprobs", torch.float32, 1.6, "keep logits", 2),
        ("linear_logprobs", torch.float32, 1.0, "recompute", 1),
        ("linear_logprobs", torch.float32, 0.25, "recompute", 4),
        ("linear_logprobs", torch.bfloat16, 2.0, "keep logits", 1),
        ("linear_logprobs", torch.bfloat16, 1.6, "recompute", 1),
        ("linear_logprobs", torch.bfloat16, 0.25, "recompute", 4),
        ("linear_kl", torch.float32, 1.5, "keep logits", 1),
        ("linear_kl", torch.float32, 1.3, "keep logits", 2),
        ("linear_kl", torch.float32, 0.25, "recompute", 4),
        ("linear_kl", torch.bfloat16, 1.34, "keep logits", 1),
        ("linear_kl", torch.bfloat16, 1.0, "recompute", 1),
    ],
)
def test_what_is_held_is_what_was_planned(
    op: str,
    dtype: torch.dtype,
    room: float,
    mode: str,
    slabs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward, in a workspace for the logits of ``room`` times as many tokens."""
    monkeypatch.setattr(slab, "KEPT_BYTES", 0)
    monkeypatch.setattr(slab, "WIDENED_BYTES", 4 * N * 100)
    monkeypatch.setattr(slab._kept, "buffer", None, raising=False)
    run, tensors = problem(op, dtype)
    workspace = int(room * N * row(op, dtype))
    chosen = planned(op, dtype, N, workspace)
    assert (chosen.mode, chosen.slabs) == (mode, slabs) and chosen.workspace <= workspace
    most = peak(lambda: results(run, tensors, workspace=workspace))
    # Besides: the gradients and the accumulator, statistics (a row of 8 numbers a token in a few
    # places), operands of CPU products that are widened a part at a time, and what a product of
    # narrow operands takes for itself, which grows with the threads.
    gradients = sum(x.nbytes for x in tensors) + chosen.accumulator + 4 * V
    widened = 0 if dtype == torch.float32 else 2 * slab.WIDENED_BYTES + scratch(dtype)
    assert chosen.workspace <= most <= chosen.workspace + gradients + widened + 256 * N


def saved(run: Run, tensors: list[Tensor], **options: Any) -> list[torch.Size]:
    """The shapes of what waits for the backward pass."""
    shapes: list[torch.Size] = []

    def note(x: Tensor) -> Tensor:
        shapes.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run(*tensors, **options)
    return shapes


@pytest.mark.parametrize("op", OPS)
def test_only_rows_that_count_are_kept(op: str) -> None:
    """Half of the rows dropped, in a workspace too small to keep the logits of all."""
    run, tensors = problem(op, drop=2)
    shapes = saved(run, tensors, workspace=N * row(op))
    assert {shape[0] for shape in shapes if shape[1:] == (V,)} == {N // 2}


@pytest.mark.parametrize(("op", "room", "count"), [(OPS[0], 1.6, 1 + 4), (OPS[1], 1.3, 2 + 4)])
def test_kept_logits_are_one_product_also_beside_two_slabs_of_gradients(
    op: str, room: float, count: int
) -> None:
    run, tensors = problem(op)
    assert products(lambda: results(run, tensors, workspace=int(room * N * row(op)))) == count


@pytest.mark.parametrize("op", OPS)
def test_rows_that_torch_compile_could_not_count_are_zeros(op: str) -> None:
    """Where as many rows are kept as there are targets, of which two count."""
    h, w, targets = peaked_head(5, H, V)
    targets[1:4] = -100
    torch.use_deterministic_algorithms(True)  # what is not filled is NaN
    try:
        args = (0.0, -100, None, 5, 5)
        if op == "linear_kl":
            *_, x, y = linear_kl_op(h, w, None, h, w, None, targets, torch.ones(1), *args)
            assert torch.equal(x, y)
        else:
            *_, x = linear_logprobs_op(h, w, targets, None, torch.ones(1), *args, False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not x[2:].any() and x[:2].any(dim=1).all()


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_of_the_gradient_is_refused(op: str) -> None:
    run, tensors = problem(op)
    (first,) = torch.autograd.grad(run(*tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}_backward"):
        first.sum().backward()


class Scarce:
    """A GPU with little memory left: allocations of more rows of logits than ``room`` fail.

    ``held`` are the rows of the workspaces alive, ``asked`` those of every one asked for, ``kept``
    the rows of logits to keep.
    """

    def __init__(self, op: str, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.held = room, 0
        self.asked: list[int] = []
        self.kept: list[int] = []
        self.module = importlib.import_module(f"fastalign.ops.{op}")
        self.plain, self.fresh = self.module.logits_workspace, self.module.fresh
        monkeypatch.setattr(self.module, "logits_workspace", self.workspace)
        monkeypatch.setattr(self.module, "fresh", self.keep)

    @contextmanager
    def workspace(self, rows: int, vocab: int, like: Tensor) -> Iterator[Tensor]:
        self.asked.append(rows)
        self.take(rows)
        with self.plain(rows, vocab, like) as work:
            yield work
        self.held -= rows

    def keep(self, shape: tuple[int, int], *options: Any) -> Tensor:
        self.kept.append(shape[0])
        if shape[0] > self.room:
            raise torch.OutOfMemoryError("no room")
        return self.fresh(shape, *options)

    def take(self, rows: int) -> None:
        if self.held + rows > self.room:
            raise torch.OutOfMemoryError("no room")
        self.held += rows


def no_room(shape: tuple[int, int], *options: Any) -> Tensor:
    """For ``fresh``: nothing can be kept."""
    if shape[0]:
        raise torch.OutOfMemoryError("no room")
    return torch.empty(0, V)


def check_same(got: list[Tensor], want: list[Tensor]) -> None:
    for index, (x, y) in enumerate(zip(got, want, strict=True)):
        assert_no_worse(x, y, y.double(), torch.float32, grad=index > 0)


@pytest.mark.parametrize("op", OPS)
def test_without_room_to_keep_logits_they_are_computed_again(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tensors = problem(op)
    plenty = results(run, tensors)
    scarce = Scarce(op, monkeypatch, room=2 * 100)  # rows of linear_kl's two workspaces
    check_same(results(run, tensors), plenty)
    assert scarce.kept[0] == N and set(scarce.kept[1:]) == {0}
    forward = [512, 256, 128] if op == "linear_logprobs" else [512, 256, 128, 128, 64, 64]
    assert scarce.asked == 2 * forward
    count = products(lambda: results(run, tensors))
    slabs = -(-N // forward[-1])
    assert count == slabs * (4 if op == "linear_logprobs" else 6)


@pytest.mark.parametrize("op", OPS)
def test_without_room_for_gradients_beside_kept_logits_slabs_are_smaller(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tensors = problem(op)
    plenty = results(run, tensors)
    out = run(*tensors)
    scarce = Scarce(op, monkeypatch, room=9)
    up = torch.sin(torch.arange(1.0, 1.0 + len(out)))
    check_same([out.detach(), *torch.autograd.grad(out, tensors, up)], plenty)
    beside = [512, 256, 128, 64, 32, 16, 8]
    assert [rows for rows in scarce.asked if rows] == beside and scarce.held == 0


@pytest.mark.parametrize("op", OPS)
def test_without_room_for_a_single_row_it_says_so(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tensors = problem(op)
    scarce = Scarce(op, monkeypatch, room=0)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        run(*tensors)
    assert scarce.asked[-1] == 1 and scarce.held == 0


def test_a_slab_fixed_by_batch_invariant_does_not_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results would be other bits. Logits need not be kept for that."""
    run, tensors = problem("linear_logprobs")
    options: dict[str, Any] = dict(batch_invariant=True)
    plenty = results(run, tensors, **options)
    scarce = Scarce("linear_logprobs", monkeypatch, room=CPU_SLAB)
    monkeypatch.setattr(scarce.module, "fresh", no_room)
    for got, want in zip(results(run, tensors, **options), plenty, strict=True):
        assert torch.equal(got, want)
    scarce.room = CPU_SLAB - 1
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        run(*tensors, **options)
    assert scarce.asked == [CPU_SLAB] * 3
