"""Mean and standard deviation of everything seen so far."""

from __future__ import annotations

import math

from torch import Tensor


class RunningMoments:
    """Running mean and unbiased standard deviation, merged batch by batch (Chan et al.)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """Takes in a batch of values of any shape."""
        batch = values.detach().double().flatten()
        if batch.numel() == 0:
            return
        count, mean = batch.numel(), batch.mean().item()
        squares = (batch - mean).square().sum().item()
        both = self.count + count
        self.squares += squares + (mean - self.mean) ** 2 * self.count * count / both
        self.mean += (mean - self.mean) * count / both
        self.count = both

    @property
    def std(self) -> float:
        """0 while fewer than two values have been seen."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]
