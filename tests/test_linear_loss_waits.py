"""The host never waits for the device in the loss head, unless rows are to be counted."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from heads import gradients, make, policy_loss
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastalign import losses
from fastalign.ops import linear_loss
from fastalign.ops.slab import _numbers

SLAB = importlib.import_module("fastalign.ops.slab")
N, H, V = 512, 16, 300
ROW = 4 * V
GROUPS = [0, 100, 512]
PAIRS = [0, 30, 100, 130, 512]
EXACT = losses.PPO(kl_coef=0.1, kl_kind="exact")
GSPO = losses.GRPO("gspo", kl_coef=0.1, entropy_coef=0.01)


def own(logp: Tensor, entropy: Tensor, advantages: Tensor, scale: Tensor) -> Tensor:
    return -advantages * logp - scale * entropy


def per_group(logp: Tensor, entropy: Tensor, advantages: Tensor, cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.diff() * (advantages * logp - entropy).sum()


def with_kl(logp: Tensor, entropy: Tensor, kl: Tensor, ref_logp: Tensor) -> Tensor:
    return kl - logp + ref_logp


OBJECTS: dict[str, Any] = {
    "mle": losses.MLE(),
    "apa": losses.APA(0.1),
    "awr": losses.AWR(0.5, weight_cap=20.0),
    "rwr": losses.RWR(0.5),
    "ppo": losses.PPO(dual_clip=3.0, kl_coef=0.1, entropy_coef=0.01),
    "dapo": losses.GRPO("dapo", kl_coef=0.1, kl_kind="k2"),
    "cispo": losses.GRPO("cispo"),
}
CASES: dict[str, dict[str, Any]] = {
    **{name: dict(loss=loss) for name, loss in OBJECTS.items()},
    "sequence mean": dict(loss=losses.GRPO(), groups=GROUPS, workspace=50 * ROW),
    "exact KL": dict(loss=EXACT, ref=True, workspace=200 * ROW),
    "gspo": dict(loss=GSPO, groups=GROUPS, workspace=450 * ROW),
    "gspo, two stages": dict(loss=GSPO, groups=GROUPS, workspace=200 * ROW),
    **{
        type(loss).__name__: dict(loss=loss, groups=PAIRS, workspace=450 * ROW)
        for loss in (losses.DPO(), losses.RPO(), losses.XPO(), losses.SimPO(), losses.KTO())
    },
    "pairs, two stages": dict(loss=losses.DPO(), groups=PAIRS, workspace=200 * ROW),
    "callable": dict(loss=own),
    "slabs": dict(loss=own, workspace=100 * ROW),
    "a constant on the host": dict(loss=own, workspace=100 * ROW, on_host=True),
    "groups": dict(loss=per_group, groups=GROUPS, workspace=450 * ROW),
    "groups, two stages": dict(loss=per_group, groups=GROUPS, workspace=200 * ROW),
    "reference": dict(loss=with_kl, workspace=200 * ROW),
    "reference and object": dict(loss=losses.PPO(kl_coef=0.1), ref=True, workspace=200 * ROW),
    "batch invariant": dict(loss=own, workspace=100 * ROW, batch_invariant=True),
    "all of the head": dict(
        loss=OBJECTS["ppo"], bias=True, per_token=True, softcap=30.0, workspace=100 * ROW
    ),
    "weight_grad": dict(loss=OBJECTS["ppo"], weight_grad=True, workspace=100 * ROW),
    "float16": dict(loss=OBJECTS["ppo"], dtype=torch.float16, workspace=50 * ROW),
    "bfloat16": dict(loss=own, dtype=torch.bfloat16, workspace=50 * ROW, bias=True),
    "normalizer": dict(loss=OBJECTS["mle"], normalizer=True),
}


def inputs_of(loss: Any, device: str, ref: bool, on_host: bool) -> dict[str, Tensor]:
    """What the loss takes, and old_logp and ref_logp for the metrics."""

    def vector() -> Tensor:
        return torch.empty(N, device=device)

    if loss is with_kl:
        return {}
    if loss is own:
        scale = torch.ones(()) if on_host else torch.empty((), device=device, requires_grad=True)
        return {"advantages": vector(), "scale": scale}
    if loss is per_group:
        return {"advantages": vector()}
    names = {*loss.required, *loss.optional, "old_logp", "ref_logp"} - {"cu_seqlens", "kl"}
    flags = {"chosen_is_ref": 2, "desirable": 4}
    inputs = {name: vector() for name in names if not (ref and name == "ref_logp")}
    for name in names & {*flags}:
        inputs[name] = torch.empty(flags[name], dtype=torch.bool, device=device)
    if "z0" in names:
        inputs["z0"] = torch.empty((), device=device)
    return inputs


def run(
    device: str,
    loss: Any,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    per_token: bool = False,
    weight_grad: bool = False,
    normalizer: bool = False,
    ref: bool = False,
    on_host: bool = False,
    ignore_index: int | None = None,
    **options: Any,
) -> None:
    """Forward and backward on tensors without numbers."""

    def made(*shape: int, dtype: torch.dtype = dtype, grad: bool = False) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=grad)

    ref = ref or loss is with_kl
    inputs = inputs_of(loss, device, ref, on_host)
    hidden, weight = made(N, H, grad=True), made(V, H, grad=True)
    out = linear_loss(
        hidden,
        weight,
        made(N, dtype=torch.int64),
        loss,
        inputs,
        bias=made(V, grad=True) if bias else None,
        temperature=made(N, dtype=torch.float32) if per_token else 0.7,
        weight_grad=made(V, H, dtype=torch.float32) if weight_grad else None,
        normalizer=made(dtype=torch.float32) if normalizer else None,
        ref_hidden=made(N, 2 * H) if ref else None,
        ref_weight=made(V, 2 * H) if ref else None,
        ignore_index=ignore_index,
        **options,
    )
    out.loss.backward()
    assert out.loss.shape == () and hidden.grad is not None
    assert (weight.grad is None) == weight_grad
    assert all(value.shape == () for value in out.metrics.values())
    assert {"entropy", "top1"} <= set(out.metrics) and ("kl" in out.metrics) == ref


class NoWait(TorchDispatchMode):
    """Refuses copies from one device to another that the host would wait for; counts all."""

    copies = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy):
            given = [x.device for x in tree_leaves((args, out)) if isinstance(x, Tensor)]
            waits = not (kwargs.get("non_blocking") or args[-1] is True)
            self.copies += len(set(given)) > 1
            if len(set(given)) > 1 and waits:
                raise RuntimeError(f"the host waits: {func} with tensors on {given}")
        return out


# A fake tensor has a shape and no value, and raises where one is asked for. A meta tensor does too,
# and lies on a device that is not the host's.
WITHOUT_NUMBERS: dict[str, tuple[str, AbstractContextManager[Any]]] = {
    "fake": ("cpu", FakeTensorMode()),
    "meta": ("meta", NoWait()),
}


@pytest.mark.parametrize("kind", WITHOUT_NUMBERS)
@pytest.mark.parametrize("name", CASES)
def test_no_value_is_looked_at(name: str, kind: str) -> None:
    device, mode = WITHOUT_NUMBERS[kind]
    with mode:
        run(device, **CASES[name])


def test_counting_the_rows_looks_at_the_targets() -> None:
    with FakeTensorMode(), pytest.raises(DynamicOutputShapeException):
        run("cpu", **CASES["callable"], ignore_index=-100)


@pytest.mark.parametrize("workspace", [None, 200 * ROW], ids=["kept", "slabs"])
@pytest.mark.parametrize("op", ["linear_logprobs", "linear_kl"])
def test_the_differentiable_ops_do_not_wait_either(
    op: str, workspace: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bodies on meta tensors, which would see their fakes instead."""
    module = importlib.import_module(f"fastalign.ops.{op}")
    bodies = {name: getattr(module, name)._init_fn for name in (f"{op}_op", f"{op}_backward")}
    hidden, weight, bias, ref_hidden, ref_weight, temperature = (
        torch.empty(shape, device="meta") for shape in ((N, H), (V, H), V, (N, 8), (V, 8), N)
    )
    targets = torch.empty(N, dtype=torch.int64, device="meta")
    settings: dict[str, Any] = dict(bias=bias, temperature=temperature, softcap=30.0)

    def call() -> Tensor:
        if op == "linear_kl":
            models = (hidden, weight, ref_hidden, ref_weight)
            return module.linear_kl(*models, workspace=workspace, **settings)
        settings["ignore_index"] = None
        return module.linear_logprobs(hidden, weight, targets, workspace=workspace, **settings)

    with NoWait():
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(module, f"{op}_op", bodies[f"{op}_op"])
            assert call().shape == (N,)
        monkeypatch.setattr(module, f"{op}_backward", bodies[f"{op}_backward"])
        for x in (hidden, weight, bias):
            x.requires_grad_()
        call().sum().backward()
    assert all(x.grad is not None for x in (hidden, weight, bias))


def test_groups_in_a_graph_are_not_copied_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed copy would read memory of the host that is something else's by then."""
    found = [_numbers(GROUPS, torch.device("cpu"))]
    monkeypatch.setattr(SLAB, "_captured", lambda device: True)
    with NoWait() as watched:
        found.append(_numbers(GROUPS, torch.device("cpu")))
        _numbers(GROUPS, torch.device("meta"))
    assert watched.copies == 0
    assert [x.tolist() for x in found] == [GROUPS, GROUPS]


def test_every_loss_object_is_among_the_cases() -> None:
    found = {type(case["loss"]).__name__ for case in CASES.values()}
    assert found >= set(losses.__all__) - {"ValueLoss", "effective_sample_size"}


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


GRAPHS: dict[str, tuple[Any, dict[str, Any]]] = {
    "callable": (lambda logp, entropy: -logp - 0.1 * entropy, {}),
    "object": (losses.MLE(), {}),
    "reference": (with_kl, {}),
    "groups": (
        lambda logp, entropy, cu_seqlens: cu_seqlens.diff() * (logp - entropy).sum(),
        dict(groups=[0, 100, 256]),
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GRAPHS)
def test_gpu_forward_and_backward_in_a_graph(kind: str) -> None:
    """A CUDA graph can hold no wait; replayed on new numbers it gives their loss and gradients."""
    n, width, vocab = 256, 64, 4_096
    hidden, weight = (
        torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for rows in (n, vocab)
    )
    targets = torch.randint(vocab, (n,), device="cuda")
    loss, more = GRAPHS[kind]
    if kind == "reference":
        ref_hidden = torch.randn(n, width, device="cuda", dtype=torch.bfloat16)
        more = dict(ref_hidden=ref_hidden, ref_weight=weight.detach())
    slab = n if kind == "groups" else 128
    models = 2 if kind == "reference" else 1

    def step() -> list[Tensor]:
        out = linear_loss(
            hidden,
            weight,
            targets,
            loss,
            ignore_index=None,
            workspace=slab * 2 * vocab * models,
            **more,
        )
        return [out.loss, *gradients(out.loss, hidden, weight)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.normal_()
    pinned = [torch.full((3,), 7).pin_memory() for _ in range(64)]  # takes what was left free
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
    assert all(x.tolist() == [7, 7, 7] for x in pinned)
