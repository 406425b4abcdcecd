"""Laws of the vocabulary that objectives see, of the report, and of `python -m lm tokenizer`."""

from __future__ import annotations

import collections
import json
import unicodedata

import numpy as np
import pytest

from lm import cli, runs, tokenizer
from tests.test_cli import flat
from tests.tiny_data import varied_texts

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
    """Half words in Latin letters, half sentences of many scripts."""
    found = varied_texts(seed=3, count=count)
    return [f"{text} {SCRIPTS[i % len(SCRIPTS)]}" for i, text in enumerate(found)]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """By name: a tokenizer of `texts`, one of each kind, and one that folds."""
    root = tmp_path_factory.mktemp("kinds")
    wanted = {"unigram": {}, "bpe": {"kind": "bpe"}, "folded": {"normalization": "nmt_nfkc"}}
    options = dict(vocab_size=500, num_extra_ids=7, character_coverage=1.0)
    made = {
        name: tokenizer.train(texts(), root / name, **options | wanted[name]) for name in wanted
    }
    return made | {"bytes": tokenizer.write_byte_tokenizer(root / "bytes", 7)}


def by_hand(path, pieces, **kinds):
    """A tokenizer of pad, eos, unk and these pieces; kinds: by piece, its type if not NORMAL."""
    model = tokenizer.byte_model_proto()
    del model.pieces[3:]
    model.trainer_spec.byte_fallback = False
    for piece in pieces:
        kind = getattr(model.SentencePiece, kinds.get(piece, "NORMAL"))
        model.pieces.add(piece=piece, score=0.0, type=kind)
    facts = {"pieces": 3 + len(pieces), "num_sentinels": 2, "normalization": "identity"}
    return tokenizer.write(path, model.SerializeToString(), facts)


EVERY = pytest.mark.parametrize("name", ["unigram", "bpe", "folded", "bytes"])
LEARNT = pytest.mark.parametrize("name", ["unigram", "bpe", "folded"])


# The vocabulary. -----------------------------------------------------------------------------


@LEARNT
def test_a_random_word_is_a_text_of_its_own(fitted, name):
    tok = fitted[name]
    words = tok.vocabulary.words
    assert words.dtype == np.int32 and len(words) == len(set(words.tolist())) == 500 - 259
    for piece in words:
        text = tok.decode([piece])
        assert text and "\ufffd" not in text and piece not in tok.byte_ids
    assert not np.isin([tok.pad, tok.eos, tok.unk, *tok.sentinels], words).any()


def test_a_random_word_of_bytes_is_any_byte(fitted):
    assert fitted["bytes"].vocabulary.words.tolist() == list(range(3, 259))


def test_a_piece_that_is_never_written_is_no_word(tmp_path):
    tok = by_hand(tmp_path, ["a", "<spare>", "<turn>", "b"], **{"<spare>": "UNUSED"})
    assert tok.vocabulary.words.tolist() == [3, 5, 6]


def test_the_vocabulary_is_made_once_and_has_the_tokenizers_ids(fitted):
    tok = fitted["unigram"]
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
GOES_ON = [
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


def test_a_sentence_ends_in_its_mark_what_closes_after_it_or_the_end_of_a_line(tmp_path):
    tok = by_hand(tmp_path, ENDS + GOES_ON)
    ends = tok.vocabulary.ends
    named = {tok.decode([place]): bool(ends[place]) for place in range(3, tok.vocab_size)}
    assert named == dict.fromkeys(ENDS, True) | dict.fromkeys(GOES_ON, False)


def test_the_full_stops_of_every_script_end_a_sentence(tmp_path):
    named = "FULL STOP", "QUESTION MARK", "EXCLAMATION MARK", "DANDA"
    names = {chr(code): unicodedata.name(chr(code), "") for code in range(0x3000)}
    marks = [
        mark
        for mark, name in names.items()
        if name.endswith(named) and "INVERTED" not in name and unicodedata.category(mark) == "Po"
    ]
    tok = by_hand(tmp_path, marks)
    missed = [mark for mark, end in zip(marks, tok.vocabulary.ends[3:-2], strict=True) if not end]
    # Greek: a semicolon too; Armenian: inside of a sentence; Coptic: Unicode does not say so.
    assert len(marks) > 20 and set(missed) <= set("\u037e\u055c\u055e\u2cfe"), missed


def test_of_single_bytes_only_asciis_marks_end_a_sentence(fitted):
    ends = np.flatnonzero(fitted["bytes"].vocabulary.ends)
    assert bytes((ends - 3).tolist()) == b"\n!.?"


# The report. ---------------------------------------------------------------------------------


def test_the_report_of_bytes_is_known_beforehand(fitted):
    found = tokenizer.text_stats(fitted["bytes"], ["ab cd\n", "日本"])
    facts = dict(fingerprint=fitted["bytes"].fingerprint, pieces=259, size=266, rows=384)
    counts = dict(texts=2, tokens=12, words=3, characters=8, bytes=12)
    ratios = dict(tokens_per_word=4.0, tokens_per_character=1.5, bytes_per_token=1.0)
    shares = dict(byte_share=1.0, unk_share=0.0, restored_share=1.0, unused_share=None)
    assert found == facts | counts | ratios | shares | {"longest_pieces": []}


@EVERY
def test_the_report_counts_what_one_would_count_by_hand(fitted, name):
    tok, held_out = fitted[name], [*varied_texts(seed=9, count=20), *SCRIPTS, *CODE, ""]
    found = tokenizer.text_stats(tok, iter(held_out), num_longest=5)
    ids = [piece for text in held_out for piece in tok.encode(text).tolist()]
    seen = [tok.normalize(text) for text in held_out]
    spelt = [tok.names()[piece].startswith("<0x") for piece in ids]
    assert (found["texts"], found["tokens"]) == (len(held_out), len(ids))
    assert found["tokens_per_word"] == len(ids) / len(" ".join(seen).split())
    assert found["tokens_per_character"] == len(ids) / sum(map(len, seen))
    assert found["bytes_per_token"] == len("".join(seen).encode()) / len(ids)
    assert found["byte_share"] == sum(spelt) / len(ids)
    same = [tok.decode(tok.encode(text)) == text for text in held_out]
    assert found["restored_share"] == sum(same) / len(same)
    if name != "bytes":
        learnt = range(259, tok.vocab_size)
        assert found["unused_share"] == len(set(learnt) - set(ids)) / len(learnt)
        longest = sorted({len(tok.decode([piece])) for piece in ids}, reverse=True)[0]
        rows = found["longest_pieces"]
        assert [row["characters"] for row in rows] == sorted(
            (len(tok.decode([piece])) for piece in set(ids) & set(learnt)), reverse=True
        )[:5]
        assert rows[0]["characters"] == longest
        times = collections.Counter(tok.decode([piece]) for piece in ids)
        assert all(row["count"] == times[row["piece"]] for row in rows)


@EVERY
def test_reports_of_parts_add_up_to_the_report_of_the_whole(fitted, name):
    parts = [varied_texts(seed=5, count=9), SCRIPTS]
    first, second, whole = (
        tokenizer.text_stats(fitted[name], given) for given in (*parts, sum(parts, []))
    )
    for count in ("texts", "tokens", "words", "characters", "bytes"):
        assert first[count] + second[count] == whole[count] > 0


def test_only_folding_loses_newlines_and_runs_of_spaces(fitted):
    share = {
        name: tokenizer.text_stats(tok, CODE)["restored_share"] for name, tok in fitted.items()
    }
    assert share == {"unigram": 1.0, "bpe": 1.0, "bytes": 1.0, "folded": 0.0}
    assert tokenizer.text_stats(fitted["folded"], ["{a} b"])["restored_share"] == 1.0


def test_the_more_characters_are_covered_the_fewer_are_spelt_in_bytes(tmp_path):
    shares = []
    for coverage in (0.98, 0.995, 1.0):
        options = dict(vocab_size=450, character_coverage=coverage)
        tok = tokenizer.train(texts(), tmp_path / str(coverage), **options)
        shares.append(tokenizer.text_stats(tok, texts())["byte_share"])
    assert shares[0] > shares[1] > shares[2] == 0.0


def test_what_is_lost_is_told(tmp_path):
    found = tokenizer.text_stats(by_hand(tmp_path, ["a", "b"]), ["abab", "aba?", "?"])
    assert found["unk_share"] == 2 / 9 and found["restored_share"] == 1 / 3


def test_texts_without_a_token_are_refused(fitted):
    for nothing in ([], ["", ""]):
        with pytest.raises(ValueError, match=f"the {len(nothing)} texts .* no token; give more"):
            tokenizer.text_stats(fitted["unigram"], nothing)
    blank = tokenizer.text_stats(fitted["unigram"], ["\n \n"])
    assert blank["tokens_per_word"] is None and blank["bytes_per_token"] > 0


def test_the_table_shows_every_figure(fitted):
    found = tokenizer.text_stats(fitted["bytes"], ["ab cd\n", "日本"])
    lines = tokenizer.format_stats(found).splitlines()
    assert lines[0] == "2 texts: 12 tokens, 3 words, 8 characters, 12 bytes"
    shown = [line.split()[0] for line in lines[1:-1]]
    assert shown == ["4.000", "1.500", "1.000", "100.000%", "0.000%", "100.000%", "-"]
    found = tokenizer.text_stats(fitted["unigram"], varied_texts())
    (last,) = [line for line in tokenizer.format_stats(found).splitlines() if "longest" in line]
    assert all(repr(row["piece"]) in last for row in found["longest_pieces"])


def test_rows_that_no_id_has_are_told(fitted):
    said = "259 pieces + 7 sentinels = 266 ids, padded to 384 rows"
    assert tokenizer.describe_sizes(fitted["bytes"], 384) == said
    assert tokenizer.describe_sizes(fitted["bytes"], 512).startswith(
        f"{said}; model.vocab_size=512"
    )
    assert "246 of its rows have no id" in tokenizer.describe_sizes(fitted["bytes"], 512)


# The command. --------------------------------------------------------------------------------


def command(config, workdir) -> int:
    flags = ["--config=configs/base.py", *flat(config), f"--workdir={workdir}"]
    return cli.main(["tokenizer", *flags])


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_command_reports_on_texts_that_were_not_trained_on(tiny_config, tmp_path, capsys, kind):
    config = tiny_config(**{"tokenizer.dir": "", "tokenizer.kind": kind})
    run = runs.make_run(config, tmp_path)
    for _ in range(2):  # trained, then found
        assert command(config, tmp_path) == 0
        out = capsys.readouterr().out
        assert "400 pieces + 10 sentinels = 410 ids, padded to 512 rows\n" in out
        found = json.loads((tmp_path / "tokenizer_report.json").read_text())
        made = tokenizer.Tokenizer(tmp_path / "tokenizer")
        held_out = list(runs.Texts(run, runs.splits(run)[1], 10**6))
        assert (
            found == tokenizer.text_stats(made, held_out) and tokenizer.format_stats(found) in out
        )
        assert tokenizer.read(made.directory)[1]["kind"] == kind
        assert found["texts"] == len(held_out) <= tokenizer.MAX_REPORTED_TEXTS
    names = ("tokenizer.json", "tokenizer.model")
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == list(names)


@pytest.mark.parametrize("kind, pieces", [("unigram", 400), ("bytes", 259)])
def test_without_its_dataset_the_command_writes_nothing(
    tiny_config, tmp_path, capsys, kind, pieces
):
    wanted = {"tokenizer.dir": "", "tokenizer.kind": kind, "tokenizer.vocab_size": pieces}
    config = tiny_config(**wanted | {"data.tfds_dir": str(tmp_path / "nowhere")})
    assert command(config, tmp_path / "run") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "bped"}, "tokenizer.kind='bped' is unknown; .* did you mean 'bpe'"),
        ({"normalization": "nfc"}, "tokenizer.normalization='nfc' is unknown; choose one of"),
        (
            {"kind": "bytes", "vocab_size": 259, "normalization": "nmt_nfkc"},
            "'nmt_nfkc' has no use for bytes, .* with tokenizer.kind='bytes' use identity",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused_before_any_work(
    tiny_config, tmp_path, change, message
):
    changes = {f"tokenizer.{key}": value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        runs.make_run(tiny_config(**{"tokenizer.dir": ""} | changes), tmp_path)


def test_a_tokenizer_of_another_kind_is_not_taken_for_the_one_asked_for(tiny_config, tmp_path):
    asked = {"tokenizer.dir": "", "tokenizer.kind": "bpe"}
    runs.make_tokenizer(runs.make_run(tiny_config(**asked), tmp_path))
    runs.make_run(tiny_config(**asked), tmp_path)
    with pytest.raises(ValueError, match="kind='unigram' differs from the 'bpe' of the tokenizer"):
        runs.make_run(tiny_config(**{"tokenizer.dir": ""}), tmp_path)
