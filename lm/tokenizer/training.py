"""Training a SentencePiece model on texts; the same texts give the same bytes."""

from __future__ import annotations

import io
import os
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import tqdm

from lm import lookup
from lm.tokenizer import model
from lm.tokenizer.config import NORMALIZATIONS, TRAINED_KINDS, TokenizerConfig

NUM_THREADS = 16  # of training; constant, because the model's last bits depend on it
MAX_CHUNK_CHARS = 1000  # SentencePiece silently drops chunks longer than its maximum

MAX_NEWLINES = 8  # kept before a line
LINE = rf"[^\n]{{1,{MAX_CHUNK_CHARS}}}"
CHUNK = re.compile(rf"\n{{0,{MAX_NEWLINES}}}(?:{LINE}(?= |\n|$)|{LINE})")
DROPPED_CHARS = str.maketrans({"\0": " ", "\u2585": " "})  # training drops a chunk with one


def train(
    texts: Iterable[str],
    directory: str | os.PathLike,
    *,
    kind: str = "unigram",
    vocab_size: int = 32_000,
    num_extra_ids: int = 100,
    normalization: str = "identity",
    character_coverage: float = 0.9995,
    max_chunks: int = 2_000_000,
) -> model.Tokenizer:
    """Train a SentencePiece model on `texts` and write it; the same texts give the same bytes.

    Args:
      directory: gets tokenizer.model and tokenizer.json, each written atomically.
      kind: a key of TRAINED_KINDS.
      vocab_size: ids of the model, including 3 special ones and 256 bytes.
      num_extra_ids: sentinel ids above them.
      normalization: a key of NORMALIZATIONS.
      character_coverage: the share of characters that get a piece; the rest is encoded as bytes.
      max_chunks: lines to train on, of at most MAX_CHUNK_CHARS characters (about 1 kB of memory
        each); more are sampled uniformly.
    Raises ValueError if the texts are too few for `vocab_size`, or `vocab_size` is too small.
    Source: Kudo 2018, arXiv:1804.10959 (unigram); Sennrich et al. 2016, arXiv:1508.07909 (bpe);
    Kudo and Richardson 2018, arXiv:1808.06226 (SentencePiece).
    """
    lookup.lookup(TRAINED_KINDS, kind, "tokenizer.kind")
    TokenizerConfig("", kind, vocab_size, num_extra_ids, normalization, character_coverage)
    # Read all texts before SentencePiece starts, which would turn an error of their source, or the
    # user's interrupt, into a RuntimeError.
    texts = tqdm.tqdm(texts, desc="reading texts", unit="text", disable=None)
    chunks = reservoir_sample((c for text in texts for c in split_chunks(text)), max_chunks)
    started = time.monotonic()
    print(f"fitting {vocab_size:,} pieces to {len(chunks):,} lines", file=sys.stderr, flush=True)
    options = NORMALIZATIONS[normalization] | {"character_coverage": character_coverage}
    proto = _fit_model(chunks, vocab_size, model_type=kind, **options)
    print(f"fitted in {time.monotonic() - started:,.0f} s", file=sys.stderr, flush=True)

    metadata = {
        "kind": kind,
        "pieces": vocab_size,
        "num_sentinels": num_extra_ids,
        "normalization": normalization,
        "training": {
            "character_coverage": character_coverage,
            "characters": sum(map(len, chunks)),
            "lines": len(chunks),
            "num_threads": NUM_THREADS,
        },
    }
    return model.write(directory, proto, metadata)


def split_chunks(text: str) -> Iterator[str]:
    """The lines of a text, each with the newlines before it, cut at spaces to MAX_CHUNK_CHARS."""
    text = model.SURROGATES.sub("\ufffd", text).translate(DROPPED_CHARS)
    return (chunk for chunk in CHUNK.findall(text) if not chunk.isspace())


def reservoir_sample(items: Iterable[str], count: int) -> list[str]:
    """A uniform sample of `count` items, always the same; all items if there are fewer.

    SentencePiece can sample too, but differently in every process.
    Source: Vitter 1985, algorithm R.
    """
    sample, generator = [], random.Random(0)
    for num_seen, item in enumerate(items):
        if num_seen < count:
            sample.append(item)
        elif (index := generator.randrange(num_seen + 1)) < count:
            sample[index] = item
    return sample


def _fit_model(chunks: list[str], vocab_size: int, **options: Any) -> bytes:
    """Train on chunks, with options of SentencePiece, and return the serialized model.

    Raises ValueError if `vocab_size` does not suit the chunks.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    if not chunks:
        raise ValueError("the texts are empty, with no line to learn pieces from; give more text.")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=writer,
            vocab_size=vocab_size,
            pad_id=model.PAD,
            eos_id=model.EOS,
            unk_id=model.UNK,
            bos_id=-1,
            byte_fallback=True,
            add_dummy_prefix=False,
            # SentencePiece skips texts that contain the name of a special piece, such as "<unk>".
            **{f"{role}_piece": f"\ue000{role}" for role in ("pad", "eos", "unk")},
            required_chars="▁\n",  # a corpus without a space would encode ▁ as bytes
            max_sentence_length=4 * (MAX_CHUNK_CHARS + MAX_NEWLINES),  # bytes
            num_threads=NUM_THREADS,
            minloglevel=2,  # errors only
            **options,
        )
    except RuntimeError as error:
        raise ValueError(_explain_vocab_size_error(str(error), vocab_size)) from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(writer.getvalue())
    for role in ("pad", "eos", "unk"):
        proto.trainer_spec.ClearField(f"{role}_piece")  # back to <pad>, </s>, <unk>
        piece = proto.pieces[getattr(proto.trainer_spec, f"{role}_id")]
        piece.piece = getattr(proto.trainer_spec, f"{role}_piece")
    return proto.SerializeToString()


def _explain_vocab_size_error(error: str, vocab_size: int) -> str:
    """Rewrite SentencePiece's error about the vocabulary size as one sentence with the fix."""
    if match := re.search(r"too high .* <= (\d+)", error):
        return (
            f"tokenizer.vocab_size={vocab_size} is more than these texts support, {match[1]}; use "
            f"more text, or --config.tokenizer.vocab_size={match[1]}."
        )
    if match := re.search(r"required_chars. \d+ vs (\d+)", error):
        return (
            f"tokenizer.vocab_size={vocab_size} cannot hold the bytes and characters of these "
            f"texts, {match[1]}; use --config.tokenizer.vocab_size={match[1]} or more, or a lower "
            f"tokenizer.character_coverage."
        )
    return f"SentencePiece refused tokenizer.vocab_size={vocab_size} ({error}); use 1000 or more."
