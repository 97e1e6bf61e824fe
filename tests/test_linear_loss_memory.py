"""linear_loss and memory: a gradient buffer of the caller, fixed shapes, and too little of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from heads import GROUPS, H, N, V, gradients, likelihood, make, policy_loss, products, rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.ops import linear_logprobs, linear_loss
from fastalign.ops.slab import Groups, HeadGradients, Rows
from fastalign.testing import assert_no_worse, peaked_head

WALK = importlib.import_module("fastalign.ops.linear_loss_walk")
CPU = torch.device("cpu")


class Largest(TorchDispatchMode):
    """Notes the most numbers that any result of any op had."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_no_tensor_of_all_the_logits() -> None:
    n, width, vocab, slab = 96, 8, 500, 16
    hidden, weight, targets = peaked_head(n, width, vocab)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Largest() as largest:
        linear_loss(hidden, weight, targets, likelihood, workspace=slab * vocab * 4).loss.backward()
    # The workspace is a view of bytes.
    assert largest.numel <= 4 * slab * vocab < n * vocab


@pytest.mark.parametrize("slab", [None, 16, 5], ids=["1 slab", "3 slabs", "8 slabs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_gradient_is_added_to_the_buffer(dtype: torch.dtype, slab: int | None) -> None:
    hidden, weight, targets, inputs = make(dtype)
    before = torch.randn(V, H)
    buffer = before.clone()
    options = dict(workspace=rows(slab, dtype))
    out = linear_loss(hidden, weight, targets, policy_loss, inputs, weight_grad=buffer, **options)
    assert weight.grad is None
    out.loss.backward()
    assert weight.grad is None and hidden.grad is not None
    h, w = (x.detach().float().requires_grad_() for x in (hidden, weight))
    plain = linear_loss(h, w, targets, policy_loss, inputs)
    (want,) = gradients(plain.loss, w)
    (eager,) = gradients(
        linear_loss(hidden, weight, targets, policy_loss, inputs, **options).loss, weight
    )
    assert_no_worse(buffer, before + eager, before + want.double(), dtype, grad=True)


def test_micro_batches_into_one_buffer_equal_the_batch() -> None:
    """Bit for bit when the micro-batches are the slabs: each adds its product to the same sum."""
    hidden, weight, targets, _ = make()
    targets = targets.clamp(min=0)
    whole = torch.zeros(V, H)
    linear_loss(
        hidden, weight, targets, likelihood, weight_grad=whole, workspace=rows(16), normalizer=N
    )
    parts = torch.zeros(V, H)
    for start in range(0, N, 16):
        cut = slice(start, start + 16)
        linear_loss(
            hidden[cut], weight, targets[cut], likelihood, weight_grad=parts, normalizer=N
        ).loss.backward()
    assert torch.equal(parts, whole)


def test_tied_embeddings_add_to_the_same_buffer() -> None:
    _, weight, targets, _ = make()
    tokens = torch.randint(V, (N,))
    weight.grad = torch.zeros(V, H)
    hidden = torch.tanh(torch.nn.functional.embedding(tokens, weight))
    linear_loss(hidden, weight, targets, likelihood, weight_grad=weight.grad).loss.backward()
    twin = weight.detach().clone().requires_grad_()
    hidden = torch.tanh(torch.nn.functional.embedding(tokens, twin))
    (want,) = gradients(linear_loss(hidden, twin, targets, likelihood).loss, twin)
    assert_no_worse(weight.grad, want, want.double(), torch.float32, grad=True)


def test_a_frozen_weight_with_a_buffer_still_fills_it() -> None:
    hidden, weight, targets, _ = make()
    buffer = torch.zeros(V, H)
    frozen = weight.detach()
    linear_loss(hidden, frozen, targets, likelihood, weight_grad=buffer).loss.backward()
    (want,) = gradients(linear_loss(hidden, weight, targets, likelihood).loss, weight)
    assert torch.equal(buffer, want)


def test_nothing_may_multiply_a_loss_whose_gradient_is_in_the_buffer() -> None:
    hidden, weight, targets, _ = make()
    out = linear_loss(hidden, weight, targets, likelihood, weight_grad=torch.zeros(V, H))
    with pytest.raises(ValueError, match=r"end of the graph.*upstream gradient 2\.0"):
        (2.0 * out.loss).backward()


def test_one_backward_pass_with_a_buffer() -> None:
    hidden, weight, targets, _ = make()
    out = linear_loss(hidden, weight, targets, likelihood, weight_grad=torch.zeros(V, H))
    out.loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="one backward pass when weight_grad is given"):
        out.loss.backward()


def test_without_gradients_the_buffer_stays() -> None:
    hidden, weight, targets, _ = make()
    buffer = torch.zeros(V, H)
    with torch.no_grad():
        linear_loss(hidden, weight, targets, likelihood, weight_grad=buffer)
    assert not buffer.any()


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(V, H + 1),
        torch.zeros(V, H, dtype=torch.bfloat16),
        torch.zeros(H, V).t(),
        torch.zeros(V, H, requires_grad=True),
    ],
    ids=["shape", "dtype", "strides", "requires grad"],
)
def test_a_buffer_that_does_not_fit_is_named(buffer: Tensor) -> None:
    hidden, weight, targets, _ = make()
    with pytest.raises(ValueError, match="linear_loss: expected weight_grad as a contiguous"):
        linear_loss(hidden, weight, targets, likelihood, weight_grad=buffer)


def orders(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    mixed = torch.randperm(n, generator=generator)
    return {"permuted": mixed, "seven": mixed[:7], "one": mixed[:1], "doubled": mixed.repeat(2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", orders(N))
def test_batch_invariance(order: str, dtype: torch.dtype) -> None:
    """With a fixed slab a token's results are the same bits in any company, in both ops."""
    hidden, weight, targets, inputs = make(dtype)
    index = orders(N)[order]
    advantages = inputs["advantages"]

    def loss(logp: Tensor, entropy: Tensor, advantages: Tensor) -> Tensor:
        return advantages * logp - 0.1 * entropy

    def run(chosen: Tensor) -> tuple[Tensor, ...]:
        h = hidden.detach()[chosen].requires_grad_()
        options: dict[str, Any] = dict(workspace=rows(16, dtype), batch_invariant=True)
        given = {"advantages": advantages[chosen]}
        out = linear_loss(h, weight, targets[chosen], loss, given, normalizer=1.0, **options)
        (dh,) = gradients(out.loss, h)
        again, _ = linear_logprobs(h, weight, targets[chosen], return_entropy=True, **options)
        (dh_logp,) = gradients(again.sum(), h)
        return out.logp, out.entropy, dh, again.detach(), dh_logp

    whole, part = run(torch.arange(N)), run(index)
    for all_rows, some in zip(whole, part, strict=True):
        assert torch.equal(some, all_rows[index])


class Operands(TorchDispatchMode):
    """Notes the shapes of the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[torch.Size, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.add(tuple(x.shape for x in args[-2:]))
        return func(*args, **(kwargs or {}))


def test_batch_invariance_is_asked_for() -> None:
    """Without it the last slab, 5 of 37 rows, is as small as it is: for another shape a library may
    take another kernel, which sums in another order."""
    hidden, weight, targets, _ = make()
    targets = targets.clamp(min=0)
    kinds = {}
    for asked in (False, True):
        with Operands() as seen:
            options: dict[str, Any] = dict(workspace=rows(16), batch_invariant=asked)
            linear_loss(hidden, weight, targets, likelihood, **options).loss.backward()
        kinds[asked] = seen.shapes

    def products_of(slab: int) -> set[tuple[tuple[int, int], ...]]:
        return {((slab, H), (H, V)), ((slab, V), (V, H)), ((V, slab), (slab, H))}

    assert kinds[False] == products_of(16) | products_of(5)
    assert kinds[True] == products_of(16)


def test_the_filled_up_slab_changes_no_gradient() -> None:
    hidden, weight, targets, inputs = make()
    plain = linear_loss(hidden, weight, targets, policy_loss, inputs)
    filled = linear_loss(
        hidden, weight, targets, policy_loss, inputs, workspace=rows(16), batch_invariant=True
    )
    wanted = gradients(plain.loss, hidden, weight, inputs["values"])
    for got, want in zip(
        gradients(filled.loss, hidden, weight, inputs["values"]), wanted, strict=True
    ):
        assert_no_worse(got, want, want.double(), torch.float32, grad=True)


def test_less_memory_than_planned_means_smaller_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, inputs = make()
    tall: list[int] = []
    plain = WALK.logits_workspace

    @contextmanager
    def scarce(height: int, vocab: int, like: Tensor) -> Iterator[Tensor]:
        tall.append(height)
        if height > 9:
            raise torch.OutOfMemoryError("no room")
        with plain(height, vocab, like) as work:
            yield work

    monkeypatch.setattr(WALK, "logits_workspace", scarce)
    out = linear_loss(hidden, weight, targets, policy_loss, inputs)
    count = int((targets != -100).sum())
    assert tall == [count, count // 2, count // 4] and tall[-1] <= 9 < tall[-2]
    monkeypatch.undo()
    plenty = linear_loss(hidden, weight, targets, policy_loss, inputs)
    assert out.loss.item() == pytest.approx(plenty.loss.item(), rel=1e-6)

    # A budget of the caller's is an upper bound; a slab of fixed shape is a promise.
    monkeypatch.setattr(WALK, "logits_workspace", scarce)
    tall.clear()
    linear_loss(hidden, weight, targets, policy_loss, inputs, workspace=rows(20))
    assert tall == [16, 8]
    with pytest.raises(torch.OutOfMemoryError):
        linear_loss(
            hidden, weight, targets, policy_loss, inputs, workspace=rows(20), batch_invariant=True
        )
    assert tall == [16, 8, 16]


def test_less_memory_for_the_accumulator_means_smaller_slabs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The failed attempt's workspace is gone before the next one takes its own."""
    hidden, weight, targets, inputs = make()
    plain, held = WALK.logits_workspace, []

    @contextmanager
    def scarce(height: int, vocab: int, like: Tensor) -> Iterator[Tensor]:
        held.append(height)
        assert sum(held) == height
        with plain(height, vocab, like) as work:
            yield work
        held.remove(height)

    class Scarce(HeadGradients):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if args[4] < 4:
                raise torch.OutOfMemoryError("no room beside such a slab")
            super().__init__(*args, **kwargs)

    expected = linear_loss(hidden, weight, targets, policy_loss, inputs).loss
    monkeypatch.setattr(WALK, "logits_workspace", scarce)
    monkeypatch.setattr(WALK, "HeadGradients", Scarce)
    out = linear_loss(hidden, weight, targets, policy_loss, inputs)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_failed_attempt_gives_its_workspaces_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 20 rows in all: of the first attempts the policy's workspace fits, and the
    reference's beside it does not."""
    hidden, weight, targets, _ = make()
    plain = WALK.logits_workspace
    held: list[int] = []
    asked: list[int] = []

    @contextmanager
    def scarce(height: int, vocab: int, like: Tensor) -> Iterator[Tensor]:
        asked.append(height)
        if sum(held) + height > 20:
            raise torch.OutOfMemoryError("no room")
        held.append(height)
        with plain(height, vocab, like) as work:
            yield work
        held.remove(height)

    def kl(logp: Tensor, entropy: Tensor, kl: Tensor) -> Tensor:
        return kl - logp

    def step() -> Tensor:
        reference: dict[str, Any] = dict(ref_hidden=hidden.detach() + 1, ref_weight=weight.detach())
        return linear_loss(hidden, weight, targets, kl, **reference).loss

    expected = step()
    monkeypatch.setattr(WALK, "logits_workspace", scarce)
    assert step().item() == pytest.approx(expected.item(), rel=1e-6)
    assert asked == [29, 14, 14, 7, 7] and not held


def test_a_wider_reference_is_counted_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 rows of bfloat16 logits beside 9 of float32 ones are 9 * 6 bytes a word."""
    hidden, weight, targets, _ = make(torch.bfloat16)
    plain, tall = WALK.logits_workspace, []

    def noted(height: int, vocab: int, like: Tensor) -> Any:
        tall.append((height, like.dtype))
        return plain(height, vocab, like)

    monkeypatch.setattr(WALK, "logits_workspace", noted)
    linear_loss(
        hidden,
        weight,
        targets,
        lambda logp, entropy, kl: kl,
        ref_hidden=hidden.detach().float(),
        ref_weight=weight.detach().float(),
        workspace=9 * 6 * V,
    )
    assert tall == [(9, torch.bfloat16), (9, torch.float32)]


def test_slabs_of_groups_hold_no_more_rows_than_they_may() -> None:
    """Groups of 6, 0, 15, 4 and 12 rows: 16 rows hold the last two, 15 do not."""
    groups = Groups(GROUPS.tolist(), Rows(torch.zeros(N, dtype=torch.int64), -100), CPU)
    assert groups.slabs(16) == [(0, 2), (2, 3), (3, 5)]
    assert groups.slabs(15) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert groups.slabs(37) == [(0, 5)]


def test_a_group_too_long_for_the_memory_left_takes_two_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, targets, _ = make()
    targets = targets.clamp(min=0)
    plain = WALK.logits_workspace

    @contextmanager
    def scarce(height: int, vocab: int, like: Tensor) -> Iterator[Tensor]:
        if height > 20:
            raise torch.OutOfMemoryError("no room")
        with plain(height, vocab, like) as work:
            yield work

    def whole(logp: Tensor, entropy: Tensor, cu_seqlens: Tensor) -> Tensor:
        return logp.sum().reshape(1) ** 2

    def step() -> Tensor:
        return linear_loss(hidden, weight, targets, whole, groups=[0, N]).loss

    expected = step()
    monkeypatch.setattr(WALK, "logits_workspace", scarce)
    slabs, rest = divmod(products(lambda: step().backward()), 4)
    assert slabs > 1 and rest == 0
    assert step().item() == pytest.approx(expected.item(), rel=1e-6)
