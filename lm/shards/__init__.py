"""Token shards: text and pairs as stored tokens, read at any position.

shard_files      ArrayRecord files and their manifest: write, verify, read
encoding         records of a task to token shards, by worker processes
finished_corpus  a corpus built by `python -m lm corpus`, as training data
processes        an ordered map over worker processes
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
