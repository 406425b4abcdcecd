"""Files that the processes of a Beam pipeline share, on a disk or on other storage, as gs://."""

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


def join(place: str, name: str) -> str:
    """The address of what is called `name` in a folder."""
    return _files().join(place, name)


@contextlib.contextmanager
def temporary_folder(parent: str) -> Iterator[str]:
    """The address of a new folder in `parent`; it is removed at the end."""
    place = join(parent, f"lm-corpus-{uuid.uuid4().hex}")
    _files().mkdirs(place)
    try:
        yield place
    finally:
        _files().delete([place if os.path.isdir(place) else f"{place}/"])


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator:
    """A file to write bytes to; it appears at the end, since runners may do a work twice."""
    part = f"{path}.{uuid.uuid4().hex}.part"
    with _files().create(part, BINARY) as file:
        yield file
    _files().rename([part], [path])


def read_json_lines(pattern: str) -> Iterator[Any]:
    """The JSON of each line of the files whose address is like `pattern`; none where none is."""
    for found in _files().match([pattern])[0].metadata_list:
        with _files().open(found.path) as file:
            yield from map(json.loads, file)


def upload(path, address: str) -> None:
    """Copy a file of this machine to an address, where it appears whole."""
    with open(path, "rb") as file, atomic_file(address) as copy:
        shutil.copyfileobj(file, copy)


def download(address: str, path) -> None:
    """Copy what is at an address to a file of this machine."""
    with _files().open(address, BINARY) as file, open(path, "wb") as copy:
        shutil.copyfileobj(file, copy)
