"""Rows of JSON on disk: every row legal, appended whole, a torn last line dropped.

Numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity", which `read` turns
back into floats.
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence

from lm import storage

NAMES = ("NaN", "Infinity", "-Infinity")


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replace the file by `text` (UTF-8): a reader sees the old or the new, never a part.

    Raises OSError, naming the file, where it cannot be written.
    """
    try:
        storage.write_atomic(
            path, text.encode("utf-8", "backslashreplace")
        )  # a lone surrogate is no UTF-8
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: str | os.PathLike, error: OSError) -> OSError:
    """The same error as a sentence with the cure."""
    return OSError(
        f"{path} cannot be written ({error.strerror or error}); see to the space and the "
        f"permissions there, and run the same command again."
    )


def _legal(value):
    """The value as JSON has it; a float that is not finite by its name."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, numbers.Integral):  # numpy's
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _legal(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_legal(inner) for inner in value]
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _restored(row: dict) -> dict:
    return {key: float(value) if value in NAMES else value for key, value in row.items()}


def to_line(row: Mapping) -> str:
    """A row as one line of JSON."""
    return json.dumps(_legal(row), allow_nan=False) + "\n"


def read(path: str | os.PathLike) -> list[dict]:
    """The rows of a JSONL file, in order; [] where there is no file.

    A last line torn by a kill in mid-write is dropped.
    Raises ValueError, naming the line, for any other line that is not a JSON object.
    """
    path = storage.as_path(path)
    if not path.exists():
        return []
    # Not splitlines(): it would also cut at U+2028 and other characters inside a string.
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    rows = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            rows.append(_restored(dict(json.loads(text))))
        except (ValueError, TypeError):
            if number == len(lines):  # nothing after it, not even its newline
                break
            message = f"{path} line {number} is not a JSON object; remove that line."
            raise ValueError(message) from None
    return rows


class AppendedFile:
    """A file that grows: what is added is on disk (but for a power cut) when `add` returns.

    In a bucket it is there when `flush` or `close` returns. No buffer on a disk: what a full one
    refuses is not tried again at the close.
    Raises OSError, naming the file, where it cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        self._file = storage.open_append(path)

    def add(self, data: bytes) -> None:
        """Append all of the bytes."""
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def flush(self) -> None:
        """Have all that was added in its place, a bucket's as well."""
        try:
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Close the file; nothing is left to be written."""
        try:
            self._file.close()
        except OSError as error:
            raise _unwritable(self._path, error) from error


class JsonlWriter(AppendedFile):
    """A JSONL file that grows by rows; it is opened without the torn last line of a kill.

    kept: which of the rows that are there stay; the others are dropped.
    """

    def __init__(self, path: str | os.PathLike, kept: Callable[[dict], bool] = lambda row: True):
        write_atomically(path, "".join(to_line(row) for row in read(path) if kept(row)))
        super().__init__(path)

    def add_row(self, row: Mapping) -> None:
        """Append a row."""
        self.add(to_line(row).encode())
