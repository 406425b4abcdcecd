"""Records with columns, by number: of a TFDS dataset, or of files of JSONL and TSV."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lm import lookup, storage
from lm.sources import documents, formats, tfds

SPLIT = "{split}"
SLICE = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
SUFFIXES = re.compile(r"\.(jsonl|ndjson|tsv)(\.gz|\.bz2|\.zst)?")


def records(source: str, split: str, data_dir: str = "") -> Sequence[dict[str, Any]]:
    """The records of a split: len() and [i] -> {column: value}.

    source: tfds:name, or a file, several with commas or as a glob, in which {split} stands for the
    split's name; without it the file is the split train. split: as train, train[:99%].
    data_dir: of TFDS, as in tfds_splits. Files are held in memory as they are written.
    Raises ValueError where there is no such source or split, or a line is no record.
    """
    if source.startswith("tfds:"):
        return tfds.tfds_records(source.removeprefix("tfds:"), split, data_dir)
    name, start, end = _parse_slice(split)
    rows = [row for path in _split_files(source, name) for row in _read_rows(path)]
    first, last = (_slice_bound(word, len(rows)) for word in (start or "0", end or "100%"))
    if not rows[first:last]:
        raise ValueError(
            f"the split {split!r} of {source} holds no example, out of {len(rows)}; take a wider "
            f"slice."
        )
    return FileRecords(source, rows[first:last])


def resolve_splits(source: str, train: str, heldout: str, data_dir: str = "") -> tuple[str, str]:
    """(train split, held-out split): as given, or the end of train if there is no validation.

    Of many examples the last 1 %, of few the last one is held out. Raises ValueError where a split
    is not there, where the two share examples, and for too few to hold one out.
    """
    if source.startswith("tfds:"):
        return tfds.resolve_tfds_splits(source.removeprefix("tfds:"), train, heldout, data_dir)
    (ours, *_), (theirs, *_) = _parse_slice(train), _parse_slice(heldout)
    files = _split_files(source, ours)
    if heldout == tfds.DEFAULT_HELDOUT and not _match_files(source, theirs):
        if train != ours:
            raise ValueError(
                f"data.train={train!r} of {source} is a slice, and there is no {heldout!r}; name "
                f"the slice to hold out, as data.heldout='{ours}[99%:]'."
            )
        every = itertools.chain.from_iterable(map(_read_rows, files))
        return tfds.hold_out_end(
            source, ours, sum(1 for _ in itertools.islice(every, tfds.MIN_EXAMPLES_FOR_PERCENT))
        )
    _split_files(source, theirs)
    if ours == theirs:
        count = len(records(source, ours))
        a, b = (
            [
                _slice_bound(w or d, count)
                for w, d in zip(_parse_slice(s)[1:], ("0", "100%"), strict=True)
            ]
            for s in (train, heldout)
        )
        if max(a[0], b[0]) < min(a[1], b[1]):
            raise ValueError(
                f"data.train={train!r} and data.heldout={heldout!r} of {source} share examples; "
                f"use disjoint slices, as {ours}[:95%] and {ours}[95%:]."
            )
    return train, heldout


def source_fingerprint(source: str, split: str, data_dir: str = "") -> str:
    """A hash of what a source's split is made of: TFDS's word on itself, or the files' bytes."""
    if source.startswith("tfds:"):
        return tfds.tfds_fingerprint(source.removeprefix("tfds:"), data_dir)
    sums = hashlib.sha256()
    for path in _split_files(source, _parse_slice(split)[0]):
        with formats.open_stored(path) as file:
            sums.update(hashlib.file_digest(file, "sha256").digest())
    return sums.hexdigest()


@dataclasses.dataclass(frozen=True)
class FileRecords:
    """Rows of files as a sequence of records: parsed when they are asked for."""

    source: str
    rows: list = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, number, columns, row = self.rows[index]
        try:
            return _parse_row(row, columns)
        except documents.BadRecord as error:
            raise ValueError(
                f"line {number} of {path} cannot be read: {error}; repair or remove it."
            ) from None


def _parse_row(row: bytes | dict, columns: list[str] | None) -> dict[str, Any]:
    if isinstance(row, dict):
        raise documents.BadRecord(row["unreadable"])
    if columns is None:
        return formats.parse_json_object(row)
    text = documents.decode_utf8(row).removeprefix("\ufeff")
    fields = text.split("\t")
    if len(fields) != len(columns):
        raise documents.BadRecord(f"{len(fields)} fields where the header has {len(columns)}")
    return dict(zip(columns, fields, strict=True))


def iter_records(path: str) -> Iterator[dict[str, Any]]:
    """The records of one file of JSONL or TSV front to back, one in memory at a time."""
    return (FileRecords(path, [row])[0] for row in _read_rows(path))


def _read_rows(path: str) -> Iterator[tuple]:
    """(file, line, columns or None, bytes) of each row of a file; blank lines are none."""
    columns = None
    tabs = ".tsv" in os.path.basename(path).lower()
    try:
        with formats.open_decompressed(path) as stream:
            for number, row in enumerate(formats.iter_lines(stream), 1):
                if tabs and number == 1:
                    columns = _parse_header(path, row if isinstance(row, bytes) else b"")
                elif isinstance(row, dict) or row.strip():
                    yield path, number, columns, row
    except (EOFError, OSError, documents.BadRecord) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch or write it anew.") from None


def _parse_header(path: str, row: bytes) -> list[str]:
    """The columns that the first line of TSV names."""
    columns = documents.decode_utf8(row).removeprefix("\ufeff").split("\t")
    again = [name for name in columns if columns.count(name) > 1]
    if again:
        raise ValueError(
            f"{path} has the column {again[0]!r} more than once in its header; give each a name of "
            f"its own."
        )
    return columns


def _split_files(source: str, split: str) -> list[str]:
    """The files of a split, sorted. Raises ValueError, naming those beside it, for none."""
    if SPLIT not in source and split != "train":
        raise ValueError(
            f"{source} is one split, train, and has no {split!r}; name a slice of it, as "
            f"train[95%:], or write {SPLIT} where the files of several splits differ."
        )
    found = _match_files(source, split)
    if not found:
        named = source.replace(SPLIT, split)
        folder = os.path.dirname(named) or "."
        beside = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        hint = lookup.nearest(os.path.basename(named), beside) or "."
        raise ValueError(f"there is no file {named}{hint}")
    for path in found:
        if not SUFFIXES.search(path):
            raise ValueError(
                f"{path} is neither JSONL nor TSV; use a file that ends in .jsonl or .tsv (.gz, "
                f".bz2 or .zst may follow), or tfds:name."
            )
    return found


def _match_files(source: str, split: str) -> list[str]:
    """The files of a split that are there, named or matched; a source without {split} is train."""
    if SPLIT not in source and split != "train":
        return []
    found = []
    for item in source.replace(SPLIT, split).split(","):
        if storage.is_remote(item):
            found += storage.glob_paths(item) if "*" in item else [item]
        else:
            found += sorted(glob.glob(os.path.expanduser(item.strip()), recursive=True))
    return found


def _parse_slice(split: str) -> tuple[str, str | None, str | None]:
    """(name, first, last) of a split as train[:99%]."""
    found = SLICE.fullmatch(split)
    if not found:
        raise ValueError(
            f"the split {split!r} cannot be read as a slice; write it as train[:99%] or "
            f"train[1000:]."
        )
    return found.groups()


def _slice_bound(word: str, count: int) -> int:
    """The row that a slice's bound means: a number, or a share of all rows in percent."""
    number = int(word.removesuffix("%"))
    number = round(count * number / 100) if word.endswith("%") else number
    return min(max(number + count if number < 0 else number, 0), count)
