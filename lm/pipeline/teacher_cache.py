"""The teacher cache: a teacher's top-k logits of each row of a run's batches, on disk.

A cache is a folder of ArrayRecord files with a manifest, like token shards. A record is a row: row
r of batch `step` has the number step * batch_size + r, by which any host or worker finds it. A
record has a checksum of the row's ids and, for each target, the k most likely ids, their
log-probabilities, and the tail: the log of the sum of all other probabilities, each to the power of
1 / temperature.
The manifest lists complete files and is rewritten after each, so an interrupted cache can be read
as far as it goes, and extended.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterable

import numpy as np

from lm import batch, shards, storage

STORED_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}  # bfloat16 as its bits
FILE_BYTES = 64 << 20  # approximate size of a file, which is written at once
BLOCK_BYTES = 64 << 10  # ArrayRecord fills files up to multiples of it, and adds one for the index
ROW_OVERHEAD = 134  # approximate bytes per record of ArrayRecord's index and the checksum
KIND = "taught"


class TeacherCache(shards.Records):
    """Reads a cache. Raises ValueError if a file is missing or damaged."""

    @functools.cached_property
    def records(self) -> tuple[int, ...]:
        """The number of rows of each file."""
        return tuple(file["rows"] for file in self.manifest["files"].values())

    @property
    def identity(self) -> dict:
        """All that decides the contents: teacher, tokenizer, order, temperature, k, dtype, size."""
        return self.manifest["identity"]

    @property
    def num_updates(self) -> int:
        """The number of batches, from the first of a run."""
        return num_updates(self.manifest)

    def read(self, rows: batch.Batch, addresses: np.ndarray) -> batch.TeacherTopK:
        """The teacher's top k of rows of a run's batches. addresses: int [B], the rows' numbers.

        Padding and unreadable rows have k equally likely ids.
        Raises ValueError past the end, and if the rows are not those that the teacher read.
        """
        k, size = self.identity["k"], self.identity["order"]["batch_size"]
        shape = rows.targets.shape
        top_k = batch.TeacherTopK(
            np.broadcast_to(np.arange(k, dtype=np.int32), (*shape, k)).copy(),
            np.full((*shape, k), -math.log(k), np.float32),
            np.full(shape, -np.inf, np.float32),
        )
        for row, address in enumerate(addresses.tolist()):
            is_target = rows.targets_segment_ids[row] > 0
            if not is_target.any():
                continue
            if address >= self.num_updates * size:
                raise ValueError(
                    f"teacher.cache={self.directory} ends at batch {self.num_updates}, before "
                    f"batch {address // size + 1}; extend it: python -m lm teacher-cache, as "
                    f"before, with --updates={address // size + 1} or more."
                )
            data = self.record(address)
            stored = np.frombuffer(data, target_dtype(self.identity), offset=4)
            if data[:4] != _row_checksum(rows, row) or len(stored) != is_target.sum():
                raise ValueError(
                    f"row {address % size} of batch {address // size + 1} is not what the teacher "
                    f"of teacher.cache={self.directory} read; write a new cache in another folder."
                )
            logits = stored["logits"]
            if self.identity["dtype"] == "bfloat16":
                logits = (logits.astype(np.uint32) << 16).view(np.float32)
            top_k.ids[row, is_target] = stored["ids"]
            top_k.logits[row, is_target] = logits
            top_k.tail[row, is_target] = stored["tail"]
        return top_k


def num_updates(manifest: dict) -> int:
    """The number of batches in the files of a cache's manifest."""
    rows = sum(file["rows"] for file in manifest["files"].values())
    return rows // manifest["identity"]["order"]["batch_size"]


def target_dtype(identity: dict) -> np.dtype:
    """A target's structured dtype: ids [k], logits [k] (log-probabilities), tail (in logs)."""
    ids = "<u2" if identity["vocabulary"] <= 1 << 16 else "<i4"
    k, dtype = identity["k"], STORED_DTYPES[identity["dtype"]]
    return np.dtype([("ids", ids, (k,)), ("logits", dtype, (k,)), ("tail", "<f4")])


def _row_checksum(rows: batch.Batch, row: int) -> bytes:
    return zlib.crc32(rows.targets[row], zlib.crc32(rows.inputs[row])).to_bytes(4, "little")


def encode_records(rows: batch.Batch, top_k: batch.TeacherTopK, identity: dict) -> list[bytes]:
    """The records of a batch's rows. top_k.logits: of the identity's dtype."""
    stored = np.zeros(rows.targets.shape, target_dtype(identity))
    stored["ids"], stored["tail"] = top_k.ids, top_k.tail
    stored["logits"] = top_k.logits.view(STORED_DTYPES[identity["dtype"]])
    is_target = rows.targets_segment_ids > 0
    return [
        _row_checksum(rows, row) + stored[row, is_target[row]].tobytes()
        for row in range(len(stored))
    ]


def open_teacher_cache(directory: str | os.PathLike) -> TeacherCache:
    """Open the cache in a folder, or a local copy of one in a bucket.

    Raises ValueError if there is none.
    """
    local = storage.local_copy(storage.as_path(directory).expanduser(), shards.MANIFEST)
    manifest = shards.read_manifest(local)
    if manifest is None or manifest.get("kind") != KIND:
        raise ValueError(
            f"teacher.cache={directory} holds no teacher cache; write one with `python -m lm "
            f"teacher-cache --config=... --out={directory}`, or leave teacher.cache empty."
        )
    return TeacherCache(str(local), manifest)


def open_manifest(directory: str | os.PathLike, identity: dict) -> dict:
    """The manifest of a cache to continue, or of a new one.

    Raises ValueError if the folder holds shards, or a cache of another identity.
    """
    new = {"identity": identity, "kind": KIND, "files": {}, "beside": {}}
    manifest = shards.read_manifest(storage.as_path(directory)) or new
    if manifest["identity"] != identity:
        raise ValueError(
            f"{directory} holds a cache of another teacher, tokenizer, order of data, temperature, "
            f"k or dtype; use another --out, or remove it."
        )
    return manifest


def add_file(directory: str | os.PathLike, manifest: dict, batches: Iterable[list[bytes]]) -> dict:
    """Write the records of some batches as the next file of a cache, atomically.

    Returns the manifest that lists it too, which is written after it. Raises OSError if the folder
    cannot be written.
    """
    directory, num_rows = storage.as_path(directory), 0
    name = f"{KIND}-{len(manifest['files']):05d}.array_record"
    try:
        if not storage.is_remote(directory):
            directory.mkdir(parents=True, exist_ok=True)
        local = None if storage.is_remote(directory) else directory
        with tempfile.TemporaryDirectory(dir=local, prefix=".writing-") as scratch:
            path = pathlib.Path(scratch) / name
            with shards.record_writer(path) as write:
                for records in batches:
                    for record in records:
                        write(record)
                    num_rows += len(records)
            facts = {"rows": num_rows} | shards.file_metadata(path)
            storage.write_atomic(directory / name, path.read_bytes())
        extended = manifest | {"files": manifest["files"] | {name: facts}}
        text = json.dumps(extended, indent=2) + "\n"
        storage.write_atomic(directory / shards.MANIFEST, text.encode())
    except OSError as error:
        raise OSError(
            f"{directory} cannot be written ({error.strerror or error}); check its free space and "
            f"permissions, and run the same command again to continue after the "
            f"{num_updates(manifest)} complete updates."
        ) from error
    return extended
