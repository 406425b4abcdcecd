"""JSONL files: each row is valid JSON and appended completely; a torn last line is dropped.

JSON has no non-finite numbers: they are written as the strings "NaN", "Infinity" and "-Infinity",
which `read` converts back to floats.
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
    """Replace the contents of a file by `text` (UTF-8), as storage.write_atomic does.

    Raises OSError, naming the file, if it cannot be written.
    """
    with _path_in_errors(path):  # a lone surrogate is not UTF-8
        storage.write_atomic(path, text.encode("utf-8", "backslashreplace"))


def _to_json(value: Any) -> Any:
    """Convert numpy numbers, mappings and sequences to JSON values."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, numbers.Integral):  # numpy's
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _to_json(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_to_json(inner) for inner in value]
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _to_line(row: Mapping) -> str:
    return json.dumps(_to_json(row), allow_nan=False) + "\n"


def read(path: str | os.PathLike) -> list[dict]:
    """Read the rows of a JSONL file in order; [] if the file does not exist.

    Drops a last line that has no newline and is not JSON: a kill interrupted its write.
    Raises ValueError, naming the line, for any other line that is not a JSON object.
    """
    path = storage.as_path(path)
    if not path.exists():
        return []
    # Not splitlines(): it also splits at U+2028 and other characters inside a string.
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

    A gs:// file is complete only after `flush` or `close`. Writes to a disk are unbuffered: bytes
    refused by a full disk are not written again by `close`.
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
        """Upload the bytes that a gs:// file has buffered."""
        with _path_in_errors(self._path):
            self._file.flush()

    def close(self) -> None:
        """Flush and close the file."""
        with _path_in_errors(self._path):
            self._file.close()


class JsonlWriter(AppendedFile):
    """Appends rows to a JSONL file, after dropping its torn last line.

    keep: row -> whether to keep this existing row.
    """

    def __init__(self, path: str | os.PathLike, keep: Callable[[dict], bool] = lambda row: True):
        write_atomically(path, "".join(_to_line(row) for row in read(path) if keep(row)))
        super().__init__(path)

    def add_row(self, row: Mapping) -> None:
        """Append a row."""
        self.add(_to_line(row).encode())
