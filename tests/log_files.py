"""A clock that a test sets, and a reader of TFRecord files."""

from __future__ import annotations


class Clock:
    """A clock that the test advances."""

    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def records(path):
    """The payloads of a TFRecord file: length (8 bytes), checksum (4), payload, checksum (4)."""
    data, offset = path.read_bytes(), 0
    while offset < len(data):
        length = int.from_bytes(data[offset : offset + 8], "little")
        yield data[offset + 12 : offset + 12 + length]
        offset += 16 + length
