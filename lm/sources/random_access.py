"""The records of a split by index: of a TFDS dataset, or of JSONL and TSV files."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from lm import lookup, storage
from lm.sources import documents, formats, tfds

SPLIT = "{split}"
SLICE = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
SUFFIXES = re.compile(r"\.(jsonl|ndjson|tsv)(\.gz|\.bz2|\.zst)?")


def records(source: str, split: str, data_dir: str = "") -> documents.Records:
    """The records of a split: a sequence with len() and [i] -> {column: value}.

    source: tfds:name, or a file, several with commas or as a glob, in which {split} stands for the
    name of the split; without {split} the files are the split train. split: as train, train[:99%].
    data_dir: as in tfds_splits. The bytes of files are held in memory and parsed on access.
    Raises ValueError if the source or the split does not exist or is empty.
    """
    if source.startswith("tfds:"):
        return tfds.tfds_records(source.removeprefix("tfds:"), split, data_dir)
    name, start, stop = _parse_slice(split)
    rows = [row for path in _split_files(source, name) for row in _read_rows(path)]
    selected = rows[_slice_bound(start or "0", len(rows)) : _slice_bound(stop or "100%", len(rows))]
    if not selected:
        raise ValueError(
            f"the split {split!r} of {source} holds no example, out of {len(rows)}; take a wider "
            f"slice."
        )
    return documents.Records(source, split, selected, Row.record)


def resolve_splits(source: str, train: str, heldout: str, data_dir: str = "") -> tuple[str, str]:
    """(train split, held-out split): as given, or if there is no validation, slices of train.

    These slices hold out the last 1 % of many examples, or the last one of few.
    Raises ValueError if a split does not exist, the two share examples, or there are too few.
    """
    if source.startswith("tfds:"):
        return tfds.resolve_tfds_splits(source.removeprefix("tfds:"), train, heldout, data_dir)
    train_name, *train_slice = _parse_slice(train)
    heldout_name, *heldout_slice = _parse_slice(heldout)
    files = _split_files(source, train_name)
    if heldout == tfds.DEFAULT_HELDOUT and not _match_files(source, heldout_name):
        if train != train_name:
            raise ValueError(
                f"data.train_split={train!r} of {source} is a slice, and there is no {heldout!r}; "
                f"name the slice to hold out, as data.heldout_split='{train_name}[99%:]'."
            )
        rows = itertools.chain.from_iterable(map(_read_rows, files))
        enough = itertools.islice(rows, tfds.MIN_EXAMPLES_FOR_PERCENT)
        return tfds.hold_out_end(source, train_name, sum(1 for _ in enough))
    _split_files(source, heldout_name)
    if train_name == heldout_name:
        count = len(records(source, train_name))
        starts, stops = zip(train_slice, heldout_slice, strict=True)
        start = max(_slice_bound(word or "0", count) for word in starts)
        if start < min(_slice_bound(word or "100%", count) for word in stops):
            raise ValueError(tfds.shared_examples_error(source, train, heldout, train_name))
    return train, heldout


def source_fingerprint(source: str, split: str, data_dir: str = "") -> str:
    """A hash of the contents of a split: of TFDS's metadata, or of the files' bytes."""
    if source.startswith("tfds:"):
        return tfds.tfds_fingerprint(source.removeprefix("tfds:"), data_dir)
    sums = hashlib.sha256()
    for path in _split_files(source, _parse_slice(split)[0]):
        with formats.open_stored(path) as file:
            sums.update(hashlib.file_digest(file, "sha256").digest())
    return sums.hexdigest()


class Row(NamedTuple):
    """One row of a file. columns: the header of a TSV file, None for JSONL."""

    path: str
    line: int
    columns: list[str] | None
    data: bytes | dict

    def record(self) -> dict[str, Any]:
        """Parse the row. Raises ValueError naming the file and the line."""
        try:
            return self._parse()
        except documents.BadRecord as error:
            raise ValueError(
                f"line {self.line} of {self.path} cannot be read: {error}; repair or remove it."
            ) from None

    def _parse(self) -> dict[str, Any]:
        if isinstance(self.data, dict):
            raise documents.BadRecord(self.data["unreadable"])
        if self.columns is None:
            return formats.parse_json_object(self.data)
        fields = documents.decode_utf8(self.data).removeprefix("\ufeff").split("\t")
        if len(fields) != len(self.columns):
            raise documents.BadRecord(
                f"{len(fields)} fields where the header has {len(self.columns)}"
            )
        return dict(zip(self.columns, fields, strict=True))


def iter_records(path: str) -> Iterator[dict[str, Any]]:
    """The records of one JSONL or TSV file front to back, one in memory at a time."""
    return (row.record() for row in _read_rows(path))


def _read_rows(path: str) -> Iterator[Row]:
    """The rows of a file; blank lines are skipped."""
    columns = None
    is_tsv = ".tsv" in os.path.basename(path).lower()
    try:
        with formats.open_decompressed(path) as stream:
            for number, line in enumerate(formats.iter_lines(stream), 1):
                if is_tsv and number == 1:
                    header = line if isinstance(line, bytes) else b""
                    columns = formats.parse_tsv_header(path, header)
                elif isinstance(line, dict) or line.strip():
                    yield Row(path, number, columns, line)
    except (EOFError, OSError, documents.BadRecord) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch or write it anew.") from None


def _split_files(source: str, split: str) -> list[str]:
    """The files of a split, sorted. Raises ValueError, with the nearest name, if there are none."""
    if SPLIT not in source and split != "train":
        raise ValueError(
            f"{source} is one split, train, and has no {split!r}; name a slice of it, as "
            f"train[95%:], or write {SPLIT} where the files of several splits differ."
        )
    files = _match_files(source, split)
    if not files:
        path = source.replace(SPLIT, split)
        folder = os.path.dirname(path) or "."
        siblings = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        hint = lookup.nearest(os.path.basename(path), siblings) or "."
        raise ValueError(f"there is no file {path}{hint}")
    for path in files:
        if not SUFFIXES.search(path):
            raise ValueError(
                f"{path} is neither JSONL nor TSV; use a file that ends in .jsonl or .tsv (.gz, "
                f".bz2 or .zst may follow), or tfds:name."
            )
    return files


def _match_files(source: str, split: str) -> list[str]:
    """The existing files of a split; a source without {split} has only the split train."""
    if SPLIT not in source and split != "train":
        return []
    files = []
    for item in source.replace(SPLIT, split).split(","):
        if storage.is_remote(item):
            files += storage.glob_paths(item) if "*" in item else [item]
        else:
            files += sorted(glob.glob(os.path.expanduser(item.strip()), recursive=True))
    return files


def _parse_slice(split: str) -> tuple[str, str | None, str | None]:
    """(name, start, stop) of a split such as train[:99%]."""
    match = SLICE.fullmatch(split)
    if not match:
        raise ValueError(
            f"the split {split!r} cannot be read as a slice; write it as train[:99%] or "
            f"train[1000:]."
        )
    return match.groups()


def _slice_bound(word: str, count: int) -> int:
    """The row index of a slice's bound, which is a number or a percentage of `count` rows."""
    number = int(word.removesuffix("%"))
    number = round(count * number / 100) if word.endswith("%") else number
    return min(max(number + count if number < 0 else number, 0), count)
