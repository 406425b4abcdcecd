"""Fitting a SentencePiece model to texts; the same texts give the same bytes."""

from __future__ import annotations

import io
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator

import tqdm

from lm import lookup
from lm.tokenizer import model, progress

NUM_THREADS = 16  # of training; a constant, since the model depends on it in the last bits
MAX_CHUNK_CHARS = 1000  # characters; SentencePiece silently drops what is longer than its maximum

TRAINED_KINDS = {
    "unigram": "pieces by which the texts are likely, the least useful dropped first",
    "bpe": "pieces joined of two, the most frequent pair first",
}
KINDS = TRAINED_KINDS | {"bytes": "UTF-8 bytes, as ByT5 has them; nothing is fitted"}
NORMALIZATIONS = {
    "identity": dict(
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # indentation is a few tokens, not one a space
    ),
    "nmt_nfkc": dict(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
}

CHUNK_PATTERN = re.compile(
    rf"\n{{0,8}}(?:[^\n]{{1,{MAX_CHUNK_CHARS}}}(?= |\n|$)|[^\n]{{1,{MAX_CHUNK_CHARS}}})"
)
SKIPPED_CHARS = str.maketrans({"\0": " ", "\u2585": " "})  # training drops a chunk that has one


def train(
    texts: Iterable[str],
    directory: str | os.PathLike,
    *,
    kind: str = "unigram",
    pieces: int = 32_000,
    num_sentinels: int = 100,
    normalization: str = "identity",
    character_coverage: float = 0.9995,
    max_chunks: int = 2_000_000,
) -> model.Tokenizer:
    """Fit a SentencePiece model to `texts` and write it; the same texts give the same bytes.

    kind: a key of FITTED. pieces: ids of the model, 3 special ones and 256 bytes included.
    num_sentinels: ids above them. normalization: a key of NORMALIZATIONS. character_coverage: the
    share of characters that get a piece; the rest is spelt in bytes. max_chunks: lines to learn
    from, each of at most CHUNK characters; of more, a sample in which all are equally likely
    (about 1 kB of memory each).
    Writes tokenizer.model and tokenizer.json into `directory`, each whole or not at all.
    Raises ValueError if the texts are too few for `pieces`, or `pieces` too few for the texts.
    Source: Kudo 2018, arXiv:1804.10959 (unigram); Sennrich et al. 2016, arXiv:1508.07909 (bpe);
    Kudo and Richardson 2018, arXiv:1808.06226 (SentencePiece).
    """
    lookup.lookup(TRAINED_KINDS, kind, "tokenizer.kind")
    options = lookup.lookup(NORMALIZATIONS, normalization, "tokenizer.normalization")
    for name, value, least in [("num_sentinels", num_sentinels, 0), ("max_chunks", max_chunks, 1)]:
        if value < least:
            raise ValueError(f"tokenizer.{name}={value} is below {least}; use {least} or more.")
    if not 0.98 <= character_coverage <= 1:
        raise ValueError(
            f"tokenizer.character_coverage={character_coverage} is not a share from 0.98 to 1; use "
            f"0.9995, or 0.99999 for many languages."
        )
    # Read in full before SentencePiece starts: it would turn an error of the source, and even the
    # user's interrupt, into a RuntimeError of its own.
    read = tqdm.tqdm(texts, desc="reading texts", unit="text", disable=None)
    chunks = reservoir_sample((chunk for text in read for chunk in split_chunks(text)), max_chunks)
    print(f"fitting {pieces:,} pieces to {len(chunks):,} lines", file=sys.stderr, flush=True)
    options = options | {"model_type": kind, "character_coverage": character_coverage}
    fitted = fit_model(chunks, pieces=pieces, **options)

    facts = {
        "kind": kind,
        "pieces": pieces,
        "num_sentinels": num_sentinels,
        "normalization": normalization,
        "training": {
            "character_coverage": character_coverage,
            "characters": sum(map(len, chunks)),
            "lines": len(chunks),
            "num_threads": NUM_THREADS,
        },
    }
    return model.write(directory, fitted, facts)


def split_chunks(text: str) -> Iterator[str]:
    """The lines of a text, each with the newlines before it, cut at spaces to CHUNK characters."""
    for chunk in CHUNK_PATTERN.findall(
        model.SURROGATES.sub("\ufffd", text).translate(SKIPPED_CHARS)
    ):
        if not chunk.isspace():
            yield chunk


def reservoir_sample(items: Iterable[str], count: int) -> list[str]:
    """`count` of the items, every subset equally likely and always the same; all if fewer.

    SentencePiece samples too, but otherwise in every process.
    Source: Vitter 1985, algorithm R.
    """
    kept, generator = [], random.Random(0)
    for seen, item in enumerate(items):
        if seen < count:
            kept.append(item)
        elif (place := generator.randrange(seen + 1)) < count:
            kept[place] = item
    return kept


def fit_model(chunks: list[str], *, pieces: int, **options) -> bytes:
    """The bytes of the model of `chunks`, each below CHUNK + 8 characters.

    options: SentencePiece's own. Raises ValueError where `pieces` and the chunks do not agree.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    if not chunks:
        raise ValueError("the texts are empty, with no line to learn pieces from; give more text.")
    fitted = io.BytesIO()
    try:
        with progress.followed(pieces) as level:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(chunks),
                model_writer=fitted,
                vocab_size=pieces,
                pad_id=model.PAD,
                eos_id=model.EOS,
                unk_id=model.UNK,
                bos_id=-1,
                byte_fallback=True,
                add_dummy_prefix=False,
                # It learns nothing from a text's own "<unk>" where a piece is called so.
                **{f"{role}_piece": f"\ue000{role}" for role in ("pad", "eos", "unk")},
                required_chars="▁\n",  # in a corpus without a space, ▁ would be spelt in bytes
                max_sentence_length=4 * (MAX_CHUNK_CHARS + 8),  # bytes
                num_threads=NUM_THREADS,
                minloglevel=level,
                **options,
            )
    except RuntimeError as error:
        raise ValueError(explain_vocab_size_error(str(error), pieces)) from error
    named = sentencepiece_model_pb2.ModelProto.FromString(fitted.getvalue())
    for role in ("pad", "eos", "unk"):
        named.trainer_spec.ClearField(f"{role}_piece")  # and so it is <pad>, </s>, <unk> again
        place = getattr(named.trainer_spec, f"{role}_id")
        named.pieces[place].piece = getattr(named.trainer_spec, f"{role}_piece")
    return named.SerializeToString()


def explain_vocab_size_error(error: str, pieces: int) -> str:
    """SentencePiece's complaint about the number of pieces as one sentence with the cure."""
    if found := re.search(r"too high .* <= (\d+)", error):
        most = found[1]
        return (
            f"tokenizer.vocab_size={pieces} is more than these texts support, {most}; use more text, "
            f"or --config.tokenizer.vocab_size={most}."
        )
    if found := re.search(r"required_chars. \d+ vs (\d+)", error):
        least = found[1]
        return (
            f"tokenizer.vocab_size={pieces} cannot hold the bytes and characters of these texts, "
            f"{least}; use --config.tokenizer.vocab_size={least} or more, or a lower "
            f"tokenizer.character_coverage."
        )
    return f"SentencePiece refused tokenizer.vocab_size={pieces} ({error}); use 1000 or more."
