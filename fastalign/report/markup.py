"""Pieces of HTML: escaping, figures, text of models, notes on what is missing.

Model text may hold anything: it is escaped, control characters are shown as symbols and its
writing direction is isolated from the page's.
"""

from __future__ import annotations

from html import escape
from typing import Any

from fastalign.report.compare import names_of
from fastalign.report.figure import Plot
from fastalign.report.read import POLICY_METHODS, Run, setting

MOST_CHARACTERS = 1500  # of one prompt or response
_SYMBOLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def safe(text: str) -> str:
    """Text for the page: markup escaped, control characters as their symbols."""
    return escape(text.translate(_SYMBOLS), quote=True)


def missing(words: str) -> str:
    return f'<p class="missing">{safe(words)}</p>'


def figure(plot: Plot) -> str:
    if plot.svg is None:
        return f'<p class="missing" id="plot-{plot.id}">{safe(plot.missing)}</p>'
    return f'<figure id="plot-{plot.id}">{plot.svg}<figcaption>{plot.caption}</figcaption></figure>'


def words_of(value: Any) -> str:
    """A prompt or a response, cut at MOST_CHARACTERS."""
    text = "" if value is None else str(value)
    if not text.strip():
        return '<div class="text empty">(empty)</div>'
    more = len(text) - MOST_CHARACTERS
    rest = f'<span class="empty"> … {more:,} more characters</span>' if more > 0 else ""
    return f'<div class="text" dir="auto">{safe(text[:MOST_CHARACTERS])}{rest}</div>'


def method_of(run: Run) -> str:
    """The method's name for people: "APA"; the model's, where that was recorded."""
    if named := names_of(run.evaluation)[1]:
        return named
    named = (run.evaluation or {}).get("method") or setting(run.config, "method")
    if named is None and run.name in POLICY_METHODS:
        named = run.name
    return str(named).upper() if named else "the policy"


def last_step(run: Run) -> str:
    return "—" if run.last_step is None else f"{run.last_step:,}"


def duration(seconds: float) -> str:
    """Seconds for people: "6 min 52 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
