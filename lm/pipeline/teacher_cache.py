"""What a teacher said of each row of a run's batches, written once and read beside them.

A cache is a folder of ArrayRecord files with a manifest, as token shards are. A record is a row:
number step * batch_size + r is row r of batch `step`, so that any host, worker or later call finds
the rows it deals by their numbers alone. It holds a check of the row's ids, and of each target the
k likeliest ids, their log-probabilities, and the log of the tail: what all other ids have together,
each power 1 / temperature.
The manifest lists the whole files and is written anew behind each, so what it lists is a cache of
that many updates, and can be made longer.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import tempfile
import zlib
from collections.abc import Iterable

import numpy as np

from lm import batch, shards, storage

STORED = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}  # bfloat16 by its bits
FILE = 64 << 20  # bytes of a file, about; it is written at once
BLOCK = 64 << 10  # bytes that ArrayRecord fills a file up to, and writes one of for the places
OVERHEAD = 134  # bytes that ArrayRecord needs to find a record, about, and of its check
KIND = "taught"


class TeacherCache(shards.Records):
    """A cache to read: what a teacher said of any rows. Raises ValueError where it cannot."""

    @functools.cached_property
    def records(self) -> tuple[int, ...]:
        """Rows of each file."""
        return tuple(file["rows"] for file in self.manifest["files"].values())

    @property
    def identity(self) -> dict:
        """All that decides what is written: teacher, tokenizer, order, temperature, k, dtype and
        vocabulary.
        """
        return self.manifest["identity"]

    @property
    def updates(self) -> int:
        """How many batches it has, from the first of a run."""
        return updates(self.manifest)

    @functools.cached_property
    def position(self) -> np.dtype:
        """How a target is stored."""
        return position(self.identity)

    def read(self, rows: batch.Batch, addresses: np.ndarray) -> batch.TeacherTopK:
        """What the teacher said of rows of a run's batches. addresses: int [B], their numbers.

        Padding has k equally likely ids, and so has a row that cannot be read any more.
        Raises ValueError past the end, and where the rows are not those that the teacher read.
        """
        k, size = self.identity["k"], self.identity["order"]["batch_size"]
        shape = rows.targets.shape
        told = batch.TeacherTopK(
            np.broadcast_to(np.arange(k, dtype=np.int32), (*shape, k)).copy(),
            np.full((*shape, k), -math.log(k), np.float32),
            np.full(shape, -np.inf, np.float32),
        )
        for place, address in enumerate(addresses.tolist()):
            here = rows.targets_segment_ids[place] > 0
            if not here.any():
                continue
            if address >= self.updates * size:
                raise ValueError(
                    f"teacher.cache={self.directory} ends at batch {self.updates}, and batch "
                    f"{address // size + 1} is asked for; make it longer: python -m lm "
                    f"teacher-cache, as before, with --updates={address // size + 1} or more."
                )
            data = self.record(address)
            said = np.frombuffer(data, self.position, offset=4)
            if data[:4] != check_of(rows, place) or len(said) != here.sum():
                raise ValueError(
                    f"row {address % size} of batch {address // size + 1} is not what the teacher "
                    f"of teacher.cache={self.directory} read; make the cache anew in another "
                    f"folder."
                )
            told.ids[place, here] = said["ids"]
            told.logits[place, here] = _values(said["logits"], self.identity["dtype"])
            told.tail[place, here] = said["tail"]
        return told


def updates(manifest: dict) -> int:
    """How many batches the files of a cache's manifest hold."""
    rows = sum(file["rows"] for file in manifest["files"].values())
    return rows // manifest["identity"]["order"]["batch_size"]


def position(identity: dict) -> np.dtype:
    """A stored target: ids and logits [k], of the sizes that vocabulary and dtype ask for; tail."""
    ids = "<u2" if identity["vocabulary"] <= 1 << 16 else "<i4"
    k, dtype = identity["k"], STORED[identity["dtype"]]
    return np.dtype([("ids", ids, (k,)), ("logits", dtype, (k,)), ("tail", "<f4")])


def check_of(rows: batch.Batch, place: int) -> bytes:
    """Four bytes by which a row of a batch is known again."""
    return zlib.crc32(rows.targets[place], zlib.crc32(rows.inputs[place])).to_bytes(4, "little")


def _values(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def records_of(rows: batch.Batch, told: batch.TeacherTopK, identity: dict) -> list[bytes]:
    """The records of a batch's rows. told.logits: of the identity's dtype."""
    stored = np.zeros(rows.targets.shape, position(identity))
    stored["ids"], stored["tail"] = told.ids, told.tail
    stored["logits"] = told.logits.view(STORED[identity["dtype"]])
    real = rows.targets_segment_ids > 0
    return [check_of(rows, i) + stored[i, real[i]].tobytes() for i in range(len(stored))]


def open_teacher_cache(directory) -> TeacherCache:
    """The cache in a folder, or of a bucket a copy here. Raises ValueError where there is none."""
    here = storage.local_copy(storage.as_path(directory).expanduser(), shards.MANIFEST)
    manifest = shards.read_manifest(here)
    if manifest is None or manifest.get("kind") != KIND:
        raise ValueError(
            f"teacher.cache={directory} holds no cache of a teacher; make one with "
            f"`python -m lm teacher-cache --config=... --out={directory}`, or leave it empty."
        )
    return TeacherCache(str(here), manifest)


def open_manifest(directory, identity: dict) -> dict:
    """The manifest of a cache to go on writing, or of a new one.

    Raises ValueError where the folder has a cache, or shards, of anything else.
    """
    fresh = {"identity": identity, "kind": KIND, "files": {}, "beside": {}}
    found = shards.read_manifest(storage.as_path(directory)) or fresh
    if found["identity"] != identity:
        raise ValueError(
            f"{directory} holds what another teacher, tokenizer, order of data, temperature, k or "
            f"dtype made; use another --out, or remove it."
        )
    return found


def add_file(directory, manifest: dict, batches: Iterable[list[bytes]]) -> dict:
    """Write the records of some batches as the next file of a cache, whole or not at all.

    Returns the manifest that lists it too, which is on disk by then. Raises OSError where the
    folder cannot be written.
    """
    directory, rows = storage.as_path(directory), 0
    name = f"{KIND}-{len(manifest['files']):05d}.array_record"
    try:
        with tempfile.TemporaryDirectory(dir=_scratch(directory), prefix=".writing-") as scratch:
            path = pathlib.Path(scratch) / name
            with shards.record_writer(path) as write:
                for records in batches:
                    for record in records:
                        write(record)
                    rows += len(records)
            facts = {"rows": rows} | shards.file_metadata(path)
            storage.write_atomic(directory / name, path.read_bytes())
        longer = manifest | {"files": manifest["files"] | {name: facts}}
        storage.write_atomic(
            directory / shards.MANIFEST, (json.dumps(longer, indent=2) + "\n").encode()
        )
    except OSError as error:
        raise OSError(
            f"{directory} cannot be written ({error.strerror or error}); see to the space and the "
            f"permissions there, and run the same command again: it goes on after the "
            f"{updates(manifest)} updates that are whole."
        ) from error
    return longer


def _scratch(directory: pathlib.Path) -> pathlib.Path | None:
    if storage.is_remote(directory):
        return None
    directory.mkdir(parents=True, exist_ok=True)
    return directory
