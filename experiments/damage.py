"""Damage a checkpoint: flip a bit of a file, or truncate, zero, empty or delete it.

The tests and the drill call damage(step folder, generator), which applies and returns one fault.
"""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

ITEMS = "params|opt_state|average"
KINDS = {  # kind of file -> regular expression of its path in a step's folder
    "step mark": r"commit_success\.txt",
    "step metadata": r"_CHECKPOINT_METADATA",
    "facts": r"facts/metadata",
    "facts mark": r"facts/commit_success\.txt",
    "item mark": rf"({ITEMS})/commit_success\.txt",
    "item metadata": rf"({ITEMS})/_METADATA",
    "sharding": rf"({ITEMS})/_sharding",
    "array metadata": rf"({ITEMS})/array_metadatas/process_\d+",
    "manifest": rf"({ITEMS})/manifest\.ocdbt",
    "data": rf"({ITEMS})/(ocdbt\.process_\d+/)?d/\w+",
    "writer's manifest": rf"({ITEMS})/ocdbt\.process_\d+/manifest\.ocdbt",
}


def flip(path: pathlib.Path, rng: np.random.Generator) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def truncate(path: pathlib.Path, rng: np.random.Generator) -> None:
    """Truncates a file at a random byte."""
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def zero(path: pathlib.Path, rng: np.random.Generator) -> None:
    """Overwrites a file with zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: pathlib.Path, rng: np.random.Generator) -> None:
    """Truncates a file to no bytes."""
    path.write_bytes(b"")


def delete(path: pathlib.Path, rng: np.random.Generator) -> None:
    """Deletes a file."""
    path.unlink()


FAULTS: dict[str, Callable] = {
    fault.__name__: fault for fault in (flip, truncate, zero, empty, delete)
}
ALL = tuple(itertools.product(KINDS, FAULTS))


class Damage(NamedTuple):
    """An applied fault: keys of KINDS and FAULTS, and the file."""

    kind: str
    fault: str
    path: pathlib.Path


def kind_of(path: pathlib.Path, step: pathlib.Path) -> str:
    """Returns the kind of a file in a step's folder. Raises ValueError if no kind matches."""
    name = path.relative_to(step).as_posix()
    for kind, pattern in KINDS.items():
        if re.fullmatch(pattern, name):
            return kind
    raise ValueError(f"{name} matches no kind; add one to KINDS.")


def damage(step, rng: np.random.Generator, kind: str = "", fault: str = "") -> Damage:
    """Applies one fault to one file of a step's folder; an empty kind or fault is random."""
    step = pathlib.Path(step)
    files: dict[str, list[pathlib.Path]] = {}
    for path in sorted(path for path in step.rglob("*") if path.is_file()):
        files.setdefault(kind_of(path, step), []).append(path)
    kind = kind or sorted(files)[rng.integers(len(files))]
    fault = fault or sorted(FAULTS)[rng.integers(len(FAULTS))]
    path = files[kind][rng.integers(len(files[kind]))]
    FAULTS[fault](path, rng)
    return Damage(kind, fault, path)
