"""Advantage-weighted regression."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.losses.inputs import constants, require, wide


@dataclass(frozen=True)
class AWR:
    """Advantage-weighted regression.

        w = min(exp(advantages / beta), weight_cap)
        loss = -w * logp            dloss/dlogp = -w

    With rewards in place of advantages (no baseline; standardise them first) this is
    reward-weighted regression, see ``RWR``. Without normalisation the weights average to more than
    1; few large ones can carry the whole gradient, which ``effective_sample_size`` shows.
    ``weight_cap`` None leaves them free, up to infinity.

    Inputs: ``advantages``.

    Source: Peng et al., "Advantage-Weighted Regression", arXiv 1910.00177 (whose cap is 20, beta
    0.05).
    """

    beta: float
    weight_cap: float | None = 20.0

    required = ("advantages",)
    optional = ()

    def __post_init__(self) -> None:
        require(0.0 < self.beta < math.inf, self, "beta > 0 and finite")
        require(
            self.weight_cap is None or 0.0 < self.weight_cap < math.inf,
            self,
            "weight_cap > 0 and finite, or None",
        )

    def __call__(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        return -self._weights(logp, inputs) * wide(logp)

    def statistics(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Of every token: "weight" w; "clip_fraction", 1 where the cap holds it."""
        found = constants(self, logp, inputs, self.required)
        capped = torch.zeros_like(found["advantages"])
        if self.weight_cap is not None:
            capped = (found["advantages"] / self.beta > math.log(self.weight_cap)).to(capped.dtype)
        return {"weight": self._weights(logp, inputs), "clip_fraction": capped}

    def _weights(self, logp: Tensor, inputs: dict[str, Tensor | None]) -> Tensor:
        scaled = constants(self, logp, inputs, self.required)["advantages"] / self.beta
        if self.weight_cap is not None:
            scaled = scaled.clamp(max=math.log(self.weight_cap))
        return torch.exp(scaled)


def effective_sample_size(weights: Tensor, *, logs: bool = False) -> Tensor:
    """(sum w)^2 / sum w^2, 0-d: how many equal weights would have this variance; 0 for no weights.

    Args:
        weights: any shape, not negative. Infinite ones count as equal, finite ones beside them as
            0.
        logs: ``weights`` are log w: no w is too large then.

    Source: Kish, "Survey Sampling", 1965.
    """
    w = wide(weights.detach())
    if w.numel() == 0:
        return w.new_zeros(())
    # Relative to the largest: squares of large weights would overflow.
    most = w.max()
    if logs:
        w = torch.exp(w - torch.where(most > -math.inf, most, 0.0))
    else:
        w = torch.where(most == math.inf, w == most, w / torch.where(most > 0.0, most, 1.0))
    squares = w.square().sum()
    return torch.where(squares == 0.0, 0.0, w.sum().square() / squares)
