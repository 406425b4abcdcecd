"""Readers of text: TFDS datasets, and files of every supported kind, Wikipedia dumps included.

random_access  the records of a task's split by index, from TFDS or from JSONL and TSV files
tfds           TFDS datasets stored as ArrayRecord, read without TensorFlow
source_files   a source string -> its files and TFDS splits -> raw records -> documents
formats        how each kind of file is read
documents      the record types, and the decoding of bytes to text
wikipedia      an XML dump -> pages -> the prose of articles
wikitext       MediaWiki's markup -> prose
wiki_names     per-language names of templates, sections and switches
pydocs         the embedded dataset: the docstrings of the installed Python packages
"""

from __future__ import annotations

from lm.sources.documents import BadRecord, Document
from lm.sources.random_access import iter_records, records, resolve_splits, source_fingerprint
from lm.sources.source_files import SourceFile, check_first_records, list_files, skipped_files
from lm.sources.tfds import (
    DEFAULT_HELDOUT,
    EMBEDDED_DATASETS,
    data_root,
    resolve_tfds_splits,
    tfds_fingerprint,
    tfds_records,
    tfds_splits,
)
