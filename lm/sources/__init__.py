"""Where text comes from: TFDS datasets, and files of every kind, the Wikipedia dump among them.

tfds: datasets stored as ArrayRecord. rows: records with columns, by number, of TFDS or of files.
parts: a source in words, to its files and splits, to raw records, to documents; formats: how each
kind of file is read; documents: bytes to text; wikipedia, wikitext: a dump to prose. places,
buckets: where the files of every run lie, on a disk or in a bucket; what a user writes becomes a
path by places.place.
"""

from __future__ import annotations

from lm.sources.documents import LIMIT, BadRecord, Document
from lm.sources.parts import KINDS, Part, check_starts, parts_of, unread
from lm.sources.random_access import records, source_fingerprint, splits_held_out, stream
from lm.sources.tfds import (
    DEFAULT_HELDOUT,
    EMBEDDED,
    FORMAT,
    TfdsRecords,
    data_root,
    fingerprint,
    held_out,
    tfds_bytes,
    tfds_records,
    tfds_splits,
)
