"""JSONL files: every row is legal JSON and appended whole; a torn last line is dropped.

JSON has no numbers that are not finite: they are written as "NaN", "Infinity" and "-Infinity",
and `read` turns these strings back into floats.
"""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm import storage

NON_FINITE = ("NaN", "Infinity", "-Infinity")


@contextlib.contextmanager
def _path_in_errors(path: str | os.PathLike) -> Iterator[None]:
    """Raise OSError as one that names the file and the fix."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}); check the free space and the "
            f"permissions there, and run the same command again."
        ) from error


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Replace a file by `text` (UTF-8): a reader sees the old or the new file, never a mixture.

    Raises OSError, naming the file, if it cannot be written.
    """
    with _path_in_errors(path):  # a lone surrogate is not UTF-8
        storage.write_atomic(path, text.encode("utf-8", "backslashreplace"))


def finite_or_name(number: float) -> float | str:
    """The number itself if it is finite, else its name in NON_FINITE."""
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _to_json(value: Any) -> Any:
    """Convert numpy numbers, mappings and sequences to what JSON can hold."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, numbers.Integral):  # numpy's
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _to_json(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_to_json(inner) for inner in value]
    return finite_or_name(float(value))


def to_line(row: Mapping) -> str:
    """Encode a row as one line of JSON."""
    return json.dumps(_to_json(row), allow_nan=False) + "\n"


def read(path: str | os.PathLike) -> list[dict]:
    """Read the rows of a JSONL file in order; [] if the file does not exist.

    Drops a last line without its newline that is not JSON: a kill interrupted its write.
    Raises ValueError, naming the line, for any other line that is not a JSON object.
    """
    path = storage.as_path(path)
    if not path.exists():
        return []
    # Not splitlines(): it also cuts at U+2028 and other characters inside a string.
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    rows = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            row = dict(json.loads(text))
        except (ValueError, TypeError):
            if number == len(lines):
                break
            message = f"{path} line {number} is not a JSON object; remove that line."
            raise ValueError(message) from None
        rows.append({k: float(v) if v in NON_FINITE else v for k, v in row.items()})
    return rows


class AppendedFile:
    """A file opened for appending; bytes survive a kill as soon as `add` returns.

    A gs:// file is complete only after `flush` or `close`. Writes to a disk are unbuffered, so
    that bytes refused by a full disk are not written again at the close.
    All methods raise OSError, naming the file, if it cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        self._file = storage.open_append(path)

    def add(self, data: bytes) -> None:
        """Append all of the bytes."""
        with _path_in_errors(self._path):
            while data:
                data = data[self._file.write(data) :]

    def flush(self) -> None:
        """Write everything that was added, also to gs://."""
        with _path_in_errors(self._path):
            self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        with _path_in_errors(self._path):
            self._file.close()


class JsonlWriter(AppendedFile):
    """Appends rows to a JSONL file, after dropping its torn last line.

    keep: row -> whether this existing row stays in the file.
    """

    def __init__(self, path: str | os.PathLike, keep: Callable[[dict], bool] = lambda row: True):
        write_atomically(path, "".join(to_line(row) for row in read(path) if keep(row)))
        super().__init__(path)

    def add_row(self, row: Mapping) -> None:
        """Append a row."""
        self.add(to_line(row).encode())
