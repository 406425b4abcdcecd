"""Token shards: a directory of ArrayRecord files and a manifest, which is written last.

Running text is one stream of tokens, with an empty line after each document (not eos, which ends
targets). A file stores its range of the stream in records of RECORD_TOKENS tokens, the last one
shorter, so that windows of any length can be read at any position. A pair is one record: int32
[1 + n], the length of the inputs, then inputs and targets.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lm import storage
from lm.storage import staging

RECORD_TOKENS = 4096  # the fastest size for random reads
BUFFER_TOKENS = 64 * RECORD_TOKENS
MANIFEST = "manifest.json"
COUNTS = "counts.npy"  # int64 [ids]: how often each id is a target, for the unigram baseline
# int32 [documents]: tokens of each with the empty line after it; or int32 [pairs, 2]: tokens of
# inputs and targets.
LENGTHS = "lengths.npy"
# Bytes of ArrayRecord's signature and of the first record's header, which contains the hash of that
# record: they identify a file without reading all of it.
HEAD_BYTES = 104


class WrittenShard(NamedTuple):
    """A written file: its entry in the manifest, and its share of COUNTS and LENGTHS."""

    facts: dict  # tokens, documents or examples, bytes, sha256, sha256 of the head
    frequencies: np.ndarray  # int64 [ids]
    lengths: np.ndarray  # as in LENGTHS


class DamagedRecord(ValueError):
    """A damaged record. Arguments: "3 of <the file>", the damage, the fix."""

    def __str__(self) -> str:
        return "record {} {}; {}.".format(*self.args)

    @property
    def record(self) -> str:
        """The number and file of the record."""
        return self.args[0]


def _dtype(size: int) -> str:
    """The numpy type that stores ids below `size`: two bytes if they suffice."""
    return "<u2" if size <= 1 << 16 else "<i4"


def write_text(
    path: str | pathlib.Path, documents: Iterable[np.ndarray], separator: np.ndarray, size: int
) -> WrittenShard:
    """Write documents as one file of the stream, each followed by the separator.

    documents: int arrays of ids below `size`, the number of the tokenizer's ids.
    Raises ValueError for a larger id, OSError if the file cannot be written.
    """
    frequencies, dtype, lengths = np.zeros(size, np.int64), _dtype(size), []

    def blocks() -> Iterator[np.ndarray]:
        buffer, length = [], 0
        for ids in documents:
            lengths.append(len(ids) + len(separator))
            buffer += [ids, separator]
            length += lengths[-1]
            if length >= BUFFER_TOKENS:
                stream = np.concatenate(buffer)
                end = length - length % RECORD_TOKENS
                yield stream[:end]
                buffer, length = [stream[end:]], length - end
        if length:
            yield np.concatenate(buffer)

    with record_writer(path) as write:
        for block in blocks():
            frequencies += _frequencies(block, size)
            block = block.astype(dtype)
            for start in range(0, len(block), RECORD_TOKENS):
                write(block[start : start + RECORD_TOKENS].tobytes())
    sizes = np.array(lengths, np.int32)
    facts = {"documents": len(sizes), "tokens": int(sizes.sum())}
    return WrittenShard(facts | file_metadata(path), frequencies, sizes)


def write_pairs(
    path: str | pathlib.Path, pairs: Iterable[tuple[np.ndarray, np.ndarray]], size: int
) -> WrittenShard:
    """Write pairs (inputs, targets) of ids below `size`; raises as write_text does."""
    frequencies, lengths = np.zeros(size, np.int64), []
    with record_writer(path) as write:
        for inputs, targets in pairs:
            frequencies += _frequencies(targets, size)
            lengths.append((len(inputs), len(targets)))
            write(np.concatenate([[len(inputs)], inputs, targets]).astype("<i4").tobytes())
    sizes = np.array(lengths, np.int32).reshape(-1, 2)
    facts = {"examples": len(sizes), "tokens": int(sizes.sum())}
    return WrittenShard(facts | file_metadata(path), frequencies, sizes)


def _frequencies(ids: np.ndarray, size: int) -> np.ndarray:
    counts = np.bincount(ids, minlength=size)
    if len(counts) > size:
        raise ValueError(f"id {len(counts) - 1} is not one of the tokenizer's {size} ids.")
    return counts


@contextlib.contextmanager
def record_writer(path: str | pathlib.Path) -> Iterator[Callable[[bytes], None]]:
    """Append records to a new ArrayRecord file, each in its own group for random access."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    try:
        yield writer.write
        writer.close()
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written ({error}); free some space.") from error
    finally:
        if writer.is_open():
            with contextlib.suppress(RuntimeError):
                writer.close()


def file_metadata(path: str | pathlib.Path) -> dict:
    """A file's entry in a manifest: its size, its sha256 and the sha256 of its head."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = pathlib.Path(path).stat().st_size
    return {"bytes": size, "sha256": digest, "head": _head_sha256(path)}


def _head_sha256(path: str | pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()


def write_manifest(
    directory: str | pathlib.Path, identity: dict, files: dict[str, WrittenShard], counts: dict
) -> dict:
    """Write the frequencies, the lengths and last the manifest; returns the manifest.

    identity: everything that decides the bytes. files: by name, in order. counts: added to the
    totals of the files.
    """
    directory = pathlib.Path(directory)
    np.save(directory / COUNTS, sum(file.frequencies for file in files.values()))
    np.save(directory / LENGTHS, np.concatenate([file.lengths for file in files.values()]))
    facts = {name: file.facts for name, file in files.items()}
    is_text = all("documents" in file for file in facts.values())
    keys = ("documents", "tokens") if is_text else ("examples", "tokens")
    counts = counts | {key: sum(file[key] for file in facts.values()) for key in keys}
    manifest = {"identity": identity, "kind": "text" if is_text else "pairs", "counts": counts}
    if is_text:
        size = len(next(iter(files.values())).frequencies)
        manifest |= {"record": RECORD_TOKENS, "dtype": _dtype(size)}
    manifest["files"] = facts
    manifest["beside"] = {name: file_metadata(directory / name) for name in (COUNTS, LENGTHS)}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_manifest(directory: str | pathlib.Path) -> dict | None:
    """Read a directory's manifest; None if it is missing or another program's.

    Raises ValueError if it is damaged or was written by an earlier version.
    """
    path = storage.as_path(directory) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it, or, if this package wrote it, "
            f"{rebuild_hint(directory)}."
        ) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        return None
    files = manifest.get("files", {}).values()
    if "files" in manifest and ("beside" not in manifest or any("head" not in f for f in files)):
        hint = rebuild_hint(directory)
        raise ValueError(f"{directory} was written by an earlier version; {hint}.")
    return manifest


def build_once(
    out: pathlib.Path, identity: dict, flag: str, write: Callable[[pathlib.Path], dict]
) -> tuple[dict, bool]:
    """Build a directory with a manifest, unless it exists; it appears complete or not at all.

    identity: everything that decides the bytes. flag: the flag that names `out`, for errors. write:
    writes all files to a directory, returns the manifest. Returns (manifest, whether it existed).
    Raises ValueError if `out` has another identity or other contents.
    """
    if manifest := _read_existing(out, identity, flag):
        return manifest, True
    with staging.staging_dir(out) as staging_dir:
        if manifest := _read_existing(out, identity, flag):  # built by another process
            return manifest, True
        manifest = write(staging_dir)
        staging_dir.replace(out)
    return manifest, False


def _read_existing(out: pathlib.Path, identity: dict, flag: str) -> dict | None:
    manifest = read_manifest(out)
    if manifest is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and has other contents; set another {flag}.")
        return None
    stored = manifest["identity"]
    if differing := [key for key in identity if stored.get(key) != identity[key]]:
        names = " and ".join(differing)
        raise ValueError(f"{out} was built from another {names}; remove it or set another {flag}.")
    return manifest


def rebuild_hint(directory: str | pathlib.Path) -> str:
    """How to rebuild a damaged directory of shards, which may be part of a finished corpus."""
    directory = storage.as_path(directory)
    manifest, corpus_manifest = directory / MANIFEST, directory.parent / MANIFEST
    if manifest.exists() and b'"kind": "taught"' in manifest.read_bytes():
        return f"remove {directory}, and build it again with `python -m lm teacher-cache`"
    if corpus_manifest.exists() and b'"splits"' in corpus_manifest.read_bytes():
        return f"remove {directory.parent}, and build that corpus again"
    return f"remove {directory}, and it is built again"


def shard_paths(directory: str | pathlib.Path, manifest: dict) -> list[str]:
    """The shard files in order; raises ValueError if one is missing, cut or replaced."""
    paths = [pathlib.Path(directory) / name for name in manifest["files"]]
    for path in paths:
        size, facts = path.stat().st_size if path.exists() else 0, manifest["files"][path.name]
        if size != facts["bytes"]:
            reason = f"has {size} bytes instead of {facts['bytes']}"
            raise ValueError(f"{path} {reason}; {rebuild_hint(directory)}.")
        if _head_sha256(path) != facts["head"]:
            raise ValueError(f"{path} is not the file that was written; {rebuild_hint(directory)}.")
    return [str(path) for path in paths]


def load_array(directory: str | pathlib.Path, manifest: dict, name: str) -> np.ndarray:
    """Load COUNTS or LENGTHS; raises ValueError if it is missing or damaged."""
    path = pathlib.Path(directory) / name
    if not path.exists() or file_metadata(path) != manifest["beside"][name]:
        raise ValueError(f"{path} is missing or damaged; {rebuild_hint(directory)}.")
    return np.load(path)


@dataclasses.dataclass(frozen=True)
class _File:
    """The fields that ArrayRecord's data source reads of a file, so that it need not open it."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of all files of a directory by one index. Raises DamagedRecord."""

    directory: str
    manifest: dict = dataclasses.field(repr=False)

    @functools.cached_property
    def records(self) -> tuple[int, ...]:
        """The number of records of each file."""
        files = self.manifest["files"].values()
        if self.manifest["kind"] == "pairs":
            return tuple(file["examples"] for file in files)
        return tuple(-(-file["tokens"] // self.manifest["record"]) for file in files)

    @functools.cached_property
    def _source(self):
        from array_record.python import array_record_data_source

        files = zip(shard_paths(self.directory, self.manifest), self.records, strict=True)
        nonempty = [_File(path, number, number) for path, number in files if number]
        return array_record_data_source.ArrayRecordDataSource(nonempty)

    def record(self, index: int) -> bytes:
        """The bytes of a record, verified by ArrayRecord's hash."""
        try:
            return self._source[index]
        except (RuntimeError, IndexError) as error:
            raise self._damaged(index, f"cannot be read ({error})") from error

    @functools.cached_property
    def _first(self) -> list[int]:
        """The index of each file's first record, and the total."""
        return [0, *itertools.accumulate(self.records)]

    def _damaged(self, index: int, reason: str) -> DamagedRecord:
        file = bisect.bisect_right(self._first, index) - 1
        path = pathlib.Path(self.directory) / list(self.manifest["files"])[file]
        record = f"{index - self._first[file]} of {path}"
        return DamagedRecord(record, reason, rebuild_hint(self.directory))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """The length of each document or pair, as in LENGTHS."""
        return load_array(self.directory, self.manifest, LENGTHS)

    def __getstate__(self) -> dict:
        """Pickle without open files: each worker process opens its own."""
        return {"directory": self.directory, "manifest": self.manifest}


class Stream(Records):
    """Running text as one stream of tokens: len() and read(start, stop).

    Raises ValueError if a file is missing, cut, replaced or damaged.
    """

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The position in the stream where each file starts, and the total."""
        sizes = (file["tokens"] for file in self.manifest["files"].values())
        return [0, *itertools.accumulate(sizes)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read tokens [start, stop) of the stream: int [stop - start]."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"[{start}, {stop}) is outside the {len(self)} tokens.")
        size, dtype, chunks = self.manifest["record"], self.manifest["dtype"], []
        while start < stop:
            file = bisect.bisect_right(self._starts, start) - 1
            record, skip = divmod(start - self._starts[file], size)
            ids = np.frombuffer(self.record(self._first[file] + record), dtype)
            expected = min(size, self._starts[file + 1] - self._starts[file] - record * size)
            if len(ids) != expected:
                reason = f"has {len(ids)} tokens instead of {expected}"
                raise self._damaged(self._first[file] + record, reason)
            chunks.append(ids[skip : skip + stop - start])
            start += len(chunks[-1])
        return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, dtype), *chunks])


class Pairs(Records):
    """Pairs as a sequence: len() and [i] -> (inputs, targets), int32 arrays."""

    def __len__(self) -> int:
        return sum(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.frombuffer(self.record(index), "<i4")
        return numbers[1 : 1 + numbers[0]], numbers[1 + numbers[0] :]
