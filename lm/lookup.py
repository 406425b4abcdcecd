"""One lookup for every table of choices: its error lists them and names the nearest."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def nearest(name: str, names) -> str:
    """A hint "; did you mean 'x'?" for the name most like `name`, or "" where none is alike."""
    close = difflib.get_close_matches(str(name), [str(known) for known in names], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """table[name], or an error that lists the choices.

    what: the key of the config, as the user writes it.
    Raises ValueError naming the value, the choices and the nearest one.
    """
    if name not in table:
        choices = ", ".join(sorted(table))
        hint = nearest(name, table)
        raise ValueError(f"{what}={name!r} is unknown; choose one of {choices}{hint or '.'}")
    return table[name]
