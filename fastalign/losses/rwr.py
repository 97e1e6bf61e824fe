"""Reward-weighted regression."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.losses.inputs import require, wide
from fastalign.losses.mle import MLE


@dataclass(frozen=True)
class RWR(MLE):
    """Reward-weighted regression: maximum likelihood, each response weighted by its reward.

        z = (reward - mean) / std                     over all responses, std with n - 1
        w = min(exp(z / beta), weight_cap) / mean of that over all responses
        loss = -w * logp            dloss/dlogp = -w

    ``weights`` makes w of the rewards of a whole data set, or of a batch; they are then an input of
    the loss, a response's weight at each of its tokens. Their mean is 1, so that the learning rate
    of plain maximum likelihood fits. A small beta leaves few responses that count, which
    ``effective_sample_size`` of the weights shows: report it.

    Inputs: ``weights`` w.

    Source: Peters and Schaal, "Reinforcement learning by reward-weighted regression", ICML 2007;
    for language models Hu et al., arXiv 2308.12050.
    """

    beta: float
    weight_cap: float | None = 20.0

    required = ("weights",)
    optional = ()

    def __post_init__(self) -> None:
        require(0.0 < self.beta < math.inf, self, "beta > 0 and finite")
        require(
            self.weight_cap is None or 0.0 < self.weight_cap < math.inf,
            self,
            "weight_cap > 0 and finite, or None",
        )

    def weights(
        self, rewards: Tensor, *, mean: float | None = None, std: float | None = None
    ) -> Tensor:
        """w of each response.

        Args:
            rewards: [S], one per response, any float dtype.
            mean, std: of the rewards that z is relative to, for instance of the data set that a
                batch is from; None: of ``rewards``. Rewards that are all equal have z = 0.

        Returns:
            [S] float32 (float64 for float64), mean 1.

        Raises:
            ValueError: rewards that are not [S] of a floating dtype; std <= 0.
        """
        if rewards.dim() != 1 or not rewards.is_floating_point():
            raise ValueError(
                f"RWR: expected rewards [S] of a floating dtype, got {tuple(rewards.shape)}, "
                f"{rewards.dtype}"
            )
        if std is not None and not std > 0.0:
            raise ValueError(f"RWR: expected std > 0, got {std}")
        r = wide(rewards.detach()).double()
        if r.numel() == 0:
            return wide(rewards.detach()).clone()
        centred = r - (r.mean() if mean is None else mean)
        if std is None:
            spread = (r - r.mean()).square().sum().div(max(len(r) - 1, 1)).sqrt()
            z = torch.where(spread > 0.0, centred / spread, 0.0)
        else:
            z = centred / std
        logs = z / self.beta
        if self.weight_cap is not None:
            logs = logs.clamp(max=math.log(self.weight_cap))
        w = torch.exp(logs - logs.max())  # the largest is 1: no reward is too large
        return (w / w.mean()).to(wide(rewards).dtype)
