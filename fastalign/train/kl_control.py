"""How strongly a policy is held to pi_init: the coefficient of the KL term, fixed or steered.

After n responses whose KL(pi || pi_init) was `kl` on average, the adaptive controller sets

    coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)

(Ziegler et al., "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593, section
2.2): up by at most a fifth per `horizon` responses while KL is above the target, down while below.
"""

from __future__ import annotations

import math

from fastalign.train.run import RunError

KINDS = ("fixed", "adaptive")
LARGEST_ERROR = 0.2


class KLController:
    """A coefficient that stays what it is."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, n: int) -> None:
        """Takes in the mean KL(pi || pi_init) of n responses, nats a response."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class AdaptiveKL(KLController):
    """A coefficient that follows the KL towards `target`.

    Args:
        coef: where it begins.
        target: KL of a response to aim at, nats.
        horizon: responses over which a relative error e moves the coefficient by the factor 1 + e.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        super().__init__(coef)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        """The formula above. More responses than the horizon count as the horizon, or a long step
        could turn the coefficient's sign.

        Raises:
            ValueError: the KL is not finite.
        """
        if not math.isfinite(kl):
            raise ValueError(f"AdaptiveKL: expected a finite KL, got {kl}")
        error = min(max(kl / self.target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
        self.coef *= 1.0 + error * min(n, self.horizon) / self.horizon


def make_controller(
    kind: str, coef: float, target: float | None = None, horizon: int = 10000
) -> KLController:
    """The controller of a configuration; `target` and `horizon` are the adaptive one's.

    Raises:
        RunError: an unknown kind, coef < 0, or an adaptive one without coef > 0, target > 0 and
            horizon >= 1.
    """
    if kind not in KINDS:
        raise RunError(f"unknown KL control {kind!r}: expected one of {', '.join(KINDS)}")
    if not 0 <= coef < math.inf:
        raise RunError(f"KL control: expected a finite coefficient >= 0, got {coef}")
    if kind == "fixed":
        return KLController(coef)
    if target is None or not 0 < target < math.inf or coef == 0 or horizon < 1:
        raise RunError(
            "adaptive KL control: expected coefficient > 0, target > 0 and horizon >= 1, "
            f"got {coef}, {target} and {horizon}"
        )
    return AdaptiveKL(coef, target, horizon)
