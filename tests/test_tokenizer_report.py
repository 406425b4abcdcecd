"""Tests of the vocabulary for objectives, the statistics, and `python -m lm tokenizer`."""

from __future__ import annotations

import collections
import json
import unicodedata

import numpy as np
import pytest

from lm import cli, runs, tokenizer
from tests.tiny_data import varied_texts
from tests.tiny_runs import as_flags

SCRIPTS = [
    "日本語で書く。",
    "Ещё немного слов.",
    "مرحبا بالعالم؟",
    "हिन्दी में लिखा।",
    "Übung macht",
    "שלום",
]
CODE = ["def f(x):\n    return {x:  [x]}\n", "user: hi\n\nassistant:  hello\n", "\t<unk> </s>"]
MARKS = ".!?…。！？｡।॥؟۔።။។‼⁉"


def texts(count=60):
    """Sentences in Latin letters and in many other scripts."""
    latin = varied_texts(seed=3, count=count)
    return [f"{text} {SCRIPTS[i % len(SCRIPTS)]}" for i, text in enumerate(latin)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Name -> a tokenizer of texts(): one of each kind, and one with nmt_nfkc."""
    root = tmp_path_factory.mktemp("kinds")
    changes = {"unigram": {}, "bpe": {"kind": "bpe"}, "folded": {"normalization": "nmt_nfkc"}}
    options = dict(vocab_size=500, num_extra_ids=7, character_coverage=1.0)
    tokenizers = {
        name: tokenizer.train(texts(), root / name, **options | changes[name]) for name in changes
    }
    return tokenizers | {"bytes": tokenizer.write_byte_tokenizer(root / "bytes", 7)}


def from_pieces(path, pieces, **kinds):
    """A tokenizer of pad, eos, unk and these pieces. kinds: piece -> type, unless NORMAL."""
    model = tokenizer.byte_model_proto()
    del model.pieces[3:]
    model.trainer_spec.byte_fallback = False
    for piece in pieces:
        kind = getattr(model.SentencePiece, kinds.get(piece, "NORMAL"))
        model.pieces.add(piece=piece, score=0.0, type=kind)
    metadata = {"pieces": 3 + len(pieces), "num_sentinels": 2, "normalization": "identity"}
    return tokenizer.write(path, model.SerializeToString(), metadata)


ALL = pytest.mark.parametrize("name", ["unigram", "bpe", "folded", "bytes"])
TRAINED = pytest.mark.parametrize("name", ["unigram", "bpe", "folded"])


# The vocabulary. -----------------------------------------------------------------------------


@TRAINED
def test_every_word_is_text(trained, name):
    tok = trained[name]
    words = tok.vocabulary.words
    assert words.dtype == np.int32 and len(words) == len(set(words.tolist())) == 500 - 259
    for piece in words:
        text = tok.decode([piece])
        assert text and "\ufffd" not in text and piece not in tok.byte_ids
    assert not np.isin([tok.pad, tok.eos, tok.unk, *tok.sentinels], words).any()


def test_the_words_of_a_byte_tokenizer_are_the_bytes(trained):
    assert trained["bytes"].vocabulary.words.tolist() == list(range(3, 259))


def test_an_unused_piece_is_not_a_word(tmp_path):
    tok = from_pieces(tmp_path, ["a", "<spare>", "<turn>", "b"], **{"<spare>": "UNUSED"})
    assert tok.vocabulary.words.tolist() == [3, 5, 6]


def test_the_vocabulary_is_cached_and_has_the_tokenizers_ids(trained):
    tok = trained["unigram"]
    assert tok.vocabulary is tok.vocabulary
    assert tok.vocabulary.eos == tok.eos and tok.vocabulary.ends.shape == (tok.size,)
    np.testing.assert_array_equal(tok.vocabulary.sentinels, tok.sentinels)
    assert not tok.vocabulary.ends[[tok.pad, tok.eos, tok.unk, *tok.sentinels]].any()


ENDS = [
    *MARKS,
    "...",
    "?!",
    " .",
    "so.",
    "so?”",
    "so.)",
    '."',
    ".'",
    "。」",
    "！』",
    ".»",
    ".“",
    ".\n",
]
ENDS += ["\n", "\n\n", "\n  ", ".] "]
CONTINUES = [
    "so",
    ",",
    ";",
    ":",
    '"',
    "”",
    ")",
    "」",
    "¿",
    "¡",
    "3.1",
    ".so",
    "-",
    " ",
    "\n(",
    "\nso",
    "·",
]


def test_a_sentence_ends_in_its_mark_a_closing_bracket_after_it_or_a_newline(tmp_path):
    tok = from_pieces(tmp_path, ENDS + CONTINUES)
    ends = tok.vocabulary.ends
    actual = {tok.decode([piece]): bool(ends[piece]) for piece in range(3, tok.vocab_size)}
    assert actual == dict.fromkeys(ENDS, True) | dict.fromkeys(CONTINUES, False)


def test_the_full_stops_of_every_script_end_a_sentence(tmp_path):
    named = "FULL STOP", "QUESTION MARK", "EXCLAMATION MARK", "DANDA"
    names = {chr(code): unicodedata.name(chr(code), "") for code in range(0x3000)}
    marks = [
        mark
        for mark, name in names.items()
        if name.endswith(named) and "INVERTED" not in name and unicodedata.category(mark) == "Po"
    ]
    tok = from_pieces(tmp_path, marks)
    missed = [mark for mark, end in zip(marks, tok.vocabulary.ends[3:-2], strict=True) if not end]
    # Greek: a semicolon too; Armenian: inside of a sentence; Coptic: Unicode does not say so.
    assert len(marks) > 20 and set(missed) <= set("\u037e\u055c\u055e\u2cfe"), missed


def test_among_single_bytes_only_ascii_marks_end_a_sentence(trained):
    ends = np.flatnonzero(trained["bytes"].vocabulary.ends)
    assert bytes((ends - 3).tolist()) == b"\n!.?"


# The report. ---------------------------------------------------------------------------------


def test_the_stats_of_a_byte_tokenizer(trained):
    stats = tokenizer.text_stats(trained["bytes"], ["ab cd\n", "日本"])
    sizes = dict(fingerprint=trained["bytes"].fingerprint, pieces=259, size=266, rows=384)
    counts = dict(texts=2, tokens=12, words=3, characters=8, bytes=12)
    ratios = dict(tokens_per_word=4.0, tokens_per_character=1.5, bytes_per_token=1.0)
    shares = dict(byte_share=1.0, unk_share=0.0, restored_share=1.0, unused_share=None)
    assert stats == sizes | counts | ratios | shares | {"longest_pieces": []}


@ALL
def test_the_stats_equal_direct_counts(trained, name):
    tok, heldout = trained[name], [*varied_texts(seed=9, count=20), *SCRIPTS, *CODE, ""]
    stats = tokenizer.text_stats(tok, iter(heldout), num_longest=5)
    ids = [piece for text in heldout for piece in tok.encode(text).tolist()]
    normalized = [tok.normalize(text) for text in heldout]
    is_byte = [tok.names()[piece].startswith("<0x") for piece in ids]
    assert (stats["texts"], stats["tokens"]) == (len(heldout), len(ids))
    assert stats["tokens_per_word"] == len(ids) / len(" ".join(normalized).split())
    assert stats["tokens_per_character"] == len(ids) / sum(map(len, normalized))
    assert stats["bytes_per_token"] == len("".join(normalized).encode()) / len(ids)
    assert stats["byte_share"] == sum(is_byte) / len(ids)
    restored = [tok.decode(tok.encode(text)) == text for text in heldout]
    assert stats["restored_share"] == sum(restored) / len(restored)
    if name != "bytes":
        learned = range(259, tok.vocab_size)
        assert stats["unused_share"] == len(set(learned) - set(ids)) / len(learned)
        longest = sorted({len(tok.decode([piece])) for piece in ids}, reverse=True)[0]
        rows = stats["longest_pieces"]
        assert [row["characters"] for row in rows] == sorted(
            (len(tok.decode([piece])) for piece in set(ids) & set(learned)), reverse=True
        )[:5]
        assert rows[0]["characters"] == longest
        piece_counts = collections.Counter(tok.decode([piece]) for piece in ids)
        assert all(row["count"] == piece_counts[row["piece"]] for row in rows)


@ALL
def test_the_counts_of_parts_add_up_to_the_counts_of_the_whole(trained, name):
    parts = [varied_texts(seed=5, count=9), SCRIPTS]
    first, second, whole = (
        tokenizer.text_stats(trained[name], group) for group in (*parts, sum(parts, []))
    )
    for count in ("texts", "tokens", "words", "characters", "bytes"):
        assert first[count] + second[count] == whole[count] > 0


def test_only_nmt_nfkc_loses_newlines_and_runs_of_spaces(trained):
    share = {
        name: tokenizer.text_stats(tok, CODE)["restored_share"] for name, tok in trained.items()
    }
    assert share == {"unigram": 1.0, "bpe": 1.0, "bytes": 1.0, "folded": 0.0}
    assert tokenizer.text_stats(trained["folded"], ["{a} b"])["restored_share"] == 1.0


def test_a_higher_character_coverage_gives_fewer_bytes(tmp_path):
    shares = []
    for coverage in (0.98, 0.995, 1.0):
        options = dict(vocab_size=450, character_coverage=coverage)
        tok = tokenizer.train(texts(), tmp_path / str(coverage), **options)
        shares.append(tokenizer.text_stats(tok, texts())["byte_share"])
    assert shares[0] > shares[1] > shares[2] == 0.0


def test_lost_text_is_counted(tmp_path):
    stats = tokenizer.text_stats(from_pieces(tmp_path, ["a", "b"]), ["abab", "aba?", "?"])
    assert stats["unk_share"] == 2 / 9 and stats["restored_share"] == 1 / 3


def test_texts_without_a_token_are_refused(trained):
    for empty in ([], ["", ""]):
        with pytest.raises(ValueError, match=f"the {len(empty)} texts .* no token; give more"):
            tokenizer.text_stats(trained["unigram"], empty)
    blank = tokenizer.text_stats(trained["unigram"], ["\n \n"])
    assert blank["tokens_per_word"] is None and blank["bytes_per_token"] > 0


def test_the_table_shows_every_figure(trained):
    stats = tokenizer.text_stats(trained["bytes"], ["ab cd\n", "日本"])
    lines = tokenizer.format_stats(stats).splitlines()
    assert lines[0] == "2 texts: 12 tokens, 3 words, 8 characters, 12 bytes"
    shown = [line.split()[0] for line in lines[1:-1]]
    assert shown == ["4.000", "1.500", "1.000", "100.000%", "0.000%", "100.000%", "-"]
    stats = tokenizer.text_stats(trained["unigram"], varied_texts())
    (last,) = [line for line in tokenizer.format_stats(stats).splitlines() if "longest" in line]
    assert all(repr(row["piece"]) in last for row in stats["longest_pieces"])


def test_rows_without_an_id_are_reported(trained):
    sizes = "259 pieces + 7 sentinels = 266 ids, padded to 384 rows"
    assert tokenizer.describe_sizes(trained["bytes"], 384) == sizes
    assert tokenizer.describe_sizes(trained["bytes"], 512).startswith(
        f"{sizes}; model.vocab_size=512"
    )
    assert "246 of its rows have no id" in tokenizer.describe_sizes(trained["bytes"], 512)


# The command. --------------------------------------------------------------------------------


def command(config, workdir) -> int:
    flags = ["--config=configs/base.py", *as_flags(config), f"--workdir={workdir}"]
    return cli.main(["tokenizer", *flags])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_command_reports_on_held_out_texts(tiny_config, tmp_path, capsys, kind):
    config = tiny_config(**{"tokenizer.dir": "", "tokenizer.kind": kind})
    run = runs.make_run(config, tmp_path)
    for _ in range(2):  # trained, then loaded
        assert command(config, tmp_path) == 0
        out = capsys.readouterr().out
        assert "400 pieces + 10 sentinels = 410 ids, padded to 512 rows\n" in out
        stats = json.loads((tmp_path / "tokenizer_report.json").read_text())
        tokens = tokenizer.Tokenizer(tmp_path / "tokenizer")
        heldout = list(runs.Texts(run, runs.splits(run)[1], 10**6))
        assert (
            stats == tokenizer.text_stats(tokens, heldout) and tokenizer.format_stats(stats) in out
        )
        assert tokenizer.read(tokens.directory)[1]["kind"] == kind
        assert stats["texts"] == len(heldout) <= tokenizer.MAX_REPORTED_TEXTS
    names = ("tokenizer.json", "tokenizer.model")
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == list(names)


@pytest.mark.parametrize("kind, pieces", [("unigram", 400), ("bytes", 259)])
def test_without_its_dataset_the_command_writes_nothing(
    tiny_config, tmp_path, capsys, kind, pieces
):
    changes = {"tokenizer.dir": "", "tokenizer.kind": kind, "tokenizer.vocab_size": pieces}
    config = tiny_config(**changes | {"data.tfds_dir": str(tmp_path / "nowhere")})
    assert command(config, tmp_path / "run") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "bped"}, "tokenizer.kind='bped' is unknown; .* did you mean 'bpe'"),
        ({"normalization": "nfc"}, "tokenizer.normalization='nfc' is unknown; choose one of"),
        (
            {"kind": "bytes", "vocab_size": 259, "normalization": "nmt_nfkc"},
            "normalization='nmt_nfkc' does not suit tokenizer.kind='bytes'; use 'identity'",
        ),
    ],
)
def test_an_invalid_tokenizer_config_is_refused_before_any_work(
    tiny_config, tmp_path, change, message
):
    changes = {f"tokenizer.{key}": value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        runs.make_run(tiny_config(**{"tokenizer.dir": ""} | changes), tmp_path)


def test_an_existing_tokenizer_of_another_kind_is_refused(tiny_config, tmp_path):
    changes = {"tokenizer.dir": "", "tokenizer.kind": "bpe"}
    runs.make_tokenizer(runs.make_run(tiny_config(**changes), tmp_path))
    runs.make_run(tiny_config(**changes), tmp_path)
    with pytest.raises(ValueError, match="kind='unigram' differs from the 'bpe' of the tokenizer"):
        runs.make_run(tiny_config(**{"tokenizer.dir": ""}), tmp_path)
