"""linear_loss with groups: losses that couple tokens, in whole groups and in two stages.

The groups are of 6, 0, 15, 4 and 12 tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import (
    GROUPS,
    N,
    gradients,
    make,
    pair_loss,
    products,
    rows,
    segment_sum,
)
from torch import Tensor

from fastalign.ops.linear_logprobs import linear_logprobs
from fastalign.ops.linear_loss import linear_loss
from fastalign.testing import assert_no_worse


@pytest.mark.parametrize("slab", [None, 16, 7], ids=["1 slab", "whole groups", "two stages"])
def test_groups_against_autograd(slab: int | None) -> None:
    hidden, weight, targets, _ = make(torch.float64)
    inputs = {"sign": torch.randn(N).sign().double()}
    logp = linear_logprobs(hidden, weight, targets)
    want = pair_loss(logp, logp, cu_seqlens=GROUPS, **inputs).sum() / 5
    out = linear_loss(
        hidden,
        weight,
        targets,
        pair_loss,
        inputs,
        groups=GROUPS,
        workspace=rows(slab, torch.float64),
    )
    expected = [want, *gradients(want, hidden, weight)]
    for got, true in zip([out.loss, *gradients(out.loss, hidden, weight)], expected, strict=True):
        assert_no_worse(got, true, true, torch.float64, grad=true.dim() > 0)


def test_a_group_loss_sees_whole_groups_and_their_inputs() -> None:
    hidden, weight, targets, _ = make()
    kept = (targets != -100).long()
    lengths = segment_sum(kept, GROUPS).tolist()
    seen: list[int] = []
    factors = torch.arange(1.0, 6.0)

    def record(logp: Tensor, entropy: Tensor, factor: Tensor, cu_seqlens: Tensor) -> Tensor:
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == len(logp) and len(logp) <= 16
        seen.extend(cu_seqlens.diff().tolist())
        return factor * segment_sum(logp, cu_seqlens)

    out = linear_loss(
        hidden, weight, targets, record, {"factor": factors}, groups=GROUPS, workspace=rows(16)
    )
    assert seen == lengths
    expected = (factors * segment_sum(out.logp, GROUPS)).sum() / 5
    assert_no_worse(out.loss, expected, expected.double(), torch.float32)


def test_learned_inputs_of_groups_get_their_gradient() -> None:
    hidden, weight, targets, _ = make()
    scale = torch.ones(5, requires_grad=True)

    def scaled(logp: Tensor, entropy: Tensor, scale: Tensor, cu_seqlens: Tensor) -> Tensor:
        return scale * segment_sum(logp, cu_seqlens)

    for slab in (None, 16, 7):
        out = linear_loss(
            hidden, weight, targets, scaled, {"scale": scale}, groups=GROUPS, workspace=rows(slab)
        )
        (got,) = gradients(out.loss, scale)
        want = segment_sum(out.logp, GROUPS) / 5
        assert_no_worse(got, want, want.double(), torch.float32, grad=True)


def test_two_stages_take_four_products() -> None:
    hidden, weight, targets, _ = make()
    inputs = {"sign": torch.ones(N)}
    targets = targets.clamp(min=0)
    slabs = 3

    def step() -> None:
        linear_loss(
            hidden, weight, targets, pair_loss, inputs, groups=GROUPS, workspace=rows(14)
        ).loss.backward()

    assert products(step) == 4 * slabs


def test_an_input_of_g_and_n_numbers_is_refused_where_rows_and_groups_part() -> None:
    """One row each, and one left of four: cut like the rows, one factor would go for all groups."""
    hidden, weight, targets, _ = make()
    hidden, targets, factors = hidden.detach()[:4], torch.arange(4), torch.arange(1.0, 5.0)

    def scaled(logp: Tensor, entropy: Tensor, factor: Tensor, cu_seqlens: Tensor) -> Tensor:
        return factor * (1 + segment_sum(logp, cu_seqlens))

    def run(targets: Tensor, **options: Any) -> tuple[float, Tensor]:
        inputs = {"factor": factors}
        out = linear_loss(hidden, weight, targets, scaled, inputs, groups=range(5), **options)
        return out.loss.item(), out.logp

    loss, logp = run(targets)
    assert loss == pytest.approx((factors * (1 + logp)).mean().item(), rel=1e-5)
    targets[1:] = -100
    with pytest.raises(ValueError, match="linear_loss: .*G = N = 4, got 3.*'factor'"):
        run(targets)
    loss, logp = run(targets, reduction="sequence_mean")  # leaves the empty groups out
    assert loss == pytest.approx(1 + logp[0].item(), rel=1e-5)
