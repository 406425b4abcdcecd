"""Exact duplicates by a hash and near duplicates by MinHash.

A document is dropped if an earlier one has the same key, or is near it, itself dropped or not. The
result depends only on the documents and their order in the sources.

Exact: equal after NFKC, case folding and collapsing white space.
Near: at least NEAR_THRESHOLD of the shingles of SHINGLE_WORDS words in common (Jaccard index),
estimated by NUM_HASHES hashes with a standard error of 0.04 at 0.8. Punctuation is ignored; in
scripts without spaces each character is a word. Only documents that agree in all hashes of a band
are compared: a pair at 0.8 with probability 0.99, one at 0.5 with 0.22. Within a bucket each is
compared with the LOOKBACK before it, so a large bucket takes linear time.
Source: Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", section 3.4.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib

import numpy as np
import regex
import tqdm

from lm.corpus import rules

KINDS = ("none", "exact", "near")
KEY = np.dtype([("high", "<u8"), ("low", "<u8")])

SHINGLE_WORDS = 5
NUM_BANDS, BAND_ROWS = 16, 6
NUM_HASHES = NUM_BANDS * BAND_ROWS
NEAR_THRESHOLD = 0.8
LOOKBACK = 16  # earlier documents of a bucket that each document is compared with
PAIR_CHUNK = 1 << 16  # pairs of signatures compared at a time
SHINGLE_CHUNK = 2048  # shingles hashed at a time, so that the products stay in the CPU cache

LONG_MARKS = regex.compile(r"(\p{M}{30})\p{M}+")
# NFKC has mapped wide and compatibility forms to these.
PUNCTUATION = re.compile(
    "[\x00-\x1f!-/:-@\\[-`{-~\u00a1-\u00bf\u055a-\u055f\u0589\u060c\u061b\u061f\u066a-\u066d\u06d4"
    "\u0964\u0965\u1362-\u1368\u2000-\u206f\u3000-\u303f\u30fb]+"
)

_BITS = np.frombuffer(
    hashlib.shake_128(b"minhash").digest(8 * (2 * NUM_HASHES + SHINGLE_WORDS)), "<u8"
)
_FACTORS, _TERMS = _BITS[:NUM_HASHES, None] | np.uint64(1), _BITS[NUM_HASHES : 2 * NUM_HASHES, None]
_WORD_FACTORS = _BITS[2 * NUM_HASHES :] | np.uint64(1)


def normalize(text: str) -> str:
    """NFKC, case folded, white space collapsed to single spaces.

    Only the first 30 of consecutive combining marks count, as in Unicode's Stream-Safe Text Format
    (annex 15), because normalizing a longer run takes quadratic time.
    """
    text = unicodedata.normalize("NFKC", LONG_MARKS.sub(r"\1", text))
    return " ".join(text.casefold().split())


def comparison_words(normalized: str) -> list[str]:
    """The words by which documents are compared: without punctuation."""
    return rules.split_words(PUNCTUATION.sub(" ", normalized))


def key(normalized: str) -> bytes:
    """A 16-byte hash: equal for equal texts, else equal with probability 2^-128."""
    return hashlib.blake2b(normalized.encode(), digest_size=16).digest()


def ngram_hashes(words: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """A linear hash modulo 2^64 of each n-gram: uint64 [max(0, words - n + 1)].

    words: uint64 [words], a hash of each. factors: uint64 [n], odd.
    """
    hashes = np.zeros(max(0, len(words) - len(factors) + 1), np.uint64)
    for offset, factor in enumerate(factors):
        hashes += words[offset : offset + len(hashes)] * factor
    return hashes


def shingles(normalized: str) -> np.ndarray:
    """A hash of each run of SHINGLE_WORDS words, or of all words if there are fewer: uint64 [n]."""
    words = [zlib.crc32(word.encode()) for word in comparison_words(normalized)]
    factors = _WORD_FACTORS[: max(1, len(words))]
    return _mix_bits(ngram_hashes(np.array(words, np.uint64), factors))


def _mix_bits(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def signature(normalized: str) -> np.ndarray:
    """MinHash: 16 bits of the minimum of each hash over the shingles: uint16 [NUM_HASHES].

    Two documents agree in an entry with the probability of their Jaccard index, or by chance with
    2^-16. A text without words has all entries 0 and is near nothing.
    """
    hashes = shingles(normalized)
    if not len(hashes):
        return np.zeros(NUM_HASHES, np.uint16)
    minima = np.full(NUM_HASHES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(hashes), SHINGLE_CHUNK):
        values = _FACTORS * hashes[None, start : start + SHINGLE_CHUNK] + _TERMS
        np.minimum(minima, values.min(axis=1), out=minima)
    return (minima >> np.uint64(24)).astype(np.uint16)  # the top bits are 0 for a long text


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Estimate the Jaccard index of two signatures [.., NUM_HASHES]: float [..]."""
    return (first == second).mean(axis=-1)


def same_as_earlier(keys: np.ndarray) -> np.ndarray:
    """Whether an earlier document has the same key: KEY [n] -> bool [n]."""
    order = np.lexsort((np.arange(len(keys)), keys["low"], keys["high"]))
    is_repeated = np.zeros(len(keys), bool)
    is_repeated[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return is_repeated


def near_earlier(signatures: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Whether each of some documents is near an earlier one of them: bool [n].

    signatures: uint16 [all documents, NUM_HASHES], may be memory-mapped. documents: int [n],
    ascending row numbers.
    """
    is_near = np.zeros(len(documents), bool)
    for band in tqdm.tqdm(range(NUM_BANDS), desc="comparing", unit=" bands", disable=None):
        rows = signatures[:, band * BAND_ROWS : (band + 1) * BAND_ROWS]
        buckets = band_hashes(rows)[documents]
        order = np.argsort(buckets, kind="stable")
        is_near[order] |= near_in_buckets(buckets[order], signatures, documents[order])
    return is_near


def band_hashes(entries: np.ndarray) -> np.ndarray:
    """The bucket of each document in a band: uint16 [n, BAND_ROWS] -> uint64 [n]."""
    hashes = np.zeros(len(entries), np.uint64)
    for column in entries.T:
        hashes = _mix_bits(hashes ^ column.astype(np.uint64))
    return hashes


def near_in_buckets(buckets: np.ndarray, signatures: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Whether each document is near one of the LOOKBACK before it in its bucket: bool [n].

    buckets: [n], equal ones adjacent, documents in order. rows: int [n], rows of signatures.
    """
    is_near = np.zeros(len(buckets), bool)
    for back in range(1, min(LOOKBACK, len(buckets) - 1) + 1):
        later = np.flatnonzero((buckets[back:] == buckets[:-back]) & ~is_near[back:]) + back
        if not len(later):
            break
        for start in range(0, len(later), PAIR_CHUNK):
            pair = later[start : start + PAIR_CHUNK]
            later_rows, earlier_rows = signatures[rows[pair]], signatures[rows[pair - back]]
            is_similar = similarity(later_rows, earlier_rows) >= NEAR_THRESHOLD
            is_near[pair] = is_similar & later_rows.any(axis=-1)
    return is_near
