"""The stored form of tokens: a directory of ArrayRecord files and a manifest, which comes last.

Running text is one long stream of tokens, the documents joined by an empty line (eos would not do,
since it ends what a decoder says and may be hidden). A file holds its part of the stream in records
of RECORD tokens, only its last one shorter; so windows of any length can be read at any place, and
one corpus serves every objective. Pairs are stored one a record: int32 [1 + n], the length of the
inputs, then inputs and targets. How long each document or pair is stands in a file beside them.
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

RECORD = 4096  # tokens; with no compression, the fastest to read at random
BLOCK = 64 * RECORD  # tokens in memory before they are written
MANIFEST = "manifest.json"
COUNTS = "counts.npy"  # int64 [ids]: how often each id is a target, for the unigram baseline
# Of text, int32 [documents]: tokens of each, with the empty line behind it; of pairs, int32
# [pairs, 2]: tokens of inputs and targets.
LENGTHS = "lengths.npy"
# Bytes of ArrayRecord's signature and of the first record's header, in which is the hash of that
# record: files of equal size that were exchanged are known by them.
HEAD = 104


class WrittenShard(NamedTuple):
    """What a file holds: its facts for the manifest, how often it has each id, lengths."""

    facts: dict  # tokens, documents or examples, bytes, sha256, sha256 of the head
    frequencies: np.ndarray  # int64 [ids]
    lengths: np.ndarray  # what is saved as LENGTHS


class DamagedRecord(ValueError):
    """A stored record that is not what was written: which, what is wrong with it, the cure."""

    def __str__(self) -> str:
        return "record {} {}; {}.".format(*self.args)

    @property
    def record(self) -> str:
        """Which record it is: "3 of <the file>"."""
        return self.args[0]


def dtype_of(size: int) -> str:
    """The numpy type that stores ids below `size`: two bytes each where that does."""
    return "<u2" if size <= 1 << 16 else "<i4"


def write_text(path, documents: Iterable[np.ndarray], gap: np.ndarray, size: int) -> WrittenShard:
    """Write documents as one file of the stream, each followed by `gap`.

    documents: int arrays of ids below `size`, the tokenizer's number of ids. Raises ValueError for
    an id that is not, OSError where the file cannot be written.
    """
    frequencies, dtype, lengths = np.zeros(size, np.int64), dtype_of(size), []

    def blocks() -> Iterator[np.ndarray]:
        held, length = [], 0
        for ids in documents:
            lengths.append(len(ids) + len(gap))
            held += [ids, gap]
            length += lengths[-1]
            if length >= BLOCK:
                stream = np.concatenate(held)
                whole = length - length % RECORD
                yield stream[:whole]
                held, length = [stream[whole:]], length - whole
        if length:
            yield np.concatenate(held)

    with record_writer(path) as write:
        for block in blocks():
            frequencies += _frequencies(block, size)
            block = block.astype(dtype)
            for start in range(0, len(block), RECORD):
                write(block[start : start + RECORD].tobytes())
    sizes = np.array(lengths, np.int32)
    facts = {"documents": len(sizes), "tokens": int(sizes.sum())}
    return WrittenShard(facts | file_metadata(path), frequencies, sizes)


def write_pairs(path, pairs: Iterable[tuple[np.ndarray, np.ndarray]], size: int) -> WrittenShard:
    """Write (inputs, targets) of ids below `size`, one pair a record; errors as in write_text."""
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
        raise ValueError(f"id {len(counts) - 1} is none of the tokenizer's {size} ids.")
    return counts


@contextlib.contextmanager
def record_writer(path) -> Iterator[Callable[[bytes], None]]:
    """Append records to a new ArrayRecord file, each in a group of its own, to be read alone."""
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


def file_metadata(path) -> dict:
    """What a manifest says of a file: its bytes, and the sha256 of them and of the first."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": pathlib.Path(path).stat().st_size, "sha256": digest, "head": _head_of(path)}


def _head_of(path) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(HEAD)).hexdigest()


def write_manifest(directory, identity: dict, files: dict[str, WrittenShard], counts: dict) -> dict:
    """Write what makes a directory of shards whole, the manifest last; returns the manifest.

    identity: all that decides the bytes. files: by name, in order. counts: beside those of the
    files, which are added up.
    """
    directory = pathlib.Path(directory)
    np.save(directory / COUNTS, sum(file.frequencies for file in files.values()))
    np.save(directory / LENGTHS, np.concatenate([file.lengths for file in files.values()]))
    facts = {name: file.facts for name, file in files.items()}
    text = all("documents" in file for file in facts.values())
    own = ("documents", "tokens") if text else ("examples", "tokens")
    counts = counts | {key: sum(file[key] for file in facts.values()) for key in own}
    manifest = {"identity": identity, "kind": "text" if text else "pairs", "counts": counts}
    if text:
        size = len(next(iter(files.values())).frequencies)
        manifest |= {"record": RECORD, "dtype": dtype_of(size)}
    manifest["files"] = facts
    manifest["beside"] = {name: file_metadata(directory / name) for name in (COUNTS, LENGTHS)}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_manifest(directory) -> dict | None:
    """The manifest of a finished directory; None where there is none, or one that is not ours.

    Raises ValueError if it is damaged or an earlier version's.
    """
    path = storage.as_path(directory) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it, or, if this package made it, "
            f"{rebuild_hint(directory)}."
        ) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
        return None
    files = manifest.get("files", {}).values()
    if "files" in manifest and ("beside" not in manifest or any("head" not in f for f in files)):
        raise ValueError(
            f"{directory} was written by an earlier version; {rebuild_hint(directory)}."
        )
    return manifest


def rebuild_hint(directory) -> str:
    """What to do about a damaged directory of shards, of which a finished corpus has several."""
    directory = storage.as_path(directory)
    above, own = directory.parent / MANIFEST, directory / MANIFEST
    if own.exists() and b'"kind": "taught"' in own.read_bytes():
        return f"remove {directory}, and make it anew with `python -m lm teacher-cache`"
    if above.exists() and b'"splits"' in above.read_bytes():
        return f"remove {directory.parent}, and make that corpus anew"
    return f"remove {directory}, and it is made anew"


def shard_paths(directory, manifest: dict) -> list[str]:
    """The shard files in order; ValueError where one is missing, of another size, or another."""
    paths = [pathlib.Path(directory) / name for name in manifest["files"]]
    for path in paths:
        size, whole = path.stat().st_size if path.exists() else 0, manifest["files"][path.name]
        if size != whole["bytes"]:
            raise ValueError(
                f"{path} has {size} bytes instead of {whole['bytes']}; {rebuild_hint(directory)}."
            )
        if _head_of(path) != whole["head"]:
            raise ValueError(f"{path} is not the file that was written; {rebuild_hint(directory)}.")
    return [str(path) for path in paths]


def load_array(directory, manifest: dict, name: str) -> np.ndarray:
    """COUNTS or LENGTHS of a directory; ValueError where it is not what was written."""
    path = pathlib.Path(directory) / name
    if not path.exists() or file_metadata(path) != manifest["beside"][name]:
        raise ValueError(f"{path} is missing or not what was written; {rebuild_hint(directory)}.")
    return np.load(path)


@dataclasses.dataclass(frozen=True)
class _File:
    """A file as ArrayRecord's source wants to be told of it, without opening it to count."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of all files of a directory by one index. Raises Damaged for damaged ones."""

    directory: str
    manifest: dict = dataclasses.field(repr=False)

    @functools.cached_property
    def records(self) -> tuple[int, ...]:
        """Records of each file."""
        sizes = self.manifest["files"].values()
        if self.manifest["kind"] == "pairs":
            return tuple(file["examples"] for file in sizes)
        return tuple(-(-file["tokens"] // self.manifest["record"]) for file in sizes)

    @functools.cached_property
    def _source(self):
        from array_record.python import array_record_data_source

        files = zip(shard_paths(self.directory, self.manifest), self.records, strict=True)
        found = [_File(path, number, number) for path, number in files if number]
        return array_record_data_source.ArrayRecordDataSource(found)

    def record(self, index: int) -> bytes:
        """The bytes of a record, checked by ArrayRecord's own hash."""
        try:
            return self._source[index]
        except (RuntimeError, IndexError) as error:
            raise self._damaged(index, f"cannot be read ({error})") from error

    @functools.cached_property
    def _first(self) -> list[int]:
        """The index of the first record of each file, and the end."""
        return [0, *itertools.accumulate(self.records)]

    def _damaged(self, index: int, reason: str) -> DamagedRecord:
        file = bisect.bisect_right(self._first, index) - 1
        path = pathlib.Path(self.directory) / list(self.manifest["files"])[file]
        return DamagedRecord(
            f"{index - self._first[file]} of {path}", reason, rebuild_hint(self.directory)
        )

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """How long each document or pair is, as LENGTHS has it."""
        return load_array(self.directory, self.manifest, LENGTHS)

    def __getstate__(self) -> dict:
        """Pickles by its address, so that worker processes open the files themselves."""
        return {"directory": self.directory, "manifest": self.manifest}


class Stream(Records):
    """Running text as one stream of tokens: its length, and any part of it.

    Raises ValueError where a file is missing, of another size, another, or damaged.
    """

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The place in the stream where each file begins, and the end."""
        sizes = (file["tokens"] for file in self.manifest["files"].values())
        return [0, *itertools.accumulate(sizes)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream; int array, over the bounds of records and files."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"[{start}, {stop}) is not within the {len(self)} tokens.")
        size, dtype, parts = self.manifest["record"], self.manifest["dtype"], []
        while start < stop:
            file = bisect.bisect_right(self._starts, start) - 1
            record, skip = divmod(start - self._starts[file], size)
            ids = np.frombuffer(self.record(self._first[file] + record), dtype)
            whole = min(size, self._starts[file + 1] - self._starts[file] - record * size)
            if len(ids) != whole:
                reason = f"has {len(ids)} tokens instead of {whole}"
                raise self._damaged(self._first[file] + record, reason)
            parts.append(ids[skip : skip + stop - start])
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])


class Pairs(Records):
    """Stored pairs as a sequence: len() and [i] -> (inputs, targets), int32 arrays."""

    def __len__(self) -> int:
        return sum(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.frombuffer(self.record(index), "<i4")
        return numbers[1 : 1 + numbers[0]], numbers[1 + numbers[0] :]
