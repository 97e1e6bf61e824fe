"""The critic's loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.losses.inputs import require, wide


@dataclass(frozen=True)
class ValueLoss:
    """Squared error of a critic, optionally clipped to a band around its old values.

        loss = 0.5 (V - R)^2
        with clip c:  0.5 max( (V - R)^2, (clamp(V, V_old - c, V_old + c) - R)^2 )

        dloss/dV = V - R, and 0 where the second term of the max is taken outside the band

    Source: the clipped form is that of the PPO code accompanying arXiv 1707.06347.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        require(
            self.clip is None or 0.0 < self.clip < math.inf, self, "clip > 0 and finite, or None"
        )

    def __call__(self, values: Tensor, returns: Tensor, old_values: Tensor | None = None) -> Tensor:
        """Per-token loss of the shape of ``values``; the other two are constants."""
        values, returns, clipped = self._checked(values, returns, old_values)
        loss = (values - returns).square()
        if clipped is not None:
            loss = torch.maximum(loss, (clipped - returns).square())
        return 0.5 * loss

    def statistics(
        self, values: Tensor, returns: Tensor, old_values: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Of every token: "value_clip_fraction", 1 where the band holds the gradient at 0."""
        values, returns, clipped = self._checked(values.detach(), returns, old_values)
        if clipped is None:
            return {}
        held = (clipped - returns).square() > (values - returns).square()
        return {"value_clip_fraction": held.to(values.dtype)}

    def _checked(
        self, values: Tensor, returns: Tensor, old_values: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """values, returns, and values clamped to the band (None without a clip)."""
        for name, tensor in (("returns", returns), ("old_values", old_values)):
            if tensor is not None and tensor.shape != values.shape:
                raise ValueError(
                    f"ValueLoss: expected {name} of the shape of values, {tuple(values.shape)}, "
                    f"got {tuple(tensor.shape)}"
                )
        values, returns = wide(values), wide(returns.detach())
        if self.clip is None:
            return values, returns, None
        if old_values is None:
            raise ValueError("ValueLoss: missing inputs: old_values (clip is set)")
        old = wide(old_values.detach())
        clipped = torch.maximum(torch.minimum(values, old + self.clip), old - self.clip)
        return values, returns, clipped
