"""What the preference losses compute: one formula with coefficients, in plain PyTorch.

The responses of a batch are packed one behind another and cut by ``cu_seqlens`` [S + 1], the same
offsets that attention takes. A loss on pairs takes two sequences in a row, S = 2P of them: chosen,
rejected, chosen, rejected, ...; it returns one value per pair, [P]. KTO returns one per sequence,
[S]. ``linear_loss`` takes these offsets as its ``groups``.

Of a response y, over its tokens t:

    D(y) = sum_t (logp_t - ref_logp_t)      L(y) = sum_t logp_t      |y| tokens
    with ``average``: means over t in place of the sums
    r(y) = gap D + extra L + length |y|                              the implicit reward
    h    = r(chosen) - r(rejected) - margin

    sigmoid  v = right softplus(-h) + wrong softplus(h)              softplus(-h) = -log sigmoid(h)
    hinge    v = max(0, 1 - h)
    square   v = right (h - 1/2)^2
    kto      v = right sigmoid(-x) for a desirable y, wrong sigmoid(x) for another;  x = r - gap z0

    v = v - nll_sum L(chosen) - nll_mean L(chosen) / |chosen| + optimism L(the reference's response)

Every loss object of fastalign/losses/preference.py is a choice of these coefficients, so that one
kernel, that of ``fastalign.ops.preference_loss``, computes them all. A pair (for KTO: a sequence)
without any token costs 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PREFERENCE_KINDS = ("sigmoid", "hinge", "square", "kto")
PAIR_STATISTICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
KTO_STATISTICS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")


class PreferenceForm(NamedTuple):
    """One loss: an index into PREFERENCE_KINDS and the coefficients of the formula above."""

    kind: int
    average: bool = False
    gap: float = 0.0
    extra: float = 0.0
    length: float = 0.0
    margin: float = 0.0
    right: float = 1.0
    wrong: float = 0.0
    nll_sum: float = 0.0
    nll_mean: float = 0.0
    optimism: float = 0.0

    @property
    def paired(self) -> bool:
        return PREFERENCE_KINDS[self.kind] != "kto"


class Responses(NamedTuple):
    """Of every sequence, [S] each: r, L (with ``average`` both of means), L as a sum, |y|."""

    rewards: Tensor
    logps: Tensor
    sums: Tensor
    lengths: Tensor


def responses(
    form: PreferenceForm,
    logp: Tensor,
    ref_logp: Tensor | None,
    cu_seqlens: Tensor,
    mask: Tensor | None = None,
) -> Responses:
    """The sums over sequences of the formula above; without ``ref_logp``, D = L."""
    gap = logp if ref_logp is None else logp - ref_logp
    if mask is None:
        lengths = cu_seqlens.diff().to(logp.dtype)
    else:
        logp, gap = torch.where(mask, logp, 0.0), torch.where(mask, gap, 0.0)
        lengths = sequence_sum(mask.to(logp.dtype), cu_seqlens)
    sums = sequence_sum(logp, cu_seqlens)
    rewards = form.gap * (sums if ref_logp is None else sequence_sum(gap, cu_seqlens))
    if form.extra:
        rewards = rewards + form.extra * sums
    logps = sums
    if form.average:
        rewards, logps = rewards / lengths.clamp(min=1.0), sums / lengths.clamp(min=1.0)
    return Responses(rewards + form.length * lengths, logps, sums, lengths)


def preference_values(
    form: PreferenceForm, found: Responses, flags: Tensor | None, z0: Tensor | None
) -> Tensor:
    """v of every pair [P], or of every sequence [S] (KTO); differentiable by autograd.

    Args:
        flags: bool; [P]: whether the chosen response is the reference's; [S]: whether it is
            desirable.
        z0: 0-d, KTO's baseline.
    """
    kind = PREFERENCE_KINDS[form.kind]
    if kind == "kto":
        assert flags is not None and z0 is not None
        x = found.rewards - form.gap * z0.to(found.rewards.dtype)
        values = torch.where(flags, form.right * torch.sigmoid(-x), form.wrong * torch.sigmoid(x))
        return torch.where(found.lengths > 0.0, values, 0.0)
    chosen, rejected = (Responses(*(x[i::2] for x in found)) for i in (0, 1))
    h = chosen.rewards - rejected.rewards - form.margin
    if kind == "sigmoid":
        values = form.right * F.softplus(-h)
        if form.wrong:
            values = values + form.wrong * F.softplus(h)
    elif kind == "hinge":
        values = torch.relu(1.0 - h)
    else:
        values = form.right * (h - 0.5).square()
    if form.nll_sum:
        values = values - form.nll_sum * chosen.sums
    if form.nll_mean:
        values = values - form.nll_mean * chosen.sums / chosen.lengths.clamp(min=1.0)
    if form.optimism:
        assert flags is not None
        values = values + form.optimism * torch.where(flags, chosen.sums, rejected.sums)
    return torch.where(chosen.lengths + rejected.lengths > 0.0, values, 0.0)


def preference_statistics(
    form: PreferenceForm, found: Responses, flags: Tensor | None
) -> dict[str, Tensor]:
    """What people log, of every pair [P] or sequence [S]; NaN where it does not apply."""
    if not form.paired:
        assert flags is not None
        some = found.lengths > 0.0
        return {
            f"{name}/{which}": torch.where(some & kept, x, math.nan)
            for name, x in (("rewards", found.rewards), ("logps", found.logps))
            for which, kept in (("chosen", flags), ("rejected", ~flags))
        }
    chosen, rejected = (Responses(*(x[i::2] for x in found)) for i in (0, 1))
    margins = chosen.rewards - rejected.rewards
    columns = (
        chosen.rewards,
        rejected.rewards,
        margins,
        (margins > 0.0).to(margins.dtype),
        chosen.logps,
        rejected.logps,
    )
    some = chosen.lengths + rejected.lengths > 0.0
    return {
        name: torch.where(some, x, math.nan)
        for name, x in zip(PAIR_STATISTICS, columns, strict=True)
    }


def sequence_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] to [S]: the sum of each sequence's tokens, added in their order."""
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens, initial=0.0, unsafe=True)
