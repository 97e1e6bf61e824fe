"""The one root finder: an increasing function of one positive number."""

from __future__ import annotations

import math
from collections.abc import Callable

# Newton's steps shrink to their squares, down to rounding, where they stop shrinking.
SMALL_STEP = 1e-13
ROUNDING_STEP = 1e-8
MOST_STEPS = 200


def solve_increasing(
    f: Callable[[float], tuple[float, float]], target: float, start: float = 1.0
) -> float:
    """x > 0 with f(x) = target, by Newton's method inside a bracket.

    Args:
        f: x -> (value, slope), increasing, with f(0) < target.
        start: where to look first; any positive number will do.

    Returns:
        x; inf where f stays under ``target`` for all floats.
    """
    low, high = 0.0, start
    value, slope = f(high)
    while value < target:
        low, high = high, 2.0 * high
        if math.isinf(high):
            return math.inf
        value, slope = f(high)
    x, last = high, math.inf
    for _ in range(MOST_STEPS):
        if value < target:
            low = x
        else:
            high = x
        new = x - (value - target) / slope if slope > 0 else math.nan
        if not low <= new <= high:  # also when it is NaN
            new = 0.5 * (low + high)
        step = abs(new - x)
        if step <= SMALL_STEP * x or last / 4 <= step <= ROUNDING_STEP * x:
            return new
        x, last = new, step
        value, slope = f(x)
    return x
