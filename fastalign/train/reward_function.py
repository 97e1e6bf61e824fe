"""Rewards that are Python functions in a file: loading them, calling them, what they may give.

A function takes all responses at once, as texts without special tokens, and gives a number each:

    def brevity(prompts: list[str], responses: list[str]) -> list[float]:
        return [-len(response) / 100 for response in responses]

A tuple, a 1-d NumPy array or a 1-d tensor will do as well; bools count as 0 and 1. The file is run
once, by its path: it does not become importable under its own name, and what it imports must be
importable from anywhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from fastalign.train.run import RunError, Stopped

Function = Callable[[list[str], list[str]], Any]


def load_function(path: str, name: str, option: str = "--reward") -> Function:
    """A function in a Python file.

    Raises:
        RunError: no such file, it fails while it is read, or has no such function.
    """
    try:
        module = _module(Path(path))
    except OSError as error:
        raise RunError(f"{option} {path}:{name}: {path}: {error.strerror}") from error
    except Exception as error:
        raise RunError(f"{option} {path}:{name}: {path} fails: {_told(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        here = [n for n, f in vars(module).items() if callable(f) and not n.startswith("_")]
        raise RunError(
            f"{option} {path}:{name}: {path} has no function {name}; it has "
            f"{', '.join(here) or 'none'}"
        )
    return function


def _module(path: Path) -> ModuleType:
    """The file, run; known to `sys.modules` (dataclasses look there) by a name of its contents."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = importlib.util.spec_from_file_location(f"_fastalign_reward_{digest[:16]}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def call(
    function: Function, who: str, path: str, prompts: list[str], responses: list[str]
) -> list[float]:
    """What a reward function says of S responses, as S numbers, NaN and infinity among them.

    Raises:
        Stopped: it raised (that exception is the cause), or gave anything else.
    """
    n = len(responses)
    try:
        came = function(list(prompts), list(responses))
    except Exception as error:
        raise Stopped(f"{who} raised {_told(error, path)}") from error
    if isinstance(came, Tensor):
        came = came.detach().cpu().tolist()  # of a 0-d tensor a number
    elif hasattr(came, "__array__"):
        came = came.tolist()
    if isinstance(came, str | bytes) or not isinstance(came, Sequence):
        raise Stopped(f"{who} returned {_kind(came)}; expected a list of {n} numbers")
    if len(came) != n:
        raise Stopped(f"{who} returned {len(came)} numbers for {n} responses")
    found = []
    for i, value in enumerate(came):
        one = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if not isinstance(one, numbers.Real):
            raise Stopped(
                f"{who} returned {_kind(value)} for response {i + 1} of {n}, "
                f"{short(responses[i])}; expected a number"
            )
        found.append(float(one))
    return found


def _kind(value: Any) -> str:
    """None, or `a str ('high')`."""
    return "None" if value is None else f"a {type(value).__name__} ({short(value)})"


def short(value: Any) -> str:
    """The beginning of what it looks like, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _told(error: Exception, path: str) -> str:
    """An exception in one line: its type, the line of the file, its message."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).absolute() == Path(path).absolute()
    ]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    place = f" in line {lines[-1]}" if lines and lines[-1] else ""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}{place}{f': {message}' if message else ''}"
