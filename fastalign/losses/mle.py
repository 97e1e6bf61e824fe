"""Weighted maximum likelihood."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastalign.losses.inputs import constants, wide


@dataclass(frozen=True)
class MLE:
    """Weighted maximum likelihood.

        loss = -w * logp            dloss/dlogp = -w

    Supervised fine-tuning without weights; filtering with weights 0 and 1; return-conditioned
    fine-tuning, where the reward stands in the prompt as text; reward-weighted regression with w =
    exp(reward / beta), which ``AWR`` forms itself when given the rewards as advantages.

    Inputs: ``weights`` w, optional (1 without it).
    """

    required = ()
    optional = ("weights",)

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
