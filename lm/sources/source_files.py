"""A source in words, to its parts: files and TFDS splits, each read front to back on its own."""

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
    """How the parts of a kind are read."""

    raw: Callable[[SourceFile], Iterator]
    document: Callable[[SourceFile, Any], documents.Document]
    suffix: str = ""  # of its files, as a regular expression
    packed: bool = False  # may .gz, .bz2 or .zst follow?
    column: str = ""  # where the text is unless told; "" is a kind without columns


KINDS = {
    "text": FileKind(formats.read_text, formats.parse_text, r"\.txt", packed=True),
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
        wikipedia.read_pages, wikipedia.parse_page, r"\.xml(-p\d+p\d+)?", packed=True
    ),
    "tfds": FileKind(formats.read_tfds, formats.parse_value, column="text"),
}
OPTIONAL_COLUMN_KINDS = {"array_record"}  # kinds with a column only where one is named
SUFFIXES = (
    ".txt, .jsonl, .ndjson, .tsv and .xml, each also with .gz, .bz2 or .zst after it, .json.gz, "
    ".parquet, .array_record; a file of one JSON object a line is .jsonl"
)
SHARD = r"(-\d+-of-\d+)?"  # as in c4-train.json-00000-of-01024.gz
INDEX = re.compile(r"-multistream-index\d*\.txt")  # beside a dump of Wikipedia


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file or one TFDS split: small, picklable, opens what it reads by itself.

    name: path, address, or tfds:name@split. kind: a key of KINDS. column: where the text is, of
    kinds that have columns. unit: what is a document in a text file: file, paragraph or line.
    data_dir: of a TFDS split, as in tfds_splits.
    """

    name: str
    kind: str
    column: str = ""
    unit: str = "file"
    data_dir: str = ""

    def __post_init__(self):
        kind = lookup.lookup(KINDS, self.kind, "the kind of a source")
        lookup.lookup(formats.UNITS, self.unit, "--unit")
        if self.kind not in OPTIONAL_COLUMN_KINDS and not self.column:
            object.__setattr__(self, "column", kind.column)
        if self.kind == "array_record" and "://" in self.name:
            raise ValueError(f"{self.name}: ArrayRecord is read from local files; copy it here.")

    def size(self) -> int:
        """Bytes as stored; of a slice of a TFDS split, its share of them."""
        if self.kind == "tfds":
            return tfds.tfds_bytes(*tfds.split_address(self.name), self.data_dir)
        with formats.open_stored(self.name) as file:
            return file.seek(0, os.SEEK_END)

    def digest(self) -> str:
        """The sha256 of the bytes as stored; of TFDS, of what the dataset says of itself."""
        if self.kind == "tfds":
            return tfds.tfds_fingerprint(tfds.split_address(self.name)[0], self.data_dir)
        with formats.open_stored(self.name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def raw_records(self) -> Iterator[bytes | dict]:
        """Raw records front to back, in constant memory: what `document` takes, and bare of work.

        The number of a record in this order is its position. A record that is too long comes as
        what is known of it, {"unreadable": reason, "excerpt": bytes}.
        Raises ValueError, with the position, for a file that is damaged, cut short, or of another
        form, and for a column that the first record does not have.
        """
        number = 0
        try:
            for record in KINDS[self.kind].raw(self):
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
        """The document of a raw record: a pure function, and the costly part of reading.

        Raises BadRecord with the reason for a record that cannot be read.
        """
        if isinstance(raw, dict) and "unreadable" in raw:
            raise documents.BadRecord(raw["unreadable"])
        return KINDS[self.kind].document(self, raw)


def list_files(
    source: str, *, column: str = "", unit: str = "file", data_dir: str = ""
) -> list[SourceFile]:
    """The parts of a source, each once: in the order of the source, and of names within an item.

    source: items with commas between: a path; a folder, for all files below it whose suffix is
    known, hidden ones left out; a glob, ** too; each of these also with a scheme, as gs://;
    tfds:name[/config][:version], with @split where it is not train. column, unit, data_dir: as in
    Part.
    Raises ValueError for an item without a file, and for what no part has a use for.
    """
    found = {}
    for item in filter(None, (item.strip() for item in source.split(","))):
        if item.startswith("tfds:"):
            if item == "tfds:":
                raise ValueError("--source=tfds: names no dataset; give it as tfds:name@split.")
            name, split = tfds.split_address(item)
            tfds.tfds_records(name, split, data_dir)
            part = SourceFile(f"tfds:{name}@{split}", "tfds", column, data_dir=data_dir)
            found.setdefault(part.name, part)
            continue
        for name in _readable_files(item):
            kind = _kind_of(name)
            part = SourceFile(
                name,
                kind,
                column if KINDS[kind].column or kind in OPTIONAL_COLUMN_KINDS else "",
                unit,
            )
            found.setdefault(name if "://" in name else os.path.realpath(name), part)
    parts = list(found.values())
    if not parts:
        raise ValueError("--source is empty; name files, a folder, a glob or tfds:name.")
    if column and not any(part.column for part in parts):
        raise ValueError(f"--column={column!r}: no file of {source} has columns; leave it out.")
    if unit != "file" and not any(part.kind == "text" for part in parts):
        raise ValueError(f"--unit={unit!r}: no file of {source} is plain text; leave it out.")
    return parts


def skipped_files(source: str) -> list[str]:
    """The files in the folders of a source that parts_of passes over: their suffix is not known."""
    items = filter(None, (item.strip() for item in source.split(",")))
    found = [_match(item) for item in items if not item.startswith("tfds:")]
    return sorted(name for folder, names in found if folder for name in names if not _kind_of(name))


def check_first_records(parts: list[SourceFile]) -> None:
    """Read the first record of each part but of plain text: a wrong column is found at once.

    Raises ValueError as raw() does.
    """
    for part in parts:
        if part.kind != "text":
            records = part.raw_records()
            next(records, None)
            records.close()


def _kind_of(name: str) -> str:
    """The kind of a file by its suffix, "" for none; the index of a dump is no text."""
    if INDEX.search(name):
        return ""
    for kind, how in KINDS.items():
        packed = r"(\.gz|\.bz2|\.zst)?" if how.packed else ""
        if how.suffix and re.search(how.suffix + SHARD + packed + "$", name, re.IGNORECASE):
            return kind
    return ""


def _readable_files(item: str) -> list[str]:
    """The files that an item of a source means, sorted."""
    folder, names = _match(item)
    known = [name for name in names if _kind_of(name)]
    if not names:
        path = pathlib.Path(item)
        beside = path.parent.iterdir() if path.parent.is_dir() else []
        beside = [other.name for other in beside if other.exists()]  # no link to nowhere
        hint = lookup.nearest(path.name, beside) or "."
        raise ValueError(f"--source={item}: there is no such file, folder or match{hint}")
    if not known or (len(known) < len(names) and not folder):
        odd = next(name for name in names if not _kind_of(name))
        raise ValueError(f"--source={item}: {odd} has none of the suffixes read here: {SUFFIXES}.")
    return sorted(known)


def _match(item: str) -> tuple[bool, list[str]]:
    """(is it a folder?, the files that it is, holds or matches)."""
    if "://" in item:
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(item)
            folder = system.isdir(path)
            there = system.find(path, detail=True) if folder else system.glob(path, detail=True)
        except ImportError as error:
            raise ValueError(f"--source={item}: {error}, with pip install.") from None
        except ValueError as error:
            raise ValueError(
                f"--source={item}: {error}; give a path, or gs://, s3://, https:// or another "
                f"address that fsspec knows."
            ) from None
        except OSError as error:
            raise ValueError(f"--source={item} cannot be listed: {str(error)[:200]}.") from None
        files = (name for name, info in there.items() if info["type"] == "file")
        return folder, [system.unstrip_protocol(name) for name in files]
    path = pathlib.Path(item).expanduser()
    if path.is_dir():
        below = (file for file in path.rglob("*") if file.is_file())
        return True, [str(f) for f in below if not _is_hidden(f.relative_to(path))]
    names = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)
    return False, [name for name in names if os.path.isfile(name)]


def _is_hidden(path: pathlib.PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)
