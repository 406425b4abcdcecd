"""A source string -> its files and TFDS splits, each read front to back on its own."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lm import lookup
from lm.sources import documents, formats, tfds, wikipedia


class FileKind(NamedTuple):
    """How files of a kind are recognized and read."""

    read: Callable[[SourceFile], Iterator]
    parse: Callable[[SourceFile, Any], documents.Document]
    suffix: str = ""  # of the file name, as a regular expression
    compressible: bool = False  # whether .gz, .bz2 or .zst may follow
    column: str = ""  # the default text column; "" for kinds without columns


KINDS = {
    "text": FileKind(
        formats.read_text, lambda file, raw: documents.to_document(raw), r"\.txt", True
    ),
    "jsonl": FileKind(
        formats.read_json_lines, formats.parse_json, r"\.(jsonl|ndjson|json(?=[.-]))", True, "text"
    ),
    "tsv": FileKind(formats.read_tsv, formats.parse_tsv_row, r"\.tsv", True, "text"),
    "parquet": FileKind(formats.read_parquet, formats.parse_value, r"\.parquet", column="text"),
    "array_record": FileKind(
        formats.read_array_record, formats.parse_array_record, r"\.array_record"
    ),
    # Wikipedia's larger dumps come in parts, as .xml-p1p41242.bz2.
    "wikipedia": FileKind(
        wikipedia.read_pages, wikipedia.parse_page, r"\.xml(-p\d+p\d+)?", compressible=True
    ),
    "tfds": FileKind(formats.read_tfds, formats.parse_value, column="text"),
}
SUFFIXES = (
    ".txt, .jsonl, .ndjson, .tsv and .xml, each also with .gz, .bz2 or .zst after it, .json.gz, "
    ".parquet, .array_record; a file of one JSON object a line is .jsonl"
)
SHARD = r"(-\d+-of-\d+)?"  # as in c4-train.json-00000-of-01024.gz
INDEX = re.compile(r"-multistream-index\d*\.txt")  # distributed with a dump of Wikipedia


def _takes_column(kind: str) -> bool:
    return bool(KINDS[kind].column) or kind == "array_record"  # JSON objects or plain text


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file, or one TFDS split, of a source: small, picklable, opened only by its methods.

    name: path, address, or tfds:name@split. kind: a key of KINDS. column: the text column, for
    kinds with columns. unit: what is a document in a text file: file, paragraph or line.
    data_dir: as in tfds_splits.
    """

    name: str
    kind: str
    column: str = ""
    unit: str = "file"
    data_dir: str = ""

    def __post_init__(self):
        kind = lookup.lookup(KINDS, self.kind, "the kind of a source")
        lookup.lookup(formats.UNITS, self.unit, "--unit")
        object.__setattr__(self, "column", self.column or kind.column)
        if self.kind == "array_record" and "://" in self.name:
            raise ValueError(f"{self.name}: ArrayRecord is read from local files; copy it here.")

    def size(self) -> int:
        """Bytes as stored; for a slice of a TFDS split, its share of the split's bytes."""
        if self.kind == "tfds":
            return tfds.tfds_bytes(*tfds.split_address(self.name), self.data_dir)
        with formats.open_stored(self.name) as file:
            return file.seek(0, os.SEEK_END)

    def digest(self) -> str:
        """The sha256 of the bytes as stored; for TFDS, of the dataset's metadata."""
        if self.kind == "tfds":
            return tfds.tfds_fingerprint(tfds.split_address(self.name)[0], self.data_dir)
        with formats.open_stored(self.name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def raw_records(self) -> Iterator[bytes | dict]:
        """Raw records front to back in constant memory, to be passed to `document`.

        Cheap: all parsing is left to `document`. A record that is too long is yielded as
        {"unreadable": reason, "excerpt": bytes}.
        Raises ValueError, with the position, for a file that is damaged, truncated or of another
        format, and if the first record lacks the column.
        """
        number = 0
        try:
            for record in KINDS[self.kind].read(self):
                yield record
                number += 1
        except documents.BadRecord as error:
            raise ValueError(f"{self.name} cannot be read: {error}.") from None
        except (EOFError, OSError, RuntimeError) as error:
            raise ValueError(
                f"{self.name} cannot be read after its first {number} records: "
                f"{str(error) or 'it is cut short or damaged'}; fetch or write it anew."
            ) from None

    def document(self, raw: bytes | dict) -> documents.Document:
        """Parse a raw record: a pure function, and the expensive half of reading.

        Raises BadRecord with the reason for a record that cannot be read.
        """
        if isinstance(raw, dict) and "unreadable" in raw:
            raise documents.BadRecord(raw["unreadable"])
        return KINDS[self.kind].parse(self, raw)


def list_files(
    source: str, *, column: str = "", unit: str = "file", data_dir: str = ""
) -> list[SourceFile]:
    """The files of a source, each once: in the order of its items, sorted within an item.

    source: items separated by commas: a path; a directory, for all files below it with a known
    suffix, hidden ones excluded; a glob, ** too; each of these also as an address, as gs://..;
    tfds:name[/config][:version], with @split unless it is train. column, unit, data_dir: as in
    SourceFile.
    Raises ValueError for an item without files, and for a column or unit that no file uses.
    """
    files = {}
    for item in _items(source):
        if item.startswith("tfds:"):
            if item == "tfds:":
                raise ValueError("--source=tfds: names no dataset; give it as tfds:name@split.")
            name, split = tfds.split_address(item)
            tfds.tfds_records(name, split, data_dir)
            file = SourceFile(f"tfds:{name}@{split}", "tfds", column, data_dir=data_dir)
            files.setdefault(file.name, file)
            continue
        for name in _readable_files(item):
            kind = _kind_of(name)
            file = SourceFile(name, kind, column if _takes_column(kind) else "", unit)
            files.setdefault(name if "://" in name else os.path.realpath(name), file)
    if not files:
        raise ValueError("--source is empty; name files, a folder, a glob or tfds:name.")
    if column and not any(file.column for file in files.values()):
        raise ValueError(f"--column={column!r}: no file of {source} has columns; leave it out.")
    if unit != "file" and not any(file.kind == "text" for file in files.values()):
        raise ValueError(f"--unit={unit!r}: no file of {source} is plain text; leave it out.")
    return list(files.values())


def skipped_files(source: str) -> list[str]:
    """The files in a source's directories that list_files skips because of their suffix."""
    matches = [_match(item) for item in _items(source) if not item.startswith("tfds:")]
    return sorted(n for is_dir, names in matches if is_dir for n in names if not _kind_of(n))


def check_first_records(files: list[SourceFile]) -> None:
    """Read the first record of each file but plain text, to report a wrong column early.

    Raises ValueError as raw_records does.
    """
    for file in files:
        if file.kind != "text":
            records = file.raw_records()
            next(records, None)
            records.close()


def _items(source: str) -> list[str]:
    return [item.strip() for item in source.split(",") if item.strip()]


def _kind_of(name: str) -> str:
    """The kind of a file by its suffix; "" if it is unknown or the index of a dump."""
    if INDEX.search(name):
        return ""
    for name_of_kind, kind in KINDS.items():
        codec = r"(\.gz|\.bz2|\.zst)?" if kind.compressible else ""
        if kind.suffix and re.search(kind.suffix + SHARD + codec + "$", name, re.IGNORECASE):
            return name_of_kind
    return ""


def _readable_files(item: str) -> list[str]:
    """The files of known kinds that an item of a source names, sorted."""
    is_dir, names = _match(item)
    if not names:
        path = pathlib.Path(item)
        siblings = path.parent.iterdir() if path.parent.is_dir() else []
        siblings = [sibling.name for sibling in siblings if sibling.exists()]  # no broken link
        hint = lookup.nearest(path.name, siblings) or "."
        raise ValueError(f"--source={item}: there is no such file, folder or match{hint}")
    unknown = [name for name in names if not _kind_of(name)]
    if len(unknown) == len(names) or (unknown and not is_dir):
        raise ValueError(
            f"--source={item}: {unknown[0]} has none of the suffixes read here: {SUFFIXES}."
        )
    return sorted(set(names) - set(unknown))


def _match(item: str) -> tuple[bool, list[str]]:
    """(whether the item is a directory, the files that it is, holds or matches)."""
    if "://" in item:
        return _match_address(item)
    path = pathlib.Path(item).expanduser()
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.is_file())
        hidden = lambda file: any(name.startswith(".") for name in file.relative_to(path).parts)
        return True, [str(file) for file in files if not hidden(file)]
    names = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)
    return False, [name for name in names if os.path.isfile(name)]


def _match_address(item: str) -> tuple[bool, list[str]]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(item)
        is_dir = system.isdir(path)
        infos = system.find(path, detail=True) if is_dir else system.glob(path, detail=True)
    except ImportError as error:
        raise ValueError(f"--source={item}: {error}, with pip install.") from None
    except ValueError as error:
        raise ValueError(
            f"--source={item}: {error}; give a path, or gs://, s3://, https:// or another "
            f"address that fsspec knows."
        ) from None
    except OSError as error:
        raise ValueError(f"--source={item} cannot be listed: {str(error)[:200]}.") from None
    files = (name for name, info in infos.items() if info["type"] == "file")
    return is_dir, [system.unstrip_protocol(name) for name in files]
