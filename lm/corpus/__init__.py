"""Corpora as token shards: written whole or not at all, read at any place and any length."""

from lm.corpus.encoding import Form, prepare
from lm.corpus.finished import check_tokenizer, find, tokenizer_of
from lm.corpus.shards import (
    COUNTS,
    MANIFEST,
    Damaged,
    Pairs,
    Records,
    Stream,
    Written,
    beside,
    facts_of,
    files_of,
    finish,
    read_manifest,
    record_writer,
    write_pairs,
    write_text,
)

__all__ = [
    "COUNTS",
    "MANIFEST",
    "Damaged",
    "Form",
    "Pairs",
    "Records",
    "Stream",
    "Written",
    "beside",
    "check_tokenizer",
    "facts_of",
    "files_of",
    "find",
    "finish",
    "prepare",
    "read_manifest",
    "record_writer",
    "tokenizer_of",
    "write_pairs",
    "write_text",
]
