"""Kernels by address: the bits of the ops, what they refuse, what has no address; Statistics."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from policies import LOSSES, batch, call, critic, run
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign as fa
from fastalign import _C
from fastalign.losses import AWR, DPO, KTO, PPO, XPO
from fastalign.ops import bradley_terry_loss, kl_estimate, policy_loss, preference_loss
from fastalign.ops.direct import CODES, Statistics, dense

OFFSETS = torch.tensor([0, 7, 7, 20, 41])


class Seen(TorchDispatchMode):
    """The names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def kl(b: dict[str, Tensor]) -> Tensor:
    return kl_estimate(b["logp"], b["ref_logp"], "k3").sum()


def dpo(b: dict[str, Tensor]) -> Tensor:
    losses, statistics = preference_loss(DPO(0.3), b["logp"], OFFSETS, ref_logp=b["ref_logp"])
    return losses.sum() + statistics["rewards/margins"][0]


def kto(b: dict[str, Tensor]) -> Tensor:
    flags = torch.tensor([True, False, True, True])
    return preference_loss(
        KTO(), b["logp"], OFFSETS, ref_logp=b["ref_logp"], desirable=flags, z0=0.1
    )[0].sum()


def bradley_terry(b: dict[str, Tensor]) -> Tensor:
    chosen, rejected = b["logp"][:40].view(20, 2), b["ref_logp"][:40].view(20, 2)
    mask = b["advantages"][:40].view(20, 2) > 0
    return bradley_terry_loss(chosen, rejected, margin=b["returns"][:20], head_mask=mask)


def ppo(b: dict[str, Tensor]) -> Tensor:
    loss, statistics = critic(LOSSES["ppo all"], 0.3, mask=b["advantages"] > -1)(b)
    return loss + statistics["ref_k3"]


CALLS = {
    "kl_estimate": kl,
    "preference_loss": dpo,
    "preference_loss of KTO": kto,
    "bradley_terry_loss": bradley_terry,
    "policy_loss": ppo,
}


def found(f: Callable[[dict[str, Tensor]], Tensor], b: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    leaf = b["logp"].clone().requires_grad_()
    value = f(b | {"logp": leaf})
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("name", CALLS)
def test_the_bits_of_the_op_which_a_dispatch_mode_sees(name: str) -> None:
    b = batch(41)
    with fa.backend("cpp"):
        by_address = found(CALLS[name], b)
        with Seen() as seen:
            by_op = found(CALLS[name], b)
    assert [x for x in seen.names if x.startswith(f"fastalign_cpp.{name.split()[0]}")]
    assert torch.equal(by_address[0], by_op[0]) and torch.equal(by_address[1], by_op[1])


@pytest.mark.parametrize("name", CALLS)
def test_what_make_fx_traces_reads_its_inputs(name: str) -> None:
    """A kernel that ran while it was traced would leave what it computed there in the graph."""
    b, other = batch(41), {key: 1.5 * x for key, x in batch(41).items()}
    with fa.backend("cpp"), torch.no_grad():
        traced = make_fx(CALLS[name])(b)
        assert torch.equal(traced(other), CALLS[name](other))
        assert not torch.equal(traced(other), CALLS[name](b))


@pytest.mark.parametrize("name", CALLS)
def test_strides_and_signs_that_are_put_off(name: str) -> None:
    """The imaginary part of a conjugate is a view with its sign to be turned."""
    b = batch(41)
    lazy = {key: torch.view_as_complex(torch.stack([x, -x], 1)).conj().imag for key, x in b.items()}
    assert lazy["logp"].is_neg() and not lazy["logp"].is_contiguous()
    for one, other in zip(found(CALLS[name], b), found(CALLS[name], lazy), strict=True):
        assert torch.equal(one, other)
    sign = torch._neg_view(b["logp"])
    assert sign.is_neg() and sign.is_contiguous() and torch.equal(dense(sign), -b["logp"])
    assert not dense(sign).is_neg() and dense(b["logp"]) is b["logp"]


class Nowhere(Tensor):
    """A tensor that only stands for one, and has no memory."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Nowhere:
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        return NotImplemented


X = batch(8)["logp"]
X2, KEPT, BOUNDS = X[:, None], X < -1, torch.tensor([0, 4, 8])
PPO_INPUTS = {"old_logp": X, "advantages": X}
NOWHERE: dict[str, Callable[[], Any]] = {
    "advantages": lambda: policy_loss(PPO(), X, PPO_INPUTS | {"advantages": Nowhere(X)}),
    "mask": lambda: policy_loss(PPO(), X, PPO_INPUTS, mask=Nowhere(KEPT)),
    "entropy": lambda: policy_loss(PPO(), X, PPO_INPUTS, entropy=Nowhere(X)),
    "pairs' mask": lambda: preference_loss(DPO(), X, BOUNDS, ref_logp=X, mask=Nowhere(KEPT)),
    "pairs' flags": lambda: preference_loss(
        XPO(), X, BOUNDS, ref_logp=X, chosen_is_ref=Nowhere(KEPT[:1])
    ),
    "rejected": lambda: bradley_terry_loss(X2, Nowhere(X2)),
    "margin": lambda: bradley_terry_loss(X2, X2, margin=Nowhere(X2)),
    "head_mask": lambda: bradley_terry_loss(X2, X2, head_mask=Nowhere(X2 < 0)),
    "kl": lambda: kl_estimate(X, Nowhere(X), "k3"),
}


@pytest.mark.parametrize("name", NOWHERE)
def test_what_has_no_memory_is_left_to_torch(name: str) -> None:
    """Its address, 0, would be read, or taken for an absent argument."""
    with pytest.raises(TypeError, match="Multiple dispatch failed"):
        NOWHERE[name]()


def test_wrong_arguments_are_python_errors() -> None:
    x = torch.zeros(4)
    at, code = x.data_ptr(), CODES[torch.float32]
    with pytest.raises(TypeError, match="fastalign._C: wrong number of arguments"):
        _C.kl_estimate(0, code, at, at, 4)
    with pytest.raises(TypeError, match="fastalign._C: wrong number of arguments"):
        _C.kl_estimate(0, code, at, at, 4, at, 1)
    with pytest.raises(TypeError, match="integer"):
        _C.kl_estimate(0, code, "logp", at, 4, at)  # type: ignore[arg-type]
    for unknown in (CODES[torch.int64], 6, -1):
        with pytest.raises(RuntimeError, match="kl_estimate: expected float32, bfloat16"):
            _C.kl_estimate(0, unknown, at, at, 4, at)


def test_every_function_of_the_extension_is_declared() -> None:
    stub = importlib.resources.files("fastalign").joinpath("_C.pyi").read_text()
    declared = {line[4:].split("(")[0] for line in stub.splitlines() if line.startswith("def ")}
    assert declared == {name for name in dir(_C) if not name.startswith("_")}


def test_only_what_is_wanted_is_allocated() -> None:
    """A call on a CPU runs no op of torch's but the allocations of what it returns."""
    b = batch(41)
    inputs = {name: b[name] for name in PPO().required}
    with torch.profiler.profile() as profile:
        policy_loss(PPO(), b["logp"], inputs)
    ran = [event.name for event in profile.events() if event.name.startswith("aten::")]
    assert ran == ["aten::new_empty", "aten::empty"] * 2  # the loss and the statistics
    leaf = b["logp"].requires_grad_()
    with torch.profiler.profile() as profile:
        policy_loss(PPO(), leaf, inputs)
    ran = [event.name for event in profile.events() if event.name.startswith("aten::")]
    assert ran == ["aten::new_empty", "aten::empty"] * 3  # and the gradient


def test_statistics_are_a_mapping_of_views() -> None:
    made: list[int] = []

    def third() -> Tensor:
        made.append(1)
        return torch.tensor(7.0)

    buffer = torch.tensor([1.0, 2.0, 3.0])
    statistics = Statistics(buffer, {"a": 2, "b": 0}, {"c": third, "d": buffer[1]})
    assert list(statistics) == ["a", "b", "c", "d"] and len(statistics) == 4 and made == []
    assert {name: x.item() for name, x in statistics.items()} == {"a": 3, "b": 1, "c": 7, "d": 2}
    assert made == [1] and "a" in statistics and "e" not in statistics
    with pytest.raises(KeyError, match="'e'"):
        statistics["e"]
    assert statistics.get("e") is None
    buffer[2] = 5.0
    assert statistics["a"].item() == 5.0
    joined, other = statistics | {"e": buffer[0]}, {"e": buffer[0], "a": buffer[0]} | statistics
    assert type(joined) is type(other) is dict
    assert list(joined) == ["a", "b", "c", "d", "e"] and joined["e"].item() == 1.0
    assert list(other) == ["e", "a", "b", "c", "d"] and other["a"].item() == 5.0
    assert "'b': tensor(1.)" in repr(statistics)


def test_statistics_keep_no_gradient_and_no_inputs() -> None:
    b = batch(41)
    leaf, advantages = b["logp"].requires_grad_(), b["advantages"].requires_grad_()
    for loss in (AWR(0.5), AWR(0.5, weight_cap=None)):
        _, statistics = policy_loss(loss, leaf, {"advantages": advantages})
        assert not any(x.requires_grad for x in statistics.values())
        assert 1.0 <= statistics["effective_sample_size"].item() <= 41.0
    same = run("cpp", call(LOSSES["awr"]), b)
    assert same["effective_sample_size"].item() > 1.0


@pytest.mark.parametrize("name", CALLS)
def test_upstream_factors_and_second_derivatives(name: str) -> None:
    """The slopes of a loss are constants to autograd: a second derivative is refused."""
    b = batch(41)
    _, once = found(CALLS[name], b)
    _, thrice = found(lambda given: 3.0 * CALLS[name](given), b)
    torch.testing.assert_close(thrice, 3.0 * once)
    leaf = b["logp"].requires_grad_()
    (slope,) = torch.autograd.grad(CALLS[name](b).square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def heads(b: dict[str, Tensor]) -> Tensor:
    weight = b["ref_logp"][:10].view(2, 5)
    return fa.ops.reward_heads(b["logp"][:40].view(8, 5), weight, reduce="mean")[1].sum()


def head(b: dict[str, Tensor]) -> Tensor:
    weight, targets = b["ref_logp"][:30].view(6, 5), torch.arange(8) % 6
    return fa.ops.linear_loss(b["logp"][:40].view(8, 5), weight, targets, fa.losses.MLE(), {}).loss


@pytest.mark.parametrize("by_op", [False, True])
@pytest.mark.parametrize("name", [*CALLS, "reward_heads", "linear_loss"])
def test_a_penalty_of_the_gradient_is_refused(
    name: str, by_op: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the loss ends the graph no upstream gradient requires one, and the slopes would still
    be constants."""
    if by_op and name in CALLS:  # as tensor subclasses have it
        module = importlib.import_module(f"fastalign.ops.{name.split()[0]}")
        monkeypatch.setattr(module, "plain", lambda x: False)
    b = batch(41)
    leaf = b["logp"].requires_grad_()
    call = CALLS.get(name) or {"reward_heads": heads, "linear_loss": head}[name]
    (slope,) = torch.autograd.grad(call(b), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|no autograd formula"):
        (slope.square().sum() + leaf.sum()).backward()


def test_the_slope_of_k1_may_be_differentiated() -> None:
    """It is a constant: of the penalty nothing reaches the log-probs."""
    leaf, ref = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True), torch.ones(3).bfloat16()
    (slope,) = torch.autograd.grad(kl_estimate(leaf, ref, "k1").sum(), leaf, create_graph=True)
    (slope.square().sum() + leaf.sum()).backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [1.0, 1.0, 1.0]


def test_k1_is_contiguous_and_has_both_gradients() -> None:
    logp, ref_logp = torch.randn(2, 6, 4).requires_grad_().unbind()
    estimate = kl_estimate(logp.t(), ref_logp.t(), "k1")
    assert estimate.is_contiguous() and torch.equal(estimate, logp.t() - ref_logp.t())
    slopes = torch.autograd.grad(estimate, (logp, ref_logp), torch.full((4, 6), 2.0))
    assert torch.equal(slopes[0], torch.full((6, 4), 2.0)) and torch.equal(slopes[1], -slopes[0])
