"""Where text comes from: TFDS datasets, and files of every kind, the Wikipedia dump among them.

tfds: datasets stored as ArrayRecord. rows: records with columns, by number, of TFDS or of files.
parts: a source in words, to its files and splits, to raw records, to documents; formats: how each
kind of file is read; documents: bytes to text; wikipedia, wikitext: a dump to prose. places,
buckets: where the files of every run lie, on a disk or in a bucket; what a user writes becomes a
path by places.place.
"""

from __future__ import annotations

from lm.sources.documents import MAX_RECORD_BYTES, BadRecord, Document
from lm.sources.random_access import iter_records, records, resolve_splits, source_fingerprint
from lm.sources.source_files import (
    KINDS,
    SourceFile,
    check_first_records,
    list_files,
    skipped_files,
)
from lm.sources.tfds import (
    DEFAULT_HELDOUT,
    EMBEDDED_DATASETS,
    FORMAT,
    TfdsRecords,
    data_root,
    resolve_tfds_splits,
    tfds_bytes,
    tfds_fingerprint,
    tfds_records,
    tfds_splits,
)
