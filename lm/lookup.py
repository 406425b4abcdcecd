"""Checks of config values: a table of choices, a section as a dataclass, bounds of numbers."""

from __future__ import annotations

import dataclasses
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


def as_section(section: type[T], value: T | Mapping, path: str) -> T:
    """Return a mapping as the dataclass `section`; an instance of it is returned as it is.

    Args:
      section: a dataclass.
      value: its keys and values, or an instance.
      path: the dotted key of the config.

    Raises: ValueError for a value that is no mapping, and for an unknown key.
    """
    if isinstance(value, section):
        return value
    fields = {field.name: field for field in dataclasses.fields(section)}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{path}={value!r} is for a whole section; set one of its keys {', '.join(fields)}."
        )
    for key in value:
        lookup(fields, key, f"the key of {path}")
    return section(**value)


def check_bounds(section, path: str, bounds: Mapping[str, tuple[float, float | None]]) -> None:
    """Raise ValueError for a field of a section that is out of bounds.

    bounds: the least and the greatest value by field, both allowed; None: no greatest.
    """
    for field, (least, most) in bounds.items():
        value, name = getattr(section, field), f"{path}.{field}".lstrip(".")
        if most is None and not value >= least:  # NaN is not
            raise ValueError(f"{name}={value} is too small; use {least} or more.")
        if most is not None and not least <= value <= most:
            raise ValueError(f"{name}={value} is out of bounds; use {least} to {most:g}.")
