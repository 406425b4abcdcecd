"""How each kind of file is read: raw records front to back, and the document of one of them.

Compressed files are read through Arrow, which reports a file that was cut short or damaged, and
reads archives of several streams to their end.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any

from lm import lookup
from lm.sources import documents, tfds

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
CHUNK_BYTES = 1 << 20  # bytes that are read at once
PARQUET_BATCH_ROWS = 64  # of a Parquet file, held at once


def open_stored(name: str):
    """The file at a path or address as it is stored, a context that gives a binary stream."""
    if "://" not in name:
        return open(name, "rb")
    import fsspec

    return fsspec.open(name, "rb", compression=None)


@contextlib.contextmanager
def open_decompressed(name: str) -> Iterator[Any]:
    """The file at a path or address without its compression, as a buffered binary stream."""
    codec = next((codec for suffix, codec in CODECS.items() if name.lower().endswith(suffix)), "")
    with open_stored(name) as file:
        if not codec:  # fsspec's own readline takes no limit
            yield file if "://" not in name else io.BufferedReader(file, CHUNK_BYTES)
            return
        import pyarrow

        if not file.read(1):
            raise EOFError(f"it is empty, which no {codec} file is")
        file.seek(0)
        inner = pyarrow.PythonFile(file, mode="r")
        with pyarrow.CompressedInputStream(inner, codec) as stream:
            yield io.BufferedReader(stream, CHUNK_BYTES)


def iter_lines(stream) -> Iterator[bytes | dict]:
    """The lines of a stream without their ends, holding no more than LIMIT bytes."""
    while line := stream.readline(documents.MAX_RECORD_BYTES + 2):
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(text) <= documents.MAX_RECORD_BYTES:
            yield text
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(CHUNK_BYTES)
        yield documents.oversized_record(text)


def read_text(part) -> Iterator[bytes | dict]:
    """A text file's raw records, by part.unit: the file, its paragraphs or its lines."""
    with open_decompressed(part.name) as stream:
        yield from lookup.lookup(UNITS, part.unit, "--unit")(stream)


def _read_whole(stream) -> Iterator[bytes | dict]:
    text = stream.read(documents.MAX_RECORD_BYTES + 1)
    yield text if len(text) <= documents.MAX_RECORD_BYTES else documents.oversized_record(text)


def _iter_paragraphs(stream) -> Iterator[bytes | dict]:
    held, size = [], 0
    for line in iter_lines(stream):
        if isinstance(line, dict) or line.strip():
            size += documents.MAX_RECORD_BYTES + 1 if isinstance(line, dict) else len(line) + 1
            if size <= documents.MAX_RECORD_BYTES + 1 or not held:
                held.append(line)
        elif held:
            yield _join_paragraph(held, size)
            held, size = [], 0
    if held:
        yield _join_paragraph(held, size)


def _join_paragraph(held: list, size: int) -> bytes | dict:
    if isinstance(held[0], dict):
        return held[0]
    text = b"\n".join(held)
    return text if size <= documents.MAX_RECORD_BYTES + 1 else documents.oversized_record(text)


UNITS = {"file": _read_whole, "paragraph": _iter_paragraphs, "line": iter_lines}


def parse_text(part, raw: bytes) -> documents.Document:
    """The document of a file, paragraph or line."""
    return documents.to_document(raw)


def read_json_lines(part) -> Iterator[bytes | dict]:
    """The lines of a file of JSON objects; the first one must have the column."""
    first = True
    with open_decompressed(part.name) as stream:
        for line in iter_lines(stream):
            if first and isinstance(line, bytes) and line.strip():
                first = False
                with contextlib.suppress(documents.BadRecord):
                    _check_column(part, parse_json_object(line))
            yield line


def parse_json(part, raw: bytes) -> documents.Document:
    """The document in the column of a JSON object; an empty line is an empty document."""
    if not raw.strip():
        return documents.Document("", "empty")
    record = parse_json_object(raw)
    if part.column not in record:
        raise documents.BadRecord(f"no column {part.column!r}")
    return documents.to_document(record[part.column])


def parse_json_object(raw: bytes) -> dict:
    """The JSON object of a line of UTF-8. Raises BadRecord for anything else."""
    text = documents.decode_utf8(raw).removeprefix("\ufeff")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise documents.BadRecord(f"invalid JSON: {error}") from None
    if not isinstance(record, dict):
        raise documents.BadRecord(f"the JSON is {type(record).__name__}, not an object")
    return record


def _check_column(part, columns) -> None:
    if part.column not in columns:
        raise ValueError(
            f"{part.name} has no column {part.column!r}; name with --column one of "
            f"{', '.join(columns)}{lookup.nearest(part.column, columns) or '.'}"
        )


def read_tsv(part) -> Iterator[bytes | dict]:
    """The rows below the header of a tab-separated file, whose fields hold no tab and no newline.

    Source: the media type text/tab-separated-values, iana.org: there is no quoting.
    """
    with open_decompressed(part.name) as stream:
        rows = iter_lines(stream)
        header = next(rows, {"unreadable": "missing"})
        if isinstance(header, dict):
            raise ValueError(
                f"{part.name} has no header: its first line is {header['unreadable']}; write the "
                f"names of the columns there, with tabs between."
            )
        columns = documents.decode_utf8(header).removeprefix("\ufeff").split("\t")
        _check_column(part, columns)
        if columns.count(part.column) > 1:
            raise ValueError(
                f"{part.name} has {columns.count(part.column)} columns {part.column!r}; give each "
                f"a name of its own."
            )
        at = {"at": columns.index(part.column), "fields": len(columns)}
        for row in rows:
            yield row if isinstance(row, dict) else {"row": row, **at}


def parse_tsv_row(part, raw: dict) -> documents.Document:
    """The document in the column of a row; an empty row is an empty document."""
    if not raw["row"].strip():
        return documents.Document("", "empty")
    fields = raw["row"].split(b"\t")
    if len(fields) != raw["fields"]:
        raise documents.BadRecord(f"{len(fields)} fields where the header has {raw['fields']}")
    return documents.to_document(fields[raw["at"]])


def read_parquet(part) -> Iterator[dict]:
    """The values of a Parquet file's column, which is the only one read, as UTF-8."""
    import pyarrow
    import pyarrow.parquet

    with open_stored(part.name) as file:
        try:
            table = pyarrow.parquet.ParquetFile(
                file, buffer_size=CHUNK_BYTES, page_checksum_verification=True
            )
            schema = table.schema_arrow
            _check_column(part, schema.names)
            kind = schema.field(part.column).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if str(kind).removeprefix("large_").removesuffix("_view") not in ("string", "binary"):
                raise ValueError(
                    f"column {part.column!r} of {part.name} is {kind}, not string; "
                    f"name another of {', '.join(schema.names)} with --column."
                )
            for rows in table.iter_batches(PARQUET_BATCH_ROWS, columns=[part.column]):
                # As bytes: strings that are not UTF-8 are told from others below, not here.
                for value in rows.column(0).cast(kind).cast(pyarrow.large_binary()):
                    text = value.as_py()
                    long = text is not None and len(text) > documents.MAX_RECORD_BYTES
                    yield documents.oversized_record(text) if long else {"value": text}
        except pyarrow.ArrowException as error:
            raise OSError(str(error)) from None


def read_array_record(part) -> Iterator[bytes | dict]:
    """The records of a local ArrayRecord file."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(part.name, "max_parallelism:0")
    try:
        for _ in range(reader.num_records()):
            record = reader.read()
            yield (
                record
                if len(record) <= documents.MAX_RECORD_BYTES
                else documents.oversized_record(record)
            )
    finally:
        reader.close()  # raises for a file that was cut short, which has shown no record


def parse_array_record(part, raw: bytes) -> documents.Document:
    """The document of an ArrayRecord: UTF-8 text, or where a column is named, a JSON object."""
    return parse_json(part, raw) if part.column else documents.to_document(raw)


def read_tfds(part) -> Iterator[dict]:
    """The values of a TFDS split's column, as stored."""
    source = tfds.tfds_records(*tfds.split_address(part.name), part.data_dir).source
    _check_column(part, source[0])
    for index in range(len(source)):
        value = source[index][part.column]
        long = isinstance(value, bytes) and len(value) > documents.MAX_RECORD_BYTES
        yield documents.oversized_record(value) if long else {"value": value}


def parse_value(part, raw: dict) -> documents.Document:
    """The document of a row of which only the value of the column is kept."""
    if raw["value"] is None:
        raise documents.BadRecord(f"column {part.column!r} is null")
    return documents.to_document(raw["value"])
