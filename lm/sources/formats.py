"""Readers of each kind of file: raw records front to back, and the document of a raw record.

A `read_*` function takes a source_files.SourceFile and yields raw records; a `parse_*` function
takes the SourceFile and one raw record and returns its Document. Compressed files are read through
Arrow, which detects truncation and damage and reads archives of several streams to their end.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from lm import lookup
from lm.sources import documents, tfds

if TYPE_CHECKING:
    from lm.sources.source_files import SourceFile

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
CHUNK_BYTES = 1 << 20  # read at once
PARQUET_BATCH_ROWS = 64


def open_stored(name: str):
    """Open a path or address as stored, without decompression: a context of a binary stream."""
    if "://" not in name:
        return open(name, "rb")
    import fsspec

    return fsspec.open(name, "rb", compression=None)


@contextlib.contextmanager
def open_decompressed(name: str) -> Iterator[BinaryIO]:
    """Open a path or address, decompressed by its suffix, as a buffered binary stream."""
    codec = next((codec for suffix, codec in CODECS.items() if name.lower().endswith(suffix)), "")
    with open_stored(name) as file:
        if not codec:  # fsspec's own readline does not take a limit
            yield file if "://" not in name else io.BufferedReader(file, CHUNK_BYTES)
            return
        import pyarrow

        if not file.read(1):
            raise EOFError(f"it is empty, which is no valid {codec} file")
        file.seek(0)
        with pyarrow.input_stream(file, compression=codec) as stream:
            yield io.BufferedReader(stream, CHUNK_BYTES)


def iter_lines(stream: BinaryIO) -> Iterator[bytes | dict]:
    """The lines of a stream without their ends, with at most MAX_RECORD_BYTES in memory."""
    while line := stream.readline(documents.MAX_RECORD_BYTES + 2):
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        while len(text) > documents.MAX_RECORD_BYTES and line and not line.endswith(b"\n"):
            line = stream.readline(CHUNK_BYTES)
        yield documents.limit_size(text)


def read_text(file: SourceFile) -> Iterator[bytes | dict]:
    """The raw records of a text file by file.unit: the whole file, its paragraphs or its lines."""
    with open_decompressed(file.name) as stream:
        yield from UNITS[file.unit](stream)


def _read_whole(stream) -> Iterator[bytes | dict]:
    yield documents.limit_size(stream.read(documents.MAX_RECORD_BYTES + 1))


def _iter_paragraphs(stream) -> Iterator[bytes | dict]:
    is_blank = lambda line: isinstance(line, bytes) and not line.strip()
    for blank, lines in itertools.groupby(iter_lines(stream), is_blank):
        if blank:
            continue
        paragraph, size = [], -1
        for line in lines:
            size += 1 + (len(line) if isinstance(line, bytes) else documents.MAX_RECORD_BYTES + 1)
            if size > documents.MAX_RECORD_BYTES:
                yield documents.oversized_record(b"\n".join(paragraph)) if paragraph else line
                break  # groupby skips the rest
            paragraph.append(line)
        else:
            yield b"\n".join(paragraph)


UNITS = {"file": _read_whole, "paragraph": _iter_paragraphs, "line": iter_lines}


def read_json_lines(file: SourceFile) -> Iterator[bytes | dict]:
    """The lines of a JSONL file. Raises ValueError if the first object lacks the column."""
    checked = False
    with open_decompressed(file.name) as stream:
        for line in iter_lines(stream):
            if not checked and isinstance(line, bytes) and line.strip():
                checked = True
                with contextlib.suppress(documents.BadRecord):
                    _check_column(file, parse_json_object(line))
            yield line


def parse_json(file: SourceFile, raw: bytes) -> documents.Document:
    """The document in the column of a JSON object; an empty line is an empty document."""
    if not raw.strip():
        return documents.Document("", "empty")
    record = parse_json_object(raw)
    if file.column not in record:
        raise documents.BadRecord(f"no column {file.column!r}")
    return documents.to_document(record[file.column])


def parse_json_object(raw: bytes) -> dict:
    """The JSON object in a line of UTF-8. Raises BadRecord for anything else."""
    text = documents.decode_utf8(raw).removeprefix("\ufeff")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise documents.BadRecord(f"invalid JSON: {error}") from None
    if not isinstance(record, dict):
        raise documents.BadRecord(f"the JSON is {type(record).__name__}, not an object")
    return record


def _check_column(file: SourceFile, columns: Iterable[str]) -> None:
    if file.column not in columns:
        raise ValueError(
            f"{file.name} has no column {file.column!r}; name with --column one of "
            f"{', '.join(columns)}{lookup.nearest(file.column, columns) or '.'}"
        )


def parse_tsv_header(name: str, header: bytes, column: str = "") -> list[str]:
    """The column names in the first line of a TSV file.

    Raises ValueError if `column`, or without it any column, is named more than once.
    """
    columns = documents.decode_utf8(header).removeprefix("\ufeff").split("\t")
    for checked in [column] if column else columns:
        if columns.count(checked) > 1:
            raise ValueError(
                f"{name} has the column {checked!r} more than once in its header; rename one."
            )
    return columns


def read_tsv(file: SourceFile) -> Iterator[bytes | dict]:
    """The rows below the header of a tab-separated file; fields hold no tab and no newline.

    Source: the media type text/tab-separated-values, iana.org: there is no quoting.
    """
    with open_decompressed(file.name) as stream:
        rows = iter_lines(stream)
        header = next(rows, {"unreadable": "missing"})
        if isinstance(header, dict):
            raise ValueError(
                f"{file.name} has no header: its first line is {header['unreadable']}; write the "
                f"names of the columns there, separated by tabs."
            )
        columns = parse_tsv_header(file.name, header, file.column)
        _check_column(file, columns)
        schema = {"column_index": columns.index(file.column), "num_columns": len(columns)}
        for row in rows:
            yield row if isinstance(row, dict) else {"row": row, **schema}


def parse_tsv_row(file: SourceFile, raw: dict) -> documents.Document:
    """The document in the column of a row; an empty row is an empty document."""
    if not raw["row"].strip():
        return documents.Document("", "empty")
    fields = raw["row"].split(b"\t")
    if len(fields) != raw["num_columns"]:
        raise documents.BadRecord(f"{len(fields)} fields where the header has {raw['num_columns']}")
    return documents.to_document(fields[raw["column_index"]])


def read_parquet(file: SourceFile) -> Iterator[dict]:
    """The values of a Parquet file's text column as UTF-8; no other column is read."""
    import pyarrow
    import pyarrow.parquet

    with open_stored(file.name) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(
                stream, buffer_size=CHUNK_BYTES, page_checksum_verification=True
            )
            schema = table.schema_arrow
            _check_column(file, schema.names)
            kind = schema.field(file.column).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if str(kind).removeprefix("large_").removesuffix("_view") not in ("string", "binary"):
                raise ValueError(
                    f"column {file.column!r} of {file.name} is {kind}, not string; "
                    f"name another of {', '.join(schema.names)} with --column."
                )
            for rows in table.iter_batches(PARQUET_BATCH_ROWS, columns=[file.column]):
                # As bytes: invalid UTF-8 must fail one record in parse_value, not the file here.
                for value in rows.column(0).cast(kind).cast(pyarrow.large_binary()):
                    value = value.as_py()
                    yield documents.limit_size(value, {"value": value})
        except pyarrow.ArrowException as error:
            raise OSError(str(error)) from None


def read_array_record(file: SourceFile) -> Iterator[bytes | dict]:
    """The records of a local ArrayRecord file."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(file.name, "max_parallelism:0")
    try:
        for _ in range(reader.num_records()):
            yield documents.limit_size(reader.read())
    finally:
        reader.close()  # raises for a truncated file, whose num_records is 0


def parse_array_record(file: SourceFile, raw: bytes) -> documents.Document:
    """The document of an ArrayRecord: UTF-8 text, or a JSON object if a column is named."""
    return parse_json(file, raw) if file.column else documents.to_document(raw)


def read_tfds(file: SourceFile) -> Iterator[dict]:
    """The values of a TFDS split's text column, as stored."""
    stored = tfds.tfds_records(*tfds.split_address(file.name), file.data_dir).stored
    _check_column(file, stored[0])
    values = (stored[index][file.column] for index in range(len(stored)))
    return (documents.limit_size(value, {"value": value}) for value in values)


def parse_value(file: SourceFile, raw: dict) -> documents.Document:
    """The document of a row of which only the text column was read."""
    if raw["value"] is None:
        raise documents.BadRecord(f"column {file.column!r} is null")
    return documents.to_document(raw["value"])
