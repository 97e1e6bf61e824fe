"""Weighted maximum likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastalign.losses.inputs import constants, wide


@dataclass(frozen=True)
class MLE:
    """Weighted maximum likelihood.

        loss = -w * logp            dloss/dlogp = -w

    Supervised fine-tuning without weights; filtering with weights 0 and 1; return-conditioned
    fine-tuning, where the reward stands in the prompt as text; reward-weighted regression, see
    ``RWR``, which makes the weights.

    Inputs: ``weights`` w, optional (1 without it).
    """

    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("weights",)

    def __call__(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        found = constants(self, logp, inputs, self.required, self.optional)
        return -found["weights"] * wide(logp) if "weights" in found else -wide(logp)

    def statistics(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Of every token: "weight" w, where weights are given."""
        found = constants(self, logp, inputs, self.required, self.optional)
        return {"weight": found["weights"]} if "weights" in found else {}
