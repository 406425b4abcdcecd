"""Text to token ids and back: a SentencePiece model or plain UTF-8 bytes, plus sentinel ids.

  id       0    1    2     3 .. 258         259 .. vocab_size - 1   vocab_size .. size - 1
  meaning  pad  eos  unk   the 256 bytes    learned pieces          sentinels, sentinel 0 last

Three sizes: `vocab_size` ids of the SentencePiece model, `size` = vocab_size + num_extra_ids, and
`rows` of the embedding = padded_rows(size). For T5 they are 32000, 32100 and 32128.

A tokenizer made by `train` is lossless: characters without a piece are encoded as bytes, and under
normalization="identity" newlines, runs of spaces and braces survive. It adds no space before a text
(T5's does), so that pieces stand for exactly the bytes of the text and bits per byte are exact.
A piece contains newlines only at its start, so that no word is joined to the end of a line.

A Tokenizer can also hold a vocabulary trained by another codebase, which may add a space before a
text, lose characters without a piece, or order its ids differently.

config     TokenizerConfig, the section tokenizer, and the kinds of tokenizers
model      the two files of a tokenizer, and the class Tokenizer that reads them
training   texts -> the two files
report     statistics of how a tokenizer encodes texts
"""

from __future__ import annotations

from lm.tokenizer.config import KINDS, STORED_NAMES, TRAINED_KINDS, TokenizerConfig
from lm.tokenizer.model import (
    BYTE_VOCAB_SIZE,
    METADATA_FILE,
    MODEL_FILE,
    Tokenizer,
    byte_model_proto,
    empty_model_proto,
    padded_rows,
    read,
    write,
    write_byte_tokenizer,
)
from lm.tokenizer.report import MAX_REPORTED_TEXTS, describe_sizes, format_stats, text_stats
from lm.tokenizer.training import reservoir_sample, split_chunks, train
