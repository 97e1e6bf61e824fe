"""JSON as its readers know it: Python's own would write NaN and Infinity, which JSON does not have.

A number that cannot be computed (the deviation of a single value) is left out where it would be
made. One that should be finite and is not must neither end the run nor vanish: it becomes null.
"""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(content: Any, indent: int | None = None) -> str:
    """`content` as JSON, floats that are not finite as null; ValueError if one got past that."""
    return json.dumps(_nulled(content), indent=indent, allow_nan=False)


def _nulled(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _nulled(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_nulled(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
