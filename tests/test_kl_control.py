"""KL controllers: worked by hand, in a closed loop, through a checkpoint."""

from __future__ import annotations

import pytest

from fastalign.train.kl_control import make_controller
from fastalign.train.run import RunError


@pytest.mark.parametrize(
    ("kl", "n", "expected"),
    [
        (6.6, 256, 0.05 * (1 + 0.1 * 256 / 1000)),  # a tenth above the target
        (5.7, 256, 0.05 * (1 - 0.05 * 256 / 1000)),
        (6.0, 256, 0.05),
        (60.0, 256, 0.05 * (1 + 0.2 * 256 / 1000)),  # clipped at a fifth
        (-1.0, 256, 0.05 * (1 - 0.2 * 256 / 1000)),
        (60.0, 5000, 0.06),  # more than the horizon counts as the horizon
        (0.0, 50000, 0.04),
    ],
)
def test_one_step_of_the_adaptive_controller(kl: float, n: int, expected: float) -> None:
    controller = make_controller("adaptive", 0.05, target=6.0, horizon=1000)
    controller.update(kl, n)
    assert controller.coef == pytest.approx(expected, rel=1e-12)


def test_steps_multiply() -> None:
    controller = make_controller("adaptive", 0.05, target=6.0)  # horizon 10,000
    for kl in (12.0, 12.0, 6.3):
        controller.update(kl, 1000)
    assert controller.coef == pytest.approx(0.05 * 1.02 * 1.02 * 1.005, rel=1e-12)


def test_it_brings_a_policy_to_the_target() -> None:
    """A policy whose KL is 0.6 / coef, as that of a tilt nearly is: the target 6 is at 0.1."""
    controller = make_controller("adaptive", 0.01, target=6.0, horizon=500)
    for _ in range(400):
        controller.update(0.6 / controller.coef, 100)
    assert controller.coef == pytest.approx(0.1, rel=1e-6)


def test_the_fixed_one_stays_what_it_is() -> None:
    for coef in (0.0, 0.05):
        controller = make_controller("fixed", coef, target=None, horizon=10)
        controller.update(100.0, 1000)
        assert controller.coef == coef


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_a_checkpoint_holds_the_coefficient(kind: str) -> None:
    first, second = (make_controller(kind, 0.05, target=6.0, horizon=1000) for _ in range(2))
    for kl in (9.0, 3.0, 6.1):
        first.update(kl, 64)
    second.load_state_dict(first.state_dict())
    assert second.coef == first.coef
    for controller in (first, second):
        controller.update(6.5, 64)
    assert second.coef == first.coef


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 0.1), "unknown KL control 'linear': expected one of fixed, adaptive"),
        (("fixed", -0.1), "expected a finite coefficient >= 0, got -0.1"),
        (("fixed", float("nan")), "expected a finite coefficient >= 0, got nan"),
        (("adaptive", 0.1), "target > 0 and horizon >= 1, got 0.1, None and 10000"),
        (("adaptive", 0.0, 6.0), "got 0.0, 6.0 and 10000"),
        (("adaptive", 0.1, 0.0), "got 0.1, 0.0 and 10000"),
        (("adaptive", 0.1, 6.0, 0), "got 0.1, 6.0 and 0"),
    ],
)
def test_what_cannot_steer_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(RunError) as caught:
        make_controller(*arguments)
    assert message in str(caught.value)


def test_a_kl_that_is_no_number_does_not_reach_the_coefficient() -> None:
    controller = make_controller("adaptive", 0.05, target=6.0)
    with pytest.raises(ValueError, match="expected a finite KL, got nan"):
        controller.update(float("nan"), 10)
    assert controller.coef == 0.05
