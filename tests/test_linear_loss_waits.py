"""The host never waits for the device in the loss head, unless rows are to be counted."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from heads import gradients, make, policy_loss
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from fastalign.ops import linear_loss

WALK = importlib.import_module("fastalign.ops.linear_loss_walk")
N, H, V = 512, 16, 300
ROW = 4 * V


def per_token(logp: Tensor, entropy: Tensor, advantages: Tensor, old_logp: Tensor) -> Tensor:
    return -advantages * (logp - old_logp).exp() - 0.1 * entropy


def per_group(logp: Tensor, entropy: Tensor, cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.diff() * logp.sum()


def with_kl(logp: Tensor, entropy: Tensor, kl: Tensor) -> Tensor:
    return kl - logp


CASES: dict[str, dict[str, Any]] = {
    "single pass": dict(loss=per_token),
    "slabs": dict(loss=per_token, workspace=100 * ROW),
    "groups": dict(loss=per_group, groups=[0, 100, 512], workspace=450 * ROW),
    "two stages": dict(loss=per_group, groups=[0, 100, 512], workspace=200 * ROW),
    "reference": dict(loss=with_kl, workspace=200 * ROW),
    "batch invariant": dict(loss=per_token, workspace=100 * ROW, batch_invariant=True),
}


def run(options: dict[str, Any], ignore_index: int | None) -> Tensor:
    hidden, weight = (torch.empty(rows, H, requires_grad=True) for rows in (N, V))
    targets = torch.empty(N, dtype=torch.int64)
    loss = options["loss"]
    inputs = {"advantages": torch.empty(N), "old_logp": torch.empty(N)} if loss is per_token else {}
    more: dict[str, Any] = dict(ref_hidden=hidden, ref_weight=weight) if loss is with_kl else {}
    return linear_loss(
        hidden, weight, targets, inputs=inputs, ignore_index=ignore_index, **options, **more
    ).loss


@pytest.mark.parametrize("name", CASES)
def test_no_value_is_looked_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have shapes and no values: whatever asks for one raises."""
    # In-place kernels are not registered as ops, and are told nothing but pointers.
    monkeypatch.setattr(WALK, "dlogits_out", lambda out, *rest: out.zero_())
    monkeypatch.setattr(WALK, "kl_dlogits_out", lambda out, *rest: out.zero_())
    with FakeTensorMode():
        assert run(CASES[name], ignore_index=None).shape == ()
        with pytest.raises(DynamicOutputShapeException):
            run(CASES[name], ignore_index=-100)


@pytest.mark.gpu
def test_gpu_never_waits_when_nothing_is_dropped() -> None:
    hidden, weight, targets, inputs = make(device="cuda")
    targets = targets.clamp(min=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = linear_loss(hidden, weight, targets, policy_loss, inputs, ignore_index=None)
        out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("reference", [False, True], ids=["plain", "reference"])
def test_gpu_forward_and_backward_in_a_graph(reference: bool) -> None:
    """A CUDA graph can hold no wait; replayed on new numbers it gives their loss and gradients."""
    n, width, vocab = 256, 64, 4_096
    hidden, weight = (
        torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for rows in (n, vocab)
    )
    ref_hidden = torch.randn(n, width, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocab, (n,), device="cuda")
    more: dict[str, Any] = (
        dict(ref_hidden=ref_hidden, ref_weight=weight.detach()) if reference else {}
    )
    loss = with_kl if reference else (lambda logp, entropy: -logp - 0.1 * entropy)

    def step() -> list[Tensor]:
        out = linear_loss(
            hidden,
            weight,
            targets,
            loss,
            ignore_index=None,
            workspace=128 * 2 * vocab * (2 if reference else 1),
            **more,
        )
        return [out.loss, *gradients(out.loss, hidden, weight)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.normal_()
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
