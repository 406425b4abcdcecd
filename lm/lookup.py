"""Checks of config values: a table of choices, a section as a dataclass, bounds of numbers."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return the hint "; did you mean 'x'?" for the most similar choice, "" if none is similar."""
    close = difflib.get_close_matches(str(name), map(str, choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def lookup(table: Mapping[str, T], name: str, key: str) -> T:
    """Return table[name].

    key: the config key or flag with this value, for the error.
    Raises ValueError naming the value, the choices and the nearest one.
    """
    if name not in table:
        choices = ", ".join(sorted(table))
        hint = nearest(name, table) or "."
        raise ValueError(f"{key}={name!r} is unknown; choose one of {choices}{hint}")
    return table[name]


def as_section(section: type[T], value: T | Mapping, path: str) -> T:
    """Return a mapping as the dataclass `section`, and an instance of it unchanged.

    path: the dotted key of the section. Raises ValueError for an unknown key, and if value is
    neither a mapping nor an instance.
    """
    if isinstance(value, section):
        return value
    fields = {field.name: field for field in dataclasses.fields(section)}
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}={value!r} is a whole section; set one of {', '.join(fields)}.")
    for key in value:
        lookup(fields, key, f"the key of {path}")
    return section(**value)


def check_bounds(section: Any, path: str, bounds: Mapping[str, tuple[float, float | None]]) -> None:
    """Raise ValueError if a field of a section is out of bounds.

    path: the dotted key of the section. bounds: {field: (least, greatest)}, both inclusive, the
    greatest None for no upper bound.
    """
    for field, (least, greatest) in bounds.items():
        value, key = getattr(section, field), f"{path}.{field}".lstrip(".")
        if greatest is None and not value >= least:  # so that NaN is refused
            raise ValueError(f"{key}={value} is too small; use {least} or more.")
        if greatest is not None and not least <= value <= greatest:
            raise ValueError(f"{key}={value} is out of bounds; use {least} to {greatest:g}.")
