"""Token shards: the stored form of text and of pairs, read at any position.

files            ArrayRecord files and their manifest: write, verify, read
encoding         records of a task to token shards, by several processes
finished_corpus  a corpus built by `python -m lm corpus`, as training data
processes        ordered work by several processes in bounded memory
"""

from lm.shards.encoding import PairLengths, prepare
from lm.shards.finished_corpus import check_tokenizer, corpus_tokenizer_dir, read_split_manifest
from lm.shards.shard_files import (
    COUNTS,
    MANIFEST,
    DamagedRecord,
    Pairs,
    Records,
    Stream,
    WrittenShard,
    file_metadata,
    load_array,
    read_manifest,
    record_writer,
    shard_paths,
    write_manifest,
    write_pairs,
    write_text,
)
