"""Text to token ids and back: a SentencePiece model, or plain bytes, and the sentinels above it.

  id       0    1    2     3 .. 258         259 .. pieces - 1   pieces .. size - 1
  stands   pad  eos  unk   the 256 bytes    learnt pieces       sentinels: the last is sentinel 0

Three numbers, never to be confused: `pieces`, `size` = pieces + num_sentinels, and `rows` of the
embedding, padded_rows(size). For T5 they are 32000, 32100 and 32128.

Nothing is lost: what has no piece of its own is spelt in bytes, and under normalization="identity"
newlines, runs of spaces and braces survive. No space is put before a text (T5's pieces have one),
so that the pieces stand for the bytes of the text and for nothing else; bits per byte are exact.
A piece holds newlines at its start or not at all, so that no word is glued to the end of a line.

That is what `train` makes. A Tokenizer also holds the vocabularies that other codebases trained:
those put a space before a text, lose what they have no piece for, or order their ids otherwise.

  model      the two files, and Tokenizer, which reads them
  training   texts      -> the two files
  progress   its bar
  report     any texts  -> what their tokens are like
"""

from __future__ import annotations

from lm.tokenizer.model import (
    BYTE_VOCAB_SIZE,
    EOS,
    METADATA_FILE,
    MODEL_FILE,
    PAD,
    UNK,
    Tokenizer,
    byte_model_proto,
    empty_model_proto,
    fingerprint,
    padded_rows,
    read,
    write,
    write_byte_tokenizer,
)
from lm.tokenizer.report import MAX_REPORTED_TEXTS, describe_sizes, format_stats, text_stats
from lm.tokenizer.training import (
    KINDS,
    NORMALIZATIONS,
    NUM_THREADS,
    TRAINED_KINDS,
    reservoir_sample,
    split_chunks,
    train,
)
