"""Records and documents: the limit on a record's size, and the decoding of bytes to text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

MAX_RECORD_BYTES = 1 << 24  # a longer raw record is not kept in memory
EXCERPT_BYTES = 200  # kept of a record that is too long


class BadRecord(ValueError):
    """A record that cannot be read; the message is the reason, to be counted and logged."""


class Document(NamedTuple):
    """The text of a record, or the reason why it is dropped."""

    text: str
    drop_reason: str = ""  # "empty", "redirect", ..; the text is "" then


@dataclasses.dataclass(frozen=True)
class Records:
    """The records of a split as a sequence: stored[i] is parsed when [i] is read."""

    source: str
    split: str
    stored: Sequence = dataclasses.field(repr=False)
    parse: Callable[[Any], dict[str, Any]] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.parse(self.stored[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def oversized_record(start: bytes) -> dict[str, Any]:
    """The placeholder for a raw record of more than MAX_RECORD_BYTES that begins with `start`."""
    reason = f"longer than {MAX_RECORD_BYTES:,} bytes"
    return {"unreadable": reason, "excerpt": bytes(start[:EXCERPT_BYTES])}


def limit_size(data: Any, record: Any = None) -> Any:
    """`record`, by default the data itself, or a placeholder if the data is too long."""
    if isinstance(data, bytes) and len(data) > MAX_RECORD_BYTES:
        return oversized_record(data)
    return data if record is None else record


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8. Raises BadRecord with the position of the first invalid byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"invalid UTF-8 at byte {error.start}") from None


def to_document(value: Any) -> Document:
    """The document of a text, given as str or as UTF-8 bytes.

    Removes a leading byte order mark and turns every line end into "\\n". A text of nothing but
    white space is dropped as "empty".
    Raises BadRecord for another type, a NUL character or an unpaired surrogate.
    """
    if isinstance(value, bytes):
        value = decode_utf8(value)
    if not isinstance(value, str):
        raise BadRecord(f"the value is {type(value).__name__}, not text")
    text = value.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise BadRecord(f"NUL at character {text.index(chr(0))}: binary, or not UTF-8")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"half of a surrogate pair at character {error.start}") from None
    return Document(text) if text.strip() else Document("", "empty")
