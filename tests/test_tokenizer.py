"""Tests of the tokenizer: lossless, exact in bytes, reproducible, with disjoint id ranges."""

from __future__ import annotations

import collections
import io
import itertools
import json
import os
import pathlib
import pickle
import random
import re
import subprocess
import sys
import types
import unicodedata

import numpy as np
import pytest

from lm import tokenizer
from tests.tiny_data import varied_texts

ROOT = pathlib.Path(__file__).parents[1]
VOCAB_SIZE, NUM_EXTRA_IDS = 600, 10


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train(varied_texts(), path, vocab_size=VOCAB_SIZE, num_extra_ids=NUM_EXTRA_IDS)
    return path


def trained(name):
    """A fixture: the tokenizer of varied_texts() with OPTIONS[name]."""

    @pytest.fixture(scope="module", name=name)
    def fixture(tmp_path_factory):
        path = tmp_path_factory.mktemp(name)
        return tokenizer.train(varied_texts(), path, vocab_size=VOCAB_SIZE, **OPTIONS[name])

    return fixture


OPTIONS = {
    "folded": {"normalization": "nmt_nfkc"},
    "joined": {"kind": "bpe", "num_extra_ids": NUM_EXTRA_IDS},
    "joined_folded": {"kind": "bpe", "normalization": "nmt_nfkc"},
}
folded, joined, joined_folded = map(trained, OPTIONS)


@pytest.fixture(scope="module")
def plain(directory):
    return tokenizer.Tokenizer(directory)


@pytest.fixture(scope="module")
def byte_tokens(tmp_path_factory):
    return tokenizer.write_byte_tokenizer(tmp_path_factory.mktemp("bytes"), NUM_EXTRA_IDS)


ALL = pytest.mark.parametrize("which", ["plain", "byte_tokens", *OPTIONS])


AWKWARD = [
    *["", " ", "  ", "\n", "\n\n\n", "\t", "\r\n", "\0", "a\0b", "\u2028", "\ufeffbom", "\x7f"],
    *["<pad>", "</s>", "<unk>", "<extra_id_0>", "<0x0A>", "⁇", " ⁇ ", "\ufffd", "\ufffe", "▅"],
    *[
        "▁",
        "a ▁ b",
        "\ud800",
        "x\udfffy",
        "\U0010ffff",
        "e\u0301",
        "ﬁ",
        "½",
        "Å",
        "e" + "\u0301" * 99,
    ],
    *[
        "  def f(x):\n\n        return {x: [x]}  ",
        "user: hi\n\nassistant:  hello\n",
        " ends in space ",
    ],
    *["שלום עולם", "مرحبا", "日本語", "👩‍👩‍👧 👍🏽", "a" * 5000, " " * 300, "0x1F\\n{}$"],
]


def code_points(rng, low, high, most=4):
    """A few random code points of a range, including unassigned ones and surrogates."""
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, most)))


RANGES = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0x2FFF), (0x3000, 0xFFFF)]
RANGES += [(plane << 16, (plane << 16) + 0xFFFF) for plane in range(17)]
RANGES += [
    (0x300, 0x36F),  # combining marks
    (0x590, 0x6FF),  # right to left
    (0x2000, 0x206F),  # spaces, joiners, directions, line and paragraph separators
    (0xD800, 0xDFFF),  # surrogates
    (0xE000, 0xF8FF),  # private use
    (0xFDD0, 0xFDEF),  # noncharacters
    (0x1F300, 0x1FAFF),  # emoji
    (0xE0000, 0xE007F),  # tags
]
SCRAPS = [
    *" \n\t\r\0▁▅▂<>{}⁇",
    "\r\n",
    "  ",
    "\u200d",
    "\ufe0f",
    "\ufeff",
    "\u202e",
    "a",
    "ka",
    ".",
]


def fuzz(count=400):
    """Awkward texts, then random ones made of SCRAPS and of code points of every plane."""
    yield from AWKWARD
    yield from ("e" + "\u0301" * 20_000, "日本" * 5_000, "\ud800" * 1_000)
    rng = random.Random(0)
    for _ in range(count):
        pieces = [
            rng.choice([rng.choice(SCRAPS), code_points(rng, *rng.choice(RANGES))])
            for _ in range(rng.randint(0, 30))
        ]
        yield "".join(pieces)


# Nothing is lost. ----------------------------------------------------------------------------


@ALL
def test_decoding_the_ids_of_a_text_gives_the_normalized_text(which, request):
    tok = request.getfixturevalue(which)
    for text in fuzz():
        assert tok.decode(tok.encode(text)) == tok.normalize(text)


def test_the_fuzz_contains_every_awkward_kind_of_character():
    characters = "".join(fuzz())
    kinds = {unicodedata.category(character) for character in characters}
    assert kinds >= {"Mn", "Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Nd", "Sk", "Lo", "So"}
    assert {ord(character) >> 16 for character in characters} == set(range(17))
    assert {"R", "AL", "RLO", "NSM"} <= {unicodedata.bidirectional(c) for c in characters}
    assert all(scrap in characters for scrap in SCRAPS)


@pytest.mark.parametrize("which", ["plain", "joined", "byte_tokens"])
def test_identity_changes_only_lone_surrogates_and_the_space_sign(which, request):
    tok = request.getfixturevalue(which)
    for text in fuzz():
        expected = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
        assert tok.normalize(text) == (
            expected if which == "byte_tokens" else expected.replace("▁", " ")
        )


@pytest.mark.parametrize("which", ["folded", "joined_folded"])
def test_nmt_nfkc_folds_compatible_characters_and_spaces(which, request):
    folded = request.getfixturevalue(which)
    assert folded.normalization == "nmt_nfkc"
    assert folded.normalize("  ﬁne \n½\u3000x ") == "fine 1⁄2 x"


@ALL
def test_the_bytes_of_the_pieces_are_the_bytes_of_the_text(which, request):
    tok = request.getfixturevalue(which)
    lengths = tok.piece_bytes(tokenizer.padded_rows(tok.size))
    for text in fuzz():
        assert lengths[tok.encode(text)].sum() == len(tok.normalize(text).encode())


@ALL
def test_no_text_is_encoded_as_a_special_id(which, request):
    tok = request.getfixturevalue(which)
    for text in fuzz():
        ids = tok.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert np.all((ids > tok.unk) & (ids < tok.vocab_size))


@pytest.mark.parametrize("which", ["plain", "joined"])
def test_a_piece_has_newlines_only_at_its_start(which, request):
    tok = request.getfixturevalue(which)
    pieces = [tok.decode([piece]) for piece in range(3 + 256, tok.vocab_size)]
    assert "\n\n" in pieces
    assert not any("\n" in piece.lstrip("\n") for piece in pieces)


@pytest.mark.parametrize("which", ["plain", "joined"])
def test_newlines_and_indentation_are_cheap(which, request):
    tok = request.getfixturevalue(which)
    assert len(tok.encode("\n\n")) == 1
    assert len(tok.encode("    ")) <= 2


def test_a_corpus_without_spaces_still_gets_a_space_piece(tmp_path):
    texts = [text.replace(" ", "").replace("\n", "") for text in varied_texts()]
    tok = tokenizer.train(texts, tmp_path, vocab_size=400, num_extra_ids=0)
    assert tok.decode(tok.encode(" a 日\n")) == " a 日\n"
    assert tok.piece_bytes(400)[tok.encode(" a 日\n")].sum() == 7


# The ids. ------------------------------------------------------------------------------------


def test_the_three_sizes(plain):
    assert (plain.vocab_size, plain.size) == (VOCAB_SIZE, VOCAB_SIZE + NUM_EXTRA_IDS)
    assert tokenizer.padded_rows(plain.size) == 640
    assert [tokenizer.padded_rows(size) for size in (32_100, 32_128, 1)] == [32_128, 32_128, 128]
    assert tokenizer.padded_rows(32_100, 8) == 32_104
    assert (plain.pad, plain.eos, plain.unk) == (0, 1, 2)
    metadata = tokenizer.read(plain.directory)[1]
    assert [metadata[name] for name in ("pieces", "size", "rows")] == [600, 610, 640]
    assert [plain.vocab_size, plain.size, plain.rows] == [600, 610, 640]


@pytest.mark.parametrize("name, value", [("pieces", 599), ("size", 611), ("rows", 512)])
def test_sizes_that_differ_from_the_model_are_refused(directory, tmp_path, name, value):
    path = copy(directory, tmp_path) / "tokenizer.json"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | {name: value}))
    message = f"says {name}={value}, .* has {metadata[name]}; make it"
    with pytest.raises(ValueError, match=message):
        tokenizer.Tokenizer(tmp_path)


def test_sentinels_descend_from_the_highest_id_as_t5s_do(plain):
    t5 = types.SimpleNamespace(size=32_100, num_extra_ids=100, sentinel_order="descending")
    assert [tokenizer.Tokenizer.sentinel(t5, k) for k in (0, 1, 99)] == [32_099, 32_098, 32_000]
    assert plain.sentinel() == plain.sentinel(0) == plain.size - 1
    assert plain.sentinel(NUM_EXTRA_IDS - 1) == plain.vocab_size


@pytest.mark.parametrize("k", [-1, NUM_EXTRA_IDS])
def test_a_sentinel_beyond_the_last_is_refused(plain, k):
    with pytest.raises(ValueError, match=f"sentinel {k} is beyond .*num_extra_ids={NUM_EXTRA_IDS}"):
        plain.sentinel(k)


def test_any_id_can_be_decoded(plain):
    hello = plain.encode("hello").tolist()
    ids = [0, *hello, plain.sentinel(0), 1, plain.sentinel(9), plain.size, -1, 2, 0]
    assert plain.decode(ids) == "hello<extra_id_0><extra_id_9><unused_610><unused_-1>\ufffd"
    assert plain.decode(np.array(ids[:-3])) == "hello<extra_id_0><extra_id_9><unused_610>"
    assert plain.decode([3 + 0xF0, 3 + 0x9F, 3 + ord("a")]) == "\ufffda"
    assert plain.decode([]) == ""


def test_special_ids_stand_for_no_bytes(plain):
    lengths = plain.piece_bytes(640)
    assert lengths.dtype == np.int32 and lengths.shape == (640,)
    assert not lengths[:3].any() and not lengths[VOCAB_SIZE:].any()
    assert np.all(lengths[3:259] == 1) and np.all(lengths[259:VOCAB_SIZE] >= 1)
    with pytest.raises(ValueError, match="rows=609 is fewer than the tokenizer's 610 ids; use 640"):
        plain.piece_bytes(609)


def test_a_tokenizer_pickles_as_its_directory(plain):
    data = pickle.dumps(plain)
    unpickled = pickle.loads(data)
    assert len(data) < 1000
    assert unpickled.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(unpickled.encode("a b\n"), plain.encode("a b\n"))


# Training. -----------------------------------------------------------------------------------

TRAIN_AGAIN = """
import sys; sys.path[:0] = sys.argv[1:3]
from lm import tokenizer
import tiny_data
for kind in ("unigram", "bpe"):
    options = dict(kind=kind, vocab_size=400, max_chunks=200)
    tokenizer.train(tiny_data.varied_texts(), f"{sys.argv[3]}/{kind}", **options)
"""


def test_the_number_of_training_threads_is_constant_and_recorded(tmp_path, monkeypatch):
    import sentencepiece

    passed, original = {}, sentencepiece.SentencePieceTrainer.train
    spy = lambda **options: passed.update(options) or original(**options)
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", spy)
    tokenizer.train(varied_texts(), tmp_path, vocab_size=400)
    metadata = tokenizer.read(tmp_path)[1]
    assert passed["num_threads"] == metadata["training"]["num_threads"] == 16


def test_training_gives_the_same_bytes_in_another_process(tmp_path):
    trained_files = []
    for run in ("1", "2"):
        paths = [str(ROOT), str(ROOT / "tests"), str(tmp_path / run)]
        environment = os.environ | {"PYTHONHASHSEED": run}
        subprocess.run([sys.executable, "-c", TRAIN_AGAIN, *paths], env=environment, check=True)
        files = sorted((tmp_path / run).glob("*/*"))
        trained_files.append({"/".join(path.parts[-2:]): path.read_bytes() for path in files})
    assert trained_files[0] == trained_files[1]
    names = ("tokenizer.json", "tokenizer.model")
    assert list(trained_files[0]) == [
        f"{kind}/{name}" for kind in ("bpe", "unigram") for name in names
    ]
    assert trained_files[0]["bpe/tokenizer.model"] != trained_files[0]["unigram/tokenizer.model"]


def test_the_metadata_is_written_beside_the_model(directory, plain, byte_tokens):
    metadata = json.loads((directory / "tokenizer.json").read_text())
    assert metadata["pieces"] == VOCAB_SIZE and metadata["num_sentinels"] == NUM_EXTRA_IDS
    kinds = [metadata["kind"], tokenizer.read(byte_tokens.directory)[1]["kind"]]
    assert kinds == ["unigram", "bytes"] and set(kinds) < set(tokenizer.KINDS)
    assert metadata["normalization"] == "identity" and metadata["fingerprint"] == plain.fingerprint
    assert metadata["training"]["lines"] == sum(
        1 for t in varied_texts() for _ in tokenizer.split_chunks(t)
    )


def test_the_fingerprint_depends_on_pieces_and_sentinels(tmp_path, plain):
    def fingerprint(**options):
        return tokenizer.train(varied_texts(), tmp_path, **options).fingerprint

    assert fingerprint(vocab_size=VOCAB_SIZE, num_extra_ids=NUM_EXTRA_IDS) == plain.fingerprint
    assert fingerprint(vocab_size=VOCAB_SIZE, num_extra_ids=11) != plain.fingerprint
    assert fingerprint(vocab_size=500, num_extra_ids=NUM_EXTRA_IDS) != plain.fingerprint


def test_chunks_are_short_and_lose_only_blank_lines():
    long = "x" * 2500 + " words" * 700
    for text in ["a\n\n b\nc", "\n\na\n", long, f"a\n{long}\nb", "日" * 3000, "a\0b▅c", "\ud800"]:
        chunks = list(tokenizer.split_chunks(text))
        whole = "".join(chunks)
        assert whole == text.rstrip("\n").translate({0: " ", 0x2585: " ", 0xD800: "\ufffd"})
        assert all(len(chunk) <= 1008 and chunk.strip() for chunk in chunks)
        assert not any("\n" in chunk.lstrip("\n") for chunk in chunks)
    assert all(chunk.startswith((" words", "x")) for chunk in tokenizer.split_chunks(long))
    assert list(tokenizer.split_chunks(" \n \n\n" + "\n" * 50 + "a")) == ["\n" * 8 + "a"]


@pytest.mark.parametrize("spoiler", ["\0", "▅", "\ud800", "\t", " y" * 4000])
def test_text_that_sentencepiece_would_drop_is_trained_on(tmp_path, spoiler):
    texts = [*varied_texts(), *[" zebra" * 150 + spoiler + " zebra" * 150] * 2]
    tok = tokenizer.train(texts, tmp_path, vocab_size=400)
    assert len(tok.encode(" zebra")) == 1


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_special_names_in_the_texts_are_trained_on_and_stay_text(tmp_path, kind):
    texts = [text.replace("hello", "<unk> </s> <pad> <s>") for text in varied_texts()]
    tok = tokenizer.train(texts, tmp_path, kind=kind, vocab_size=400)
    assert tok.names()[:3] == ["<pad>", "</s>", "<unk>"]
    for name in ("<pad>", "</s>", "<unk>", "<s>"):
        ids = tok.encode(name)
        assert not np.isin(ids, tok.byte_ids).any() and tok.decode(ids) == name


def test_bpe_always_joins_a_most_frequent_pair(tmp_path):
    rng = random.Random(1)
    vocabulary = ["".join(rng.choices("abcde", k=rng.randint(1, 5))) for _ in range(30)]
    words = rng.choices(vocabulary, [1 / (1 + i) for i in range(30)], k=900)
    texts = [" " + " ".join(words[i : i + 9]) for i in range(0, 900, 9)]
    tok = tokenizer.train(texts, tmp_path, kind="bpe", vocab_size=300, num_extra_ids=0)
    learned = [name for name in tok.names()[259:] if len(name) > 1]
    spellings = {tuple("▁" + word): words.count(word) for word in set(words)}
    for piece in learned:
        pairs = collections.Counter()
        for symbols, count in spellings.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += count
        joined = max((pair for pair in pairs if "".join(pair) == piece), key=pairs.get)
        assert pairs[joined] == max(pairs.values())
        spellings = {join(symbols, joined): count for symbols, count in spellings.items()}
    assert len(learned) == 300 - 259 - len("▁\nabcde")


def join(symbols, pair):
    """The symbols with every adjacent `pair`, from the left, joined into one."""
    joined = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return tuple(joined)


def test_a_sample_is_uniform_reproducible_and_complete_when_small():
    assert (
        tokenizer.reservoir_sample("abc", 3)
        == tokenizer.reservoir_sample("abc", 9)
        == ["a", "b", "c"]
    )
    first = tokenizer.reservoir_sample(range(10_000), 1000)
    assert first == tokenizer.reservoir_sample(range(10_000), 1000) and len(set(first)) == 1000
    assert abs(np.mean(first) - 4999.5) < 5 * 2887 / np.sqrt(1000)


def test_training_prints_a_line_before_and_after_and_sentencepiece_prints_nothing(tmp_path, capfd):
    lines = [line for text in varied_texts() for line in tokenizer.split_chunks(text)]
    tokenizer.train(varied_texts(), tmp_path, vocab_size=400)
    out, err = capfd.readouterr()
    assert out == ""
    printed = [line for line in err.splitlines() if "reading texts" not in line]
    assert printed[0] == f"fitting 400 pieces to {len(lines)} lines"
    assert len(printed) == 2 and re.fullmatch(r"fitted in \d+ s", printed[1])


def test_an_error_of_the_texts_is_raised(tmp_path):
    def broken():
        yield "a b c"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        tokenizer.train(broken(), tmp_path)


# What a user can do wrong. -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_error_for_too_little_text_names_a_vocab_size_that_works(tmp_path, kind):
    with pytest.raises(
        ValueError, match=r"tokenizer.vocab_size=32000 is more .* --config.tok"
    ) as error:
        tokenizer.train(varied_texts(), tmp_path, kind=kind)
    assert list(tmp_path.iterdir()) == []
    most = int(str(error.value).rpartition("=")[2].rstrip("."))
    assert tokenizer.train(varied_texts(), tmp_path, kind=kind, vocab_size=most).vocab_size == most


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_error_for_a_small_vocab_size_names_one_that_works(tmp_path, kind):
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size=260 cannot hold") as error:
        tokenizer.train(varied_texts(), tmp_path, kind=kind, vocab_size=260)
    least = int(
        str(error.value).partition("tokenizer.vocab_size=")[2].partition("vocab_size=")[2][:3]
    )
    assert (
        tokenizer.train(varied_texts(), tmp_path, kind=kind, vocab_size=least).vocab_size == least
    )


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ([], {}, "the texts are empty"),
        (["", "\n \n"], {}, "the texts are empty"),
        (["a b"], {"vocab_size": 0}, "tokenizer.vocab_size=0 is too small; use 1 or more"),
        (["a b"], {"normalization": "nfc"}, "tokenizer.normalization='nfc' is unknown; choose one"),
        (["a b"], {"kind": "bp"}, "tokenizer.kind='bp' is unknown; choose one of bpe, unigram"),
        (["a b"], {"num_extra_ids": -1}, "tokenizer.num_extra_ids=-1 is too small; use 0 or more"),
        (
            ["a b"],
            {"character_coverage": 1.5},
            "character_coverage=1.5 is out of bounds; use 0.98 to 1",
        ),
        (["a b"], {"character_coverage": 0.9}, "=0.9 is out of bounds; use 0.98 to 1"),
    ],
)
def test_an_invalid_option_is_refused_with_a_message(tmp_path, texts, options, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.train(texts, tmp_path, **options)


def copy(directory, path):
    for name in ("tokenizer.model", "tokenizer.json"):
        (path / name).write_bytes((directory / name).read_bytes())
    return path


def test_the_error_for_a_missing_tokenizer_names_the_command(directory, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path, directory / "tokenizer.json"):
        with pytest.raises(ValueError, match="there is no tokenizer in .*python -m lm tokenizer"):
            tokenizer.Tokenizer(path)


def test_a_flipped_bit_in_the_model_is_detected(directory, tmp_path):
    model = copy(directory, tmp_path) / "tokenizer.model"
    assert tokenizer.Tokenizer(tmp_path).vocab_size == VOCAB_SIZE  # unchanged, it loads
    whole = model.read_bytes()
    for position in np.linspace(0, len(whole) - 1, 20, dtype=int):
        data = bytearray(whole)
        data[position] ^= 1
        model.write_bytes(data)
        with pytest.raises(ValueError, match="do not belong together .*python -m lm tokenizer"):
            tokenizer.Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda text: text[: len(text) // 2], "tokenizer.json is damaged"),
        (lambda text: "", "tokenizer.json is damaged"),
        (lambda text: "[]", "tokenizer.json is damaged"),
        (lambda text: "{}", "tokenizer.json is damaged"),
        (lambda text: text.replace('sentinels": 10', 'sentinels": 11'), "do not belong together"),
    ],
)
def test_damaged_metadata_is_detected(directory, tmp_path, damage, message):
    path = copy(directory, tmp_path) / "tokenizer.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=f"{message}.*python -m lm tokenizer"):
        tokenizer.Tokenizer(tmp_path)


# Vocabularies that were trained elsewhere. ---------------------------------------------------


def foreign(path, metadata=(), **options):
    """A tokenizer of a SentencePiece model trained with other options than `train` uses."""
    import sentencepiece

    model = io.BytesIO()
    ids = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            chunk for text in varied_texts() for chunk in tokenizer.split_chunks(text)
        ),
        model_writer=model,
        minloglevel=2,
        **ids | options,
    )
    defaults = {"pieces": options["vocab_size"], "num_sentinels": 5, "normalization": "nmt_nfkc"}
    return tokenizer.write(path, model.getvalue(), defaults | dict(metadata))


def test_a_dummy_prefix_is_not_part_of_the_text(tmp_path):
    tok = foreign(tmp_path, vocab_size=400, byte_fallback=True)
    lengths = tok.piece_bytes(tok.size)
    for text in fuzz():
        assert tok.decode(tok.encode(text)) == tok.normalize(text)
        prefix = bool(tok.normalize(text))
        assert lengths[tok.encode(text)].sum() == len(tok.normalize(text).encode()) + prefix
    assert tok.adds_dummy_prefix and tok.normalize("  a b ") == "a b"


def test_the_special_ids_are_those_of_the_model(tmp_path):
    ids = dict(pad_id=0, eos_id=5, unk_id=3, bos_id=2, vocab_size=400)
    tok = foreign(tmp_path, **ids, byte_fallback=True, add_dummy_prefix=False)
    assert (tok.pad, tok.eos, tok.unk, tok.adds_dummy_prefix) == (0, 5, 3, False)
    assert not tok.piece_bytes(tok.size)[[0, 2, 3, 5]].any()
    assert tok.decode([2, *tok.encode("ab"), 5, 0]) == "ab"


def test_sentinels_may_ascend_and_the_fingerprint_depends_on_it(tmp_path):
    ascending = foreign(tmp_path / "1", {"sentinel_order": "ascending"}, vocab_size=300)
    descending = foreign(tmp_path / "2", {"sentinel_order": "descending"}, vocab_size=300)
    default = foreign(tmp_path / "3", vocab_size=300)
    assert [ascending.sentinel(k) for k in range(5)] == [300, 301, 302, 303, 304]
    assert [descending.sentinel(k) for k in range(5)] == [304, 303, 302, 301, 300]
    assert ascending.decode([300, 304]) == "<extra_id_0><extra_id_4>" == default.decode([304, 300])
    assert ascending.fingerprint != descending.fingerprint == default.fingerprint
    path = tmp_path / "1" / "tokenizer.json"
    path.write_text(path.read_text().replace("ascending", "descending"))
    with pytest.raises(ValueError, match="do not belong together"):
        tokenizer.Tokenizer(tmp_path / "1")
    with pytest.raises(ValueError, match="sentinel 5 is beyond"):
        ascending.sentinel(5)


def test_a_run_of_unknown_characters_decodes_as_one_replacement(tmp_path):
    tok = foreign(tmp_path, vocab_size=300)
    unknown = tok.encode("a \U0001f600\U0001f601 a").tolist()
    assert unknown.count(tok.unk) == 1
    assert tok.decode(unknown) == "a \ufffd a"
