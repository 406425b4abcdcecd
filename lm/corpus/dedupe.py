"""Documents that were there before: the same, by a hash, and nearly the same, by MinHash.

A document is dropped where an earlier one has the same key; of the others, one is dropped where an
earlier one is near it, kept or not. So the answer depends on the set of documents and their order
in the sources, and on nothing else: neither on who reads them nor on how many at a time.

The same: equal after NFKC, case folding, and with one space for every run of white space.
Near: of the runs of SPAN words, at least the share NEAR is common to both (Jaccard's index), as
ENTRIES independent hashes estimate it, with a standard error of 0.04 at 0.8. Punctuation does not
count; of a script without spaces a character is a word. Pairs are looked for where all hashes of a
band agree: a pair at 0.8 is found with probability 0.99, one at 0.5 with 0.22, and then dropped
only if it is estimated at NEAR. Where many agree in a band, each is compared with the LOOKBACK
before it, so that a crowd of like documents takes linear time.
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

SPAN = 5  # words of a shingle
BANDS, ROWS = 16, 6
ENTRIES = BANDS * ROWS
NEAR = 0.8
LOOKBACK = 16  # earlier documents of a band's bucket that one is compared with
PAIRS = 1 << 16  # of signatures that are compared at a time
PIECE = 2048  # shingles at a time: what is made of them stays in the processor's cache

MARKS = regex.compile(r"(\p{M}{30})\p{M}+")
# NFKC has turned wide and compatibility forms into these.
PUNCTUATION = re.compile(
    "[\x00-\x1f!-/:-@\\[-`{-~\u00a1-\u00bf\u055a-\u055f\u0589\u060c\u061b\u061f\u066a-\u066d\u06d4"
    "\u0964\u0965\u1362-\u1368\u2000-\u206f\u3000-\u303f\u30fb]+"
)

# Stable for ever, which no generator of a library promises.
_BITS = np.frombuffer(hashlib.shake_128(b"minhash").digest(8 * (2 * ENTRIES + SPAN)), "<u8")
_FACTORS, _TERMS = _BITS[:ENTRIES, None] | np.uint64(1), _BITS[ENTRIES : 2 * ENTRIES, None]
_PLACES = _BITS[2 * ENTRIES :] | np.uint64(1)


def normalize(text: str) -> str:
    """The text as it is compared: NFKC, case folded, one space for every run of white space.

    Of combining marks in a row the first 30 count, as in the Stream-Safe Text of Unicode's annex
    15: putting more in order takes the square of their number.
    """
    text = unicodedata.normalize("NFKC", MARKS.sub(r"\1", text))
    return " ".join(text.casefold().split())


def key(normalised: str) -> bytes:
    """16 bytes that two documents share if they are the same, and else by chance of 2^-128."""
    return hashlib.blake2b(normalised.encode(), digest_size=16).digest()


def shingles(normalised: str) -> np.ndarray:
    """A hash of each run of SPAN words, of all words where there are fewer: uint64 [n]."""
    found = rules.split_words(PUNCTUATION.sub(" ", normalised))
    hashes = np.array([zlib.crc32(word.encode()) for word in found], np.uint64)
    if not len(hashes):
        return hashes
    span = min(SPAN, len(hashes))
    runs = np.zeros(len(hashes) - span + 1, np.uint64)
    for place, factor in enumerate(_PLACES[:span]):
        runs += hashes[place : place + len(runs)] * factor  # modulo 2^64
    return _mixed(runs)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Each number's bits spread over all 64: splitmix64's last step."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def signature(normalised: str) -> np.ndarray:
    """The least value of each of ENTRIES hashes over the shingles, 16 bits of it: uint16 [ENTRIES].

    Two documents agree in an entry with the probability of their Jaccard index, and else by chance
    of 2^-16. A text without a word has all entries 0, and is near nothing.
    """
    found = shingles(normalised)
    if not len(found):
        return np.zeros(ENTRIES, np.uint16)
    least = np.full(ENTRIES, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(found), PIECE):
        values = _FACTORS * found[None, start : start + PIECE] + _TERMS
        np.minimum(least, values.min(axis=1), out=least)
    return (least >> np.uint64(24)).astype(np.uint16)  # the highest bits are 0 for a long text


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The estimate of Jaccard's index: signatures [.., ENTRIES] twice -> float [..]."""
    return (first == second).mean(axis=-1)


def same_as_earlier(keys: np.ndarray) -> np.ndarray:
    """Whether each document's key is that of an earlier one: KEY [n] -> bool [n]."""
    order = np.lexsort((np.arange(len(keys)), keys["low"], keys["high"]))
    repeated = np.zeros(len(keys), bool)
    repeated[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return repeated


def near_earlier(signatures: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Whether each of some documents is near an earlier one of them: bool [n].

    signatures: uint16 [documents, ENTRIES], perhaps mapped from a file. among: int [n], ascending.
    """
    near = np.zeros(len(among), bool)
    for band in tqdm.tqdm(range(BANDS), desc="comparing", unit=" bands", disable=None):
        buckets = band_hashes(signatures[:, band * ROWS : (band + 1) * ROWS])[among]
        order = np.argsort(buckets, kind="stable")
        near[order] |= near_in_buckets(buckets[order], signatures, among[order])
    return near


def band_hashes(entries: np.ndarray) -> np.ndarray:
    """The bucket of each document in a band: uint16 [n, ROWS] -> uint64 [n].

    Those of a bucket are compared.
    """
    hashes = np.zeros(len(entries), np.uint64)
    for column in entries.T:
        hashes = _mixed(hashes ^ column.astype(np.uint64))
    return hashes


def near_in_buckets(buckets: np.ndarray, signatures: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Which documents are near one of the LOOKBACK before them in the same bucket: bool [n].

    buckets: [n], equal ones side by side, in each the documents in their order. order: int [n], the
    rows of signatures they have.
    """
    near = np.zeros(len(buckets), bool)
    for back in range(1, min(LOOKBACK, len(buckets) - 1) + 1):
        later = np.flatnonzero((buckets[back:] == buckets[:-back]) & ~near[back:]) + back
        if not len(later):
            break
        for start in range(0, len(later), PAIRS):
            pair = later[start : start + PAIRS]
            ours, theirs = signatures[order[pair]], signatures[order[pair - back]]
            near[pair] = (similarity(ours, theirs) >= NEAR) & ours.any(axis=-1)
    return near
