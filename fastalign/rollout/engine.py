"""What every rollout engine takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fastalign.errors import UserError


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn."""

    max_new_tokens: int = 48
    """A response that has not ended by then is cut there and counted as unfinished."""
    temperature: float = 1.0
    """1.0 samples from the policy itself, which the estimators of policy training assume."""
    batch_size: int = 256
    """Responses generated side by side."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"sampling: expected max_new_tokens >= 1, got {self.max_new_tokens}")
        if not self.temperature > 0:
            raise UserError(f"sampling: expected temperature > 0, got {self.temperature}")
        if self.batch_size < 1:
            raise UserError(f"sampling: expected batch_size >= 1, got {self.batch_size}")


@dataclass(frozen=True)
class Rollout:
    """One response. `completion` holds the end-of-sequence token when the response ended."""

    prompt_index: int
    prompt: list[int]
    completion: list[int]
    logp: list[float]
    """Log-prob of each completion token under the distribution it was drawn from, nats."""
    finished: bool


class Engine(Protocol):
    """Anything that samples from a policy: what a `Collector` needs of it."""

    def sync(self) -> None:
        """Takes over the weights that the trainer has now. All processes call it."""
        ...

    def generate(
        self, prompts: list[list[int]], n_samples: int, sampling: SamplingConfig
    ) -> list[Rollout]:
        """`n_samples` responses to each prompt, side by side, in the order of the prompts."""
        ...
