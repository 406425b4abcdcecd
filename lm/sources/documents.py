"""What a raw record says, and the one place where its bytes become text."""

from __future__ import annotations

from typing import Any, NamedTuple

MAX_RECORD_BYTES = 1 << 24  # bytes of a raw record; a longer one is not held in memory
EXCERPT_BYTES = 200  # bytes that are kept of a record that is too long


class BadRecord(ValueError):
    """A record that cannot be read: the reason in one clause, for whoever counts and keeps it."""


class Document(NamedTuple):
    """What a raw record says: its text, or the reading rule that drops it."""

    text: str
    drop_reason: str = ""  # "empty", "redirect", ..; the text is "" then


def oversized_record(start: bytes) -> dict[str, Any]:
    """The raw record that stands for one of more than LIMIT bytes, of which `start` is known."""
    reason = f"longer than {MAX_RECORD_BYTES:,} bytes"
    return {"unreadable": reason, "excerpt": bytes(start[:EXCERPT_BYTES])}


def decode_utf8(raw: bytes) -> str:
    """The text of bytes, which are UTF-8 and nothing else.

    Raises BadRecord with the position of the first byte that is not.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"invalid UTF-8 at byte {error.start}") from None


def to_document(value: Any) -> Document:
    """The document of a text, as str or as UTF-8.

    A byte order mark at the start goes, every end of line becomes "\\n", all else stays. A text
    of nothing but white space is dropped as "empty".
    Raises BadRecord for what is no text: another type, a NUL, half of a surrogate pair.
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
