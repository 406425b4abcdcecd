"""Token shards: the stored form of text and of pairs, read at any position.

files            ArrayRecord files and their manifest: write, verify, read
encoding         records of a task to token shards, by several processes
finished_corpus  a corpus built by `python -m lm corpus`, as training data
processes        ordered work by several processes in bounded memory
"""

from lm.shards.encoding import Form, prepare
from lm.shards.finished_corpus import check_tokenizer, find, tokenizer_of
from lm.shards.shard_files import (
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
