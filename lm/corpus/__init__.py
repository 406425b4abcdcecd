"""Corpora as token shards: written whole or not at all, read at any place and any length."""

from lm.corpus.encoding import Form, prepare
from lm.corpus.finished import check_tokenizer, find, tokenizer_of
from lm.corpus.shards import (
    COUNTS,
    MANIFEST,
    Damaged,
    Pairs,
    Stream,
    Written,
    beside,
    files_of,
    finish,
    read_manifest,
    write_pairs,
    write_text,
)

__all__ = [
    "COUNTS",
    "MANIFEST",
    "Damaged",
    "Form",
    "Pairs",
    "Stream",
    "Written",
    "beside",
    "check_tokenizer",
    "files_of",
    "find",
    "finish",
    "prepare",
    "read_manifest",
    "tokenizer_of",
    "write_pairs",
    "write_text",
]
