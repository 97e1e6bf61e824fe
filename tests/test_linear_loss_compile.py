"""linear_loss inside torch.compile: the same numbers, at the price of one graph break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import GROUPS, H, gradients, make, pair_loss, policy_loss, rows
from torch import Tensor

from fastalign import losses
from fastalign.ops import linear_loss

N = 37
PPO = losses.PPO(kl_coef=0.1, entropy_coef=0.01)


def with_kl(logp: Tensor, entropy: Tensor, kl: Tensor) -> Tensor:
    return kl - logp


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "callable with learned inputs": (policy_loss, dict(workspace=rows(16))),
    "object": (PPO, dict(temperature=0.8, softcap=20.0)),
    "groups": (pair_loss, dict(groups=GROUPS, workspace=rows(16))),
    "groups as a list, two stages": (pair_loss, dict(groups=[0, 10, 37], workspace=rows(16))),
    "reference": (with_kl, dict(ignore_index=None)),
}


def given(loss: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    if loss is policy_loss:
        return inputs
    if loss is PPO:
        old = inputs["old_logp"]
        return {"advantages": inputs["advantages"], "old_logp": old, "ref_logp": old - 0.1}
    return {"sign": inputs["advantages"].sign()} if loss is pair_loss else {}


@pytest.fixture(autouse=True)
def forgotten() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_one_graph_break_and_the_same_numbers(name: str) -> None:
    loss, options = CASES[name]
    hidden, weight, targets, inputs = make()
    layer = torch.randn(H, H, requires_grad=True)
    inputs, options = given(loss, inputs), dict(options)
    if name == "reference":
        targets = targets.clamp(min=0)
        options |= dict(ref_hidden=hidden.detach() + 0.1, ref_weight=weight.detach())

    def step(x: Tensor, w: Tensor) -> Tensor:
        """A model's last layer, the loss head, and what a training step does with its results."""
        out = linear_loss(torch.tanh(x @ layer), w, targets, loss, inputs, **options)
        return 2.0 * out.loss + 0.0 * out.metrics["entropy"] + out.logp.sum()

    found = torch._dynamo.explain(step)(hidden, weight)
    assert (found.graph_count, found.graph_break_count) == (2, 1)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    leaves = (
        hidden,
        weight,
        layer,
        *(x for x in inputs.values() if getattr(x, "requires_grad", 0)),
    )
    results = []
    for f in (step, compiled, compiled):
        value = f(hidden, weight)
        results.append([value, *gradients(value, *leaves)])
    for again in results[1:]:
        for got, want in zip(again, results[0], strict=True):
            assert torch.equal(got, want)


def test_another_loss_and_other_sizes_are_no_compilation_more() -> None:
    """What changes from step to step is no business of the compiled parts."""
    hidden, weight, targets, inputs = make()
    compiled = torch.compile(
        lambda h, loss, x: 2.0 * linear_loss(1.5 * h, weight, targets[: len(h)], loss, x).loss,
        backend="aot_eager",
        dynamic=True,
    )
    counts = []
    for i, n in enumerate((30, 31, 33, 36, 37)):
        x = {"advantages": inputs["advantages"][:n], "old_logp": inputs["old_logp"][:n]}
        compiled(hidden[:n], losses.PPO(clip=0.1 + 0.05 * i), x).backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[-1] == counts[1] > 0


def test_fullgraph_is_refused_with_the_reason() -> None:
    hidden, weight, targets, inputs = make()
    whole = torch.compile(
        lambda h: linear_loss(h, weight, targets, policy_loss, inputs).loss,
        fullgraph=True,
        backend="eager",
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="function `linear_loss`"):
        whole(hidden)
