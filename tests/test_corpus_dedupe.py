"""Deduplication: the Jaccard estimate; planted duplicates are found and later ones dropped."""

from __future__ import annotations

import random
import time
import tracemalloc
import unicodedata

import numpy as np
import pytest

from lm.corpus import dedupe


def words_of(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(count)]


def signatures(texts) -> np.ndarray:
    return np.stack([dedupe.signature(dedupe.normalize(text)) for text in texts])


def near(texts) -> list[bool]:
    hashes = signatures(texts)
    return dedupe.near_earlier(hashes, np.arange(len(hashes))).tolist()


def jaccard(first: str, second: str) -> float:
    a, b = (set(dedupe.shingles(text).tolist()) for text in (first, second))
    return len(a & b) / len(a | b)


def with_new_run(rng: random.Random, words: list[str], share: float) -> list[str]:
    """Replace a run of `share` of the words by new ones."""
    run = int(len(words) * share)
    start = rng.randrange(len(words) - run)
    return words[:start] + words_of(rng, run) + words[start + run :]


@pytest.fixture(scope="module")
def pairs():
    """(text, a copy with a share of its words replaced), from none to almost all."""
    rng, examples = random.Random(0), []
    for number in range(300):
        words = words_of(rng, rng.randint(50, 400))
        examples.append((" ".join(words), " ".join(with_new_run(rng, words, number / 301))))
    return examples


def test_a_run_of_combining_marks_takes_linear_time():
    start = time.process_time()
    text = "e" + "\u0301\u0327" * 100_000
    assert dedupe.normalize(text) == dedupe.normalize(text[:31])
    assert time.process_time() - start < 2  # quadratic time would be minutes


@pytest.mark.parametrize("text", ["e\u0301" * 300 + " \ufb01", "か\u3099" * 999, "가각힣" * 400])
def test_composed_and_decomposed_texts_are_equal_for_words_of_any_length(text):
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert dedupe.normalize(composed) == dedupe.normalize(decomposed)
    assert dedupe.normalize(decomposed) == unicodedata.normalize("NFKC", text)


def test_the_estimate_has_the_standard_error_of_binomial_counts(pairs):
    exact = np.array([jaccard(*pair) for pair in pairs])
    first, second = (signatures(texts) for texts in zip(*pairs, strict=True))
    estimate = dedupe.similarity(first, second)
    error = np.sqrt(exact * (1 - exact) / dedupe.NUM_HASHES)
    z = (estimate - exact)[error > 0] / error[error > 0]
    assert np.abs(z).max() < 4.5 and abs(z.mean()) < 4 / len(z) ** 0.5
    assert 0.8 < (z**2).mean() < 1.25, "the variance of binomial counts"


def test_the_estimate_agrees_with_datasketch(pairs):
    datasketch = pytest.importorskip("datasketch")

    def minhash(text):
        sketch = datasketch.MinHash(num_perm=512)
        sketch.update_batch([int(value).to_bytes(8, "little") for value in dedupe.shingles(text)])
        return sketch

    for first, second in pairs[::30]:
        estimate = dedupe.similarity(*signatures((first, second)))
        assert abs(estimate - minhash(first).jaccard(minhash(second))) < 0.25


def test_signatures_never_change():
    text = "The quick brown fox jumps over the lazy dog, 東京 and कि."
    hashes = dedupe.signature(dedupe.normalize(text))
    assert hashes[:4].tolist() == [58879, 56031, 35803, 58565]
    assert dedupe.key(dedupe.normalize(text)).hex() == "a517fd16ba11ffbf667bbf054a76ae93"


@pytest.mark.parametrize(
    "count", [dedupe.SHINGLE_CHUNK - 1, dedupe.SHINGLE_CHUNK, dedupe.SHINGLE_CHUNK + 7]
)
def test_a_long_text_is_hashed_as_a_whole(count):
    text = " ".join(words_of(random.Random(2), count + dedupe.SHINGLE_WORDS - 1))
    hashes = dedupe._FACTORS * dedupe.shingles(text)[None] + dedupe._TERMS
    assert hashes.shape[1] == count
    expected = (hashes.min(axis=1) >> np.uint64(24)).astype(np.uint16)
    assert (dedupe.signature(text) == expected).all()


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("A  B\n c", "a b C", True),
        ("Ａﬁn", "afin", True),
        ("a-b", "a b", False),
        ("x = {1}", "x = {2}", False),
    ],
)
def test_keys_ignore_case_width_and_space(first, second, same):
    assert (dedupe.key(dedupe.normalize(first)) == dedupe.key(dedupe.normalize(second))) == same


def test_near_duplicates_ignore_punctuation():
    words = words_of(random.Random(3), 60)
    assert near([" ".join(words), ", ".join(words).title() + "!"]) == [False, True]


def test_all_but_the_first_of_equal_keys_are_dropped():
    rng = np.random.default_rng(0)
    keys = np.zeros(2000, dedupe.KEY)
    keys["high"], keys["low"] = rng.integers(0, 30, 2000), rng.integers(0, 30, 2000)
    seen, expected = set(), []
    for key in keys.tolist():
        expected.append(key in seen)
        seen.add(key)
    assert dedupe.same_as_earlier(keys).tolist() == expected
    assert dedupe.same_as_earlier(keys[:0]).tolist() == []


def test_planted_copies_are_found_and_nothing_else():
    rng = random.Random(4)
    texts, expected = [], []
    for number in range(400):
        copy = number % 4 == 3
        words = texts[rng.randrange(len(texts))].split() if copy else words_of(rng, 200)
        texts.append(" ".join(with_new_run(rng, words, 0.02) if copy else words))
        expected.append(copy)
    assert near(texts) == expected


def test_a_document_is_dropped_only_if_an_earlier_one_is_near():
    rng = random.Random(5)
    texts = [" ".join(words_of(rng, 80))]
    while len(texts) < 200:  # a chain: each is a changed copy of an earlier one
        texts.append(" ".join(with_new_run(rng, texts[rng.randrange(len(texts))].split(), 0.12)))
    hashes = signatures(texts)
    is_near = near(texts)
    similar = dedupe.similarity(hashes[:, None], hashes[None]) >= dedupe.NEAR_THRESHOLD
    earlier = np.tril(similar, -1).any(axis=1)
    assert not (np.array(is_near) & ~earlier).any()
    assert 0 < sum(is_near) < len(is_near)
    assert sum(is_near) >= 0.97 * earlier.sum()


def test_buckets_may_be_compared_one_at_a_time(monkeypatch):
    rng = random.Random(6)
    base = words_of(rng, 100)
    hashes = signatures(" ".join(with_new_run(rng, base, rng.random() / 3)) for _ in range(300))
    expected = dedupe.near_earlier(hashes, np.arange(300))
    distance = np.zeros(300, bool)
    for band in range(dedupe.NUM_BANDS):
        buckets = dedupe.band_hashes(
            hashes[:, band * dedupe.BAND_ROWS : (band + 1) * dedupe.BAND_ROWS]
        )
        for bucket in np.unique(buckets):
            (members,) = np.nonzero(buckets == bucket)
            alone = dedupe.near_in_buckets(
                np.zeros(len(members)), hashes[members], np.arange(len(members))
            )
            distance[members] |= alone
    assert (expected == distance).all() and 0 < expected.sum() < 299
    monkeypatch.setattr(dedupe, "PAIR_CHUNK", 7)
    assert (dedupe.near_earlier(hashes, np.arange(300)) == expected).all()


def test_a_document_is_compared_with_the_lookback_before_it():
    hashes = (
        np.random.default_rng(9).integers(0, 1 << 16, (40, dedupe.NUM_HASHES)).astype(np.uint16)
    )
    for distance in (1, 2, 16, 17):
        hashes[20] = hashes[20 - distance]
        near = dedupe.near_in_buckets(np.zeros(40), hashes, np.arange(40))
        assert np.flatnonzero(near).tolist() == [20] * (distance <= 16)
        hashes[20] = 0


def test_only_the_given_documents_are_compared():
    text = " ".join(words_of(random.Random(7), 50))
    hashes = signatures([text, "other words than those of the first", text, text])
    assert dedupe.near_earlier(hashes, np.array([1, 2, 3])).tolist() == [False, False, True]
    assert dedupe.near_earlier(hashes, np.array([], int)).tolist() == []


def test_texts_without_words_are_near_nothing_and_short_ones_near_equal_ones():
    assert near(["!!!", "???", "...", ""]) == [False] * 4
    assert near(["two words", "two words!", "two other"]) == [False, True, False]


def test_a_pair_is_found_with_the_documented_probability():
    probability = lambda share: 1 - (1 - share**dedupe.BAND_ROWS) ** dedupe.NUM_BANDS
    assert round(probability(0.8), 2) == 0.99 and round(probability(0.5), 2) == 0.22
    assert round((0.8 * 0.2 / dedupe.NUM_HASHES) ** 0.5, 2) == 0.04
    for share in (0.5, 0.8):
        rng = np.random.default_rng(10)
        first = rng.integers(0, 1 << 16, (1000, dedupe.NUM_HASHES)).astype(np.uint16)
        agrees = rng.random(first.shape) < share
        second = np.where(agrees, first, first ^ 1)
        bands = lambda hashes: [
            dedupe.band_hashes(hashes[:, start : start + dedupe.BAND_ROWS])
            for start in range(0, dedupe.NUM_HASHES, dedupe.BAND_ROWS)
        ]
        either = np.any([a == b for a, b in zip(bands(first), bands(second), strict=True)], axis=0)
        assert abs(either.mean() - probability(share)) < 0.05


def test_a_document_takes_less_than_80_bytes_besides_its_signature(tmp_path):
    count = 20_000
    rng = np.random.default_rng(11)
    hashes = rng.integers(0, 1 << 16, (count, dedupe.NUM_HASHES)).astype(np.uint16)
    keys = rng.integers(0, 256, 16 * count).astype(np.uint8).view(dedupe.KEY)
    tracemalloc.start()
    same = dedupe.same_as_earlier(keys)
    dedupe.near_earlier(hashes, np.flatnonzero(~same))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak + keys.nbytes < 80 * count


def test_many_copies_are_searched_in_linear_time(monkeypatch):
    compared = []
    plain = dedupe.similarity
    monkeypatch.setattr(
        dedupe, "similarity", lambda a, b: (compared.append(len(a)), plain(a, b))[1]
    )
    text = " ".join(words_of(random.Random(8), 30))
    hashes = np.repeat(signatures([text]), 5000, axis=0)
    assert dedupe.near_earlier(hashes, np.arange(5000)).sum() == 4999
    assert sum(compared) <= 5000 * dedupe.NUM_BANDS
