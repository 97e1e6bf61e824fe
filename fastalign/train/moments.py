"""Mean and standard deviation of everything seen so far."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor

from fastalign.ops.whiten import masked_moments


class RunningMoments:
    """Running mean and unbiased standard deviation, merged batch by batch (Chan et al.)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(
        self, values: Tensor, mask: Tensor | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        """Takes in a batch of values of any shape; with a group, those of all its ranks.

        Args:
            values: floating.
            mask: same shape, bool or integer; NaN included, nothing in the other cells counts.
            group: every rank must call; afterwards all of them hold the same numbers.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        self.merge(*masked_moments("RunningMoments", values.detach(), mask, group).tolist())

    def merge(self, count: float, mean: float, squares: float) -> None:
        """Takes in ``count`` values by their mean and their sum of squared distances from it."""
        if count == 0:
            return
        both = self.count + int(count)
        step = mean - self.mean
        self.squares += squares + step**2 * self.count * count / both
        self.mean += step * count / both
        self.count = both

    @property
    def std(self) -> float:
        """0 while fewer than two values have been seen."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def normalize(
        self, values: Tensor, *, shift_mean: bool = True, clip: float | None = None
    ) -> Tensor:
        """(values - mean) / std, or values / std, between -clip and clip (PPO-max, arXiv
        2307.04964); while there is no deviation, std counts as 1."""
        centred = values - self.mean if shift_mean else values
        scaled = centred / (self.std if self.std > 1e-6 else 1.0)
        return scaled if clip is None else scaled.clamp(-clip, clip)

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]
