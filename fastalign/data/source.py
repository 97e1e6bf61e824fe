"""Where a command's records come from: the built-in task by name, or the user's data by path or id.

`synthetic` (or `synthetic:SEED`) is the built-in task; everything else goes to the readers of
`formats`.
"""

from __future__ import annotations

from collections.abc import Callable

from fastalign.data import formats
from fastalign.data.formats import Completion, DataError, LoadReport, Preference, Prompt
from fastalign.data.synthetic import SyntheticTask, gold_reward

DEFAULT_COUNT = 4000


def synthetic_task(source: str) -> SyntheticTask | None:
    """The built-in task that `source` names, or None.

    Raises:
        DataError: `synthetic:` followed by something that is not a seed.
    """
    name, _, seed = source.partition(":")
    if name != "synthetic":
        return None
    if seed and not seed.isdigit():
        raise DataError(f"{source!r}: expected synthetic or synthetic:SEED with a whole number")
    return SyntheticTask(seed=int(seed or 0))


def gold_for(source: str) -> Callable[[str, str], float] | None:
    """The gold reward of a source, where there is one: (prompt, response) -> reward."""
    return gold_reward if synthetic_task(source) is not None else None


def completions(
    source: str, split: str, lines: str | None, limit: int | None
) -> tuple[list[Completion], LoadReport]:
    """Records to imitate."""
    task = synthetic_task(source)
    if task is None:
        return formats.read_completions(source, lines=lines, limit=limit)
    found = task.completions(limit or DEFAULT_COUNT, split)
    return found, LoadReport(source, len(found), {}, {}, {})


def preferences(
    source: str, split: str, lines: str | None, limit: int | None
) -> tuple[list[Preference], LoadReport]:
    """Pairs to learn a reward from."""
    task = synthetic_task(source)
    if task is None:
        return formats.read_preferences(source, lines=lines, limit=limit)
    found = task.preferences(limit or DEFAULT_COUNT, split)
    return found, LoadReport(source, len(found), {}, {}, {})


def prompts(
    source: str, split: str, lines: str | None, limit: int | None
) -> tuple[list[Prompt], LoadReport]:
    """Prompts to answer."""
    task = synthetic_task(source)
    if task is None:
        return formats.read_prompts(source, lines=lines, limit=limit)
    found = task.prompts(limit or DEFAULT_COUNT, split)
    return found, LoadReport(source, len(found), {}, {}, {})
