"""Where a command's records come from: the built-in task by name, or the user's data by path or id.

`synthetic` (or `synthetic:SEED`) is the built-in task; everything else goes to the readers of
`formats`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from fastalign.data import formats
from fastalign.data.formats import Completion, DataError, LoadReport, Preference, Prompt
from fastalign.data.synthetic import PROMPTS, SyntheticTask, gold_reward

log = logging.getLogger("fastalign")

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


def held_out(
    data: str, eval_data: str | None, eval_split: str | None, eval_lines: str | None
) -> str | None:
    """Where held-out records come from: a source of their own, or a part of `data`, or nowhere."""
    if eval_data is not None:
        return eval_data
    is_part = eval_split is not None or eval_lines is not None or synthetic_task(data) is not None
    return data if is_part else None


def warn_of_overlap(train: Sequence[Any], held: Sequence[Any]) -> None:
    """Logs how many held-out records are trained on as well."""
    seen = {(record.source, str(record.prompt)) for record in train}
    both = sum((record.source, str(record.prompt)) in seen for record in held)
    if both:
        log.warning("%s of %s held-out records are training records too", both, len(held))


def completions(
    source: str,
    split: str | None,
    lines: str | None,
    limit: int | None,
    held_out: bool = False,
) -> tuple[list[Completion], LoadReport]:
    """Records to imitate.

    Args:
        source: `synthetic`, or what `formats.read_completions` takes.
        split, lines, limit: of the records; `lines` is not for the built-in task, whose split is
            by default test for `held_out` records and train for others.

    Raises:
        DataError: see `formats`; and what the built-in task does not have.
    """
    task = synthetic_task(source)
    if task is None:
        return formats.read_completions(source, split=split, lines=lines, limit=limit)
    part, count = _synthetic_part(source, split, lines, limit, held_out)
    found = task.completions(count, part)
    return found, LoadReport(source, len(found), {}, {}, {})


def rewarded(
    source: str,
    split: str | None,
    lines: str | None,
    limit: int | None,
    held_out: bool = False,
) -> tuple[list[Completion], LoadReport]:
    """Responses with the rewards that are in the data; arguments and errors as for `completions`.

    Raises:
        DataError: also, a record without one; the built-in task's have none.
    """
    if synthetic_task(source) is not None:
        raise DataError(
            f"{source}: its responses have no rewards: label them with --reward FOLDER (a reward "
            "ensemble), or with --reward gold"
        )
    return formats.read_completions(
        source, split=split, lines=lines, limit=limit, require_reward=True
    )


def responses(
    source: str,
    split: str | None,
    lines: str | None,
    limit: int | None,
    held_out: bool = False,
) -> tuple[list[Completion], LoadReport]:
    """Responses to be scored: of completion data theirs, of preference data (and of the built-in
    task) both of each pair. Arguments, of records or pairs, and errors as for `completions`."""
    task = synthetic_task(source)
    if task is None:
        return formats.read_completions(
            source, split=split, lines=lines, limit=limit, rejected=True
        )
    pairs, report = preferences(source, split, lines, limit, held_out)
    found = [
        Completion(pair.prompt, response, None, pair.source)
        for pair in pairs
        for response in (pair.chosen, pair.rejected)
    ]
    report.kept = len(found)
    return found, report


def preferences(
    source: str,
    split: str | None,
    lines: str | None,
    limit: int | None,
    held_out: bool = False,
) -> tuple[list[Preference], LoadReport]:
    """Pairs to learn a reward from; arguments and errors as for `completions`."""
    task = synthetic_task(source)
    if task is None:
        return formats.read_preferences(source, split=split, lines=lines, limit=limit)
    part, count = _synthetic_part(source, split, lines, limit, held_out)
    found = task.preferences(count, part)
    return found, LoadReport(source, len(found), {}, {}, {})


def prompts(
    source: str,
    split: str | None,
    lines: str | None,
    limit: int | None,
    held_out: bool = False,
) -> tuple[list[Prompt], LoadReport]:
    """Prompts to answer; arguments and errors as for `completions`."""
    task = synthetic_task(source)
    if task is None:
        return formats.read_prompts(source, split=split, lines=lines, limit=limit)
    part, count = _synthetic_part(source, split, lines, limit, held_out)
    if count > len(PROMPTS[part]):
        raise DataError(f"{source}: has {len(PROMPTS[part]):,} {part} prompts, got limit {count:,}")
    found = task.prompts(count, part)
    return found, LoadReport(source, len(found), {}, {}, {})


def _synthetic_part(
    source: str, split: str | None, lines: str | None, limit: int | None, held_out: bool
) -> tuple[str, int]:
    """Split and number of records of the built-in task."""
    part = split or ("test" if held_out else "train")
    if part not in PROMPTS:
        raise DataError(f"{source}: no split {split!r}; it has train and test")
    if lines is not None:
        raise DataError(f"{source}: lines {lines!r} is for files; choose with split and limit")
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit must be at least 1, got {limit}")
    return part, limit or DEFAULT_COUNT
