"""The full ensemble: reward models with an encoder each, and one statistic over all their heads.

    scores [S, K] = the heads of the first model, then those of the second, ...

What `RewardEnsemble` saves by sharing one encoder: M models of P parameters are M P to train, to
hold and to run, where K heads on one encoder are P + K H (Coste et al., 2310.02743, against
2401.16635 and 2406.01013). Each model keeps the center and the scale of its own heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.errors import UserError
from fastalign.models.reward import EnsembleConfig, RewardEnsemble
from fastalign.ops.reduce_scores import reduce_scores


class FullEnsemble(nn.Module):
    """Several reward models as one.

    Args:
        members: the models; each may have several heads.
        statistic, coef: over all heads of all models, as in `EnsembleConfig`; None: the models'
            own, which must be the same.

    Raises:
        UserError: no statistic given, and the models were saved with different ones.
    """

    max_length: int
    """Tokens of context that all of them have."""
    shares_prompts: bool
    """Whether all of them take packs in which several sequences share a prompt."""

    def __init__(
        self,
        members: Sequence[RewardEnsemble],
        statistic: str | None = None,
        coef: float | None = None,
    ) -> None:
        super().__init__()
        saved = {(m.config.statistic, m.config.coef) for m in members}
        if len(saved) > 1 and (statistic is None or coef is None):
            told = ", ".join(f"{name} {c:g}" for name, c in sorted(saved))
            raise UserError(
                f"the reward models were saved with different statistics ({told}): "
                "give --statistic and --coef"
            )
        name, c = next(iter(saved))
        self.members = nn.ModuleList(members)
        self.shares_prompts = all(member.shares_prompts for member in members)
        self.max_length = min(member.max_length for member in members)
        self.config = EnsembleConfig(
            n_heads=sum(m.config.n_heads for m in members),
            statistic=name if statistic is None else statistic,
            coef=c if coef is None else coef,
        )

    def forward(self, packed: Any) -> Tensor:
        """fp32 scores [S, K] of the S sequences of a pack."""
        return torch.cat([member(packed) for member in self.members], 1)

    def reduce(self, scores: Tensor) -> Tensor:
        """The statistic over models and heads: [S, K] -> [S]."""
        return reduce_scores(scores, self.config.statistic, self.config.coef)
