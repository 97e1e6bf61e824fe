"""Bounds of sequences that make no sense: losses and ops on packed tokens refuse them, where they
are called and where a compiled graph runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastalign.losses import DPO, GRPO, KTO, PPO, SimPO, ValueLoss
from fastalign.ops import policy_loss, preference_loss, token_rewards, value_loss

X = -torch.tensor([0.1, 0.5, 0.3, 1.0, 0.2, 0.7])
MASK = torch.tensor([True, True, False, True, True, True])
FLAGS = torch.tensor([True, False])
RIGHT = torch.tensor([0, 2, 6])
WRONG = ([0, 3, 5], [0, 7, 6], [1, 3, 6], [0, -1, 6], [0, 3, 2**32 + 6])
SAMPLED = {"old_logp": X - 0.1, "advantages": X + 0.4}

CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "DPO": lambda offsets: DPO()(X, ref_logp=X.square(), cu_seqlens=offsets),
    "SimPO": lambda offsets: SimPO()(X, cu_seqlens=offsets),
    "KTO": lambda offsets: KTO()(
        X, ref_logp=X.square(), cu_seqlens=offsets, desirable=FLAGS, z0=torch.tensor(0.1)
    ),
    "GRPO": lambda offsets: GRPO("gspo")(X, **SAMPLED, cu_seqlens=offsets),
    "policy_loss": lambda offsets: policy_loss(
        PPO(), X, SAMPLED, mask=MASK, cu_seqlens=offsets, reduction="sequence_mean"
    )[0],
    "policy_loss of gspo": lambda offsets: policy_loss(
        GRPO("gspo"), X, SAMPLED, cu_seqlens=offsets
    )[0],
    "value_loss": lambda offsets: value_loss(
        ValueLoss(), X, X.square(), cu_seqlens=offsets, reduction="sequence_mean"
    )[0],
    "preference_loss": lambda offsets: preference_loss(DPO(), X, offsets, ref_logp=X.square())[0],
    "token_rewards": lambda offsets: token_rewards(
        X, X.square(), X[:2], kl_coef=0.1, cu_seqlens=offsets
    )[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_bounds_are_looked_at(name: str) -> None:
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(RIGHT), CALLS[name](RIGHT))
    for call in (CALLS[name], compiled):
        for wrong in WRONG:
            with pytest.raises(ValueError, match="expected cu_seqlens to rise from 0 to N = 6"):
                call(torch.tensor(wrong))


@pytest.mark.parametrize("name", CALLS)
def test_dtypes_and_devices(name: str) -> None:
    message = r"cu_seqlens \[S \+ 1\] of int32 or int64 on cpu, got"
    for wrong in (RIGHT.float(), RIGHT.short(), RIGHT.to("meta")):
        with pytest.raises(ValueError, match=message):
            CALLS[name](wrong)
    assert torch.equal(CALLS[name](RIGHT.int()), CALLS[name](RIGHT))


def test_opcheck() -> None:
    op = torch.ops.fastalign.rising_offsets.default
    for offsets in (RIGHT, RIGHT.int()):
        torch.library.opcheck(op, ("op", offsets, 6))
        assert op("op", offsets, 6).dtype == torch.int64
