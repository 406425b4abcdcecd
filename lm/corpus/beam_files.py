"""Files shared by the processes of a Beam pipeline, on a disk or other storage, as gs://."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

BINARY = "application/octet-stream"


def _files():
    from apache_beam.io import filesystems

    return filesystems.FileSystems


def join(directory: str, name: str) -> str:
    """Join a directory's address and a name."""
    return _files().join(directory, name)


@contextlib.contextmanager
def temporary_folder(parent: str) -> Iterator[str]:
    """Create a directory in `parent` and remove it at the end."""
    directory = join(parent, f"lm-corpus-{uuid.uuid4().hex}")
    _files().mkdirs(directory)
    try:
        yield directory
    finally:
        _files().delete([directory if os.path.isdir(directory) else f"{directory}/"])


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator:
    """Open a temporary file that is renamed to `path` at the end: runners may repeat work."""
    temporary = f"{path}.{uuid.uuid4().hex}.part"
    with _files().create(temporary, BINARY) as file:
        yield file
    _files().rename([temporary], [path])


def read_json_lines(pattern: str) -> Iterator[Any]:
    """The JSON of each line of the files that match `pattern`."""
    for match in _files().match([pattern])[0].metadata_list:
        with _files().open(match.path) as file:
            yield from map(json.loads, file)


def upload(path: str, address: str) -> None:
    """Copy a local file to an address, atomically."""
    with open(path, "rb") as file, atomic_file(address) as copy:
        shutil.copyfileobj(file, copy)


def download(address: str, path: str | os.PathLike) -> None:
    """Copy an address to a local file."""
    with _files().open(address, BINARY) as file, open(path, "wb") as copy:
        shutil.copyfileobj(file, copy)
