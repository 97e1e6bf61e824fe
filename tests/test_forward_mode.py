"""Forward-mode derivatives: every op with a backward formula refuses them, none takes them for 0.
And torch.func.vmap, which calls the ops one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastalign import losses, ops

X, OTHER = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()
HEAD = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 3, 0, 1])
PPO_INPUTS = {"old_logp": OTHER, "advantages": OTHER}
BOUNDS = torch.tensor([0, 10, 20, 30, 48])
Call = Callable[[Tensor], Tensor]

CALLS: dict[str, Call] = {
    "token_logprobs": lambda x: ops.token_logprobs(x, TARGETS),
    "token_kl": lambda x: ops.token_kl(x, OTHER),
    "linear_logprobs": lambda x: ops.linear_logprobs(x, HEAD, TARGETS),
    "linear_kl": lambda x: ops.linear_kl(x, HEAD, OTHER, HEAD),
    "linear_loss": lambda x: ops.linear_loss(x, HEAD, TARGETS, losses.MLE(), {}).loss,
    "kl_estimate": lambda x: ops.kl_estimate(OTHER, x, "k3"),
    "policy_loss": lambda x: ops.policy_loss(losses.PPO(0.2), x, PPO_INPUTS)[0],
    "actor_critic_loss": lambda x: ops.actor_critic_loss(
        losses.PPO(0.2), OTHER, PPO_INPUTS, x, OTHER
    )[0],
    "value_loss": lambda x: ops.value_loss(losses.ValueLoss(), x, OTHER)[0],
    "preference_loss": lambda x: ops.preference_loss(
        losses.DPO(), x.flatten(), BOUNDS, ref_logp=OTHER.flatten()
    )[0],
    "bradley_terry_loss": lambda x: ops.bradley_terry_loss(OTHER, x),
    "reward_heads": lambda x: ops.reward_heads(x, HEAD),
    "reduce_scores": lambda x: ops.reduce_scores(x, "min"),
    "whiten": lambda x: ops.whiten(x),
}
WEIGHTS: dict[str, Call] = {
    "linear_logprobs": lambda w: ops.linear_logprobs(X, w, TARGETS),
    "linear_kl": lambda w: ops.linear_kl(X, w, OTHER, HEAD),
    "linear_loss": lambda w: ops.linear_loss(X, w, TARGETS, losses.MLE(), {}).loss,
    "reward_heads": lambda w: ops.reward_heads(X, w),
}


def refused(op: str) -> pytest.RaisesExc[NotImplementedError]:
    return pytest.raises(NotImplementedError, match=f"^{op}: expected tensors without tangents")


@pytest.mark.parametrize("op", CALLS)
def test_a_tangent_is_refused(op: str) -> None:
    with refused(op):
        torch.func.jvp(CALLS[op], (X,), (OTHER,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, OTHER)
        with refused(op):
            CALLS[op](dual)
        with torch.no_grad(), refused(op):
            CALLS[op](dual)
        assert torch.equal(CALLS[op](X), CALLS[op](X.clone()))  # others are welcome there


@pytest.mark.parametrize("op", WEIGHTS)
def test_a_tangent_of_the_weight_is_refused(op: str) -> None:
    with refused(op):
        torch.func.jvp(WEIGHTS[op], (HEAD,), (HEAD,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", sorted(CALLS.keys() - {"linear_kl", "linear_loss"}))
def test_vmap_is_a_loop(op: str) -> None:
    both = torch.stack([X, OTHER])
    found = torch.func.vmap(CALLS[op])(both)
    assert torch.equal(found, torch.stack([CALLS[op](x) for x in both]))
