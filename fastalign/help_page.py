"""What `fastalign COMMAND --help` shows: one line of usage, and the options in groups, from what is
the command's own to what all commands have.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from jsonargparse import DefaultHelpFormatter


class Formatter(DefaultHelpFormatter):
    """Says no default where there is none."""

    def _expand_help(self, action: argparse.Action) -> str:
        text: str = super()._expand_help(action)
        return re.sub(r"( \| null)?, default: null\)$", ")", text).removesuffix(" (default: null)")


def arrange(parser: Any, config_class: type) -> None:
    """Splits the one group of all options by the class that a configuration has each field from.

    A field that a subclass gives another default stays where it came from. The headings are the
    docstrings of the classes.
    """
    words = [action.dest.upper() for action in parser._actions if not action.option_strings]
    parser.usage = " ".join(["%(prog)s", *words, "[options]"])
    origin = {
        name: parent
        for parent in config_class.__mro__  # the eldest last, and it stays
        for name in vars(parent).get("__annotations__", {})
    }
    parents = list(dict.fromkeys(parent for parent in config_class.__mro__ if parent is not object))
    (mixed,) = [g for g in parser._action_groups if g.title == title_of(config_class)]
    place = parser._action_groups.index(mixed)
    held = mixed._group_actions
    del parser._action_groups[place]
    for parent in reversed(parents):
        group = argparse._ArgumentGroup(parser, title_of(parent))
        if parent is config_class and len(parents) > 1:
            group.title = "options of its own"
        group._group_actions = [a for a in held if origin.get(a.dest, config_class) is parent]
        if group._group_actions:
            parser._action_groups.insert(place, group)


def title_of(config_class: type) -> str:
    """The first line of its docstring, without the full stop."""
    return (config_class.__doc__ or "").strip().splitlines()[0].rstrip(".")
