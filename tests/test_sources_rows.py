"""Laws of records of files: the same rows whatever the form, and a sentence for what is no row."""

from __future__ import annotations

import bz2
import gzip
import json

import pytest

from lm import sources
from lm.sources import documents, random_access
from tests import tiny_data

ROWS = [{"en": f"the {i} cats", "de": f"die {i} Katzen"} for i in range(200)]


def tsv(some) -> bytes:
    lines = ["en\tde", *(f"{row['en']}\t{row['de']}" for row in some)]
    return ("\n".join(lines) + "\n").encode()


def jsonl(some) -> bytes:
    return "".join(json.dumps(row) + "\n\n" for row in some).encode()  # blank lines are no rows


def every(source: str, split: str = "train") -> list[dict]:
    found = sources.records(source, split)
    return [found[i] for i in range(len(found))]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("train.tsv", tsv(ROWS)),
        ("train.jsonl", jsonl(ROWS)),
        ("train.tsv.gz", gzip.compress(tsv(ROWS))),
        ("train.ndjson.bz2", bz2.compress(jsonl(ROWS))),
        ("train.tsv", b"\xef\xbb\xbf" + tsv(ROWS).replace(b"\n", b"\r\n")),
    ],
)
def test_a_table_has_the_same_rows_in_every_form(name, written, tmp_path):
    (tmp_path / name).write_bytes(written)
    assert every(f"{tmp_path}/{name.replace('train', '{split}')}") == ROWS
    assert every(f"{tmp_path}/{name}") == ROWS  # without {split}: train


def test_several_files_and_globs_are_one_split_in_order(tmp_path):
    for number in range(3):
        (tmp_path / f"part{number}.tsv").write_bytes(tsv(ROWS[50 * number :][:50]))
    assert every(f"{tmp_path}/part*.tsv") == ROWS[:150]
    assert every(f"{tmp_path}/part1.tsv,{tmp_path}/part0.tsv") == ROWS[50:100] + ROWS[:50]


@pytest.mark.parametrize(
    ("cut", "first", "last"),
    [("[:50%]", 0, 100), ("[50%:]", 100, 200), ("[20:30]", 20, 30), ("[-5:]", 195, 200)],
)
def test_a_split_may_be_a_slice(cut, first, last, tmp_path):
    (tmp_path / "a.tsv").write_bytes(tsv(ROWS))
    assert every(f"{tmp_path}/a.tsv", f"train{cut}") == ROWS[first:last]


def test_what_is_held_out_is_the_file_for_it_or_the_end_of_train(tmp_path):
    (tmp_path / "train.tsv").write_bytes(tsv(ROWS))
    one, many = f"{tmp_path}/train.tsv", f"{tmp_path}/{{split}}.tsv"
    for source in (one, many):
        parts = sources.resolve_splits(source, "train", "validation")
        assert parts == ("train[:99%]", "train[99%:]")
        assert every(source, parts[0]) + every(source, parts[1]) == ROWS
    assert sources.resolve_splits(many, "train[:9]", "train[9:]") == ("train[:9]", "train[9:]")
    with pytest.raises(ValueError, match="share examples; use disjoint slices, as train"):
        sources.resolve_splits(many, "train[:10]", "train[9:]")
    with pytest.raises(ValueError, match=r"is a slice, and there is no 'validation'; name the sl"):
        sources.resolve_splits(many, "train[:10]", "validation")
    (tmp_path / "validation.tsv").write_bytes(tsv(ROWS[:3]))
    assert sources.resolve_splits(many, "train", "validation") == ("train", "validation")
    assert every(many, "validation") == ROWS[:3]


@pytest.mark.parametrize("count", [2, 3, 41, 50, 51, 60, 150, 200])
def test_at_least_one_row_is_held_out_and_the_rest_is_learnt(count, tmp_path):
    (tmp_path / "train.tsv").write_bytes(tsv(ROWS[:count]))
    train, heldout = sources.resolve_splits(f"{tmp_path}/train.tsv", "train", "validation")
    learnt, kept = every(f"{tmp_path}/train.tsv", train), every(f"{tmp_path}/train.tsv", heldout)
    assert learnt + kept == ROWS[:count] and len(kept) == max(1, count - round(count * 0.99))
    words = ("train[:99%]", "train[99%:]") if count > 50 else ("train[:-1]", "train[-1:]")
    assert (train, heldout) == words, "shards are known by these words"


def test_of_a_dataset_of_few_examples_one_is_held_out_as_well(tmp_path):
    tiny_data.write_tfds(tmp_path, "few", {"train": ROWS[:41], "more": ROWS[:60]})
    split = lambda train: sources.resolve_splits("tfds:few", train, "validation", str(tmp_path))
    read = lambda split: [*sources.records("tfds:few", split, str(tmp_path))]
    assert split("more") == ("more[:99%]", "more[99%:]")
    assert split("train") == ("train[:-1]", "train[-1:]")
    assert [read(part) for part in split("train")] == [ROWS[:40], ROWS[40:41]]


@pytest.mark.parametrize("count", [0, 1])
def test_of_less_than_two_rows_none_can_be_held_out(count, tmp_path):
    (tmp_path / "train.tsv").write_bytes(tsv(ROWS[:count]))
    sentence = f"train.tsv has {count} of the 2 examples or more that train needs for one to be hel"
    with pytest.raises(ValueError, match=sentence):
        sources.resolve_splits(f"{tmp_path}/train.tsv", "train", "validation")


@pytest.mark.parametrize(
    ("header", "column"), [("en\tde\tde", "de"), ("a\tb\ta", "a"), ("\ten\t", "")]
)
def test_a_column_that_a_header_names_twice_is_refused(header, column, tmp_path):
    (tmp_path / "a.tsv").write_text(f"{header}\n1\t2\t3\n")
    sentence = f"a.tsv has the column {column!r} more than once in its header; give each a name of"
    with pytest.raises(ValueError, match=sentence):
        sources.records(f"{tmp_path}/a.tsv", "train")


def test_a_fingerprint_follows_the_bytes_and_not_the_place(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.tsv").write_bytes(tsv(ROWS))
    known = [sources.source_fingerprint(f"{tmp_path}/{f}/train.tsv", "train[:9]") for f in "ab"]
    assert known[0] == known[1]
    (tmp_path / "b" / "train.tsv").write_bytes(tsv(ROWS[1:]))
    assert sources.source_fingerprint(f"{tmp_path}/b/train.tsv", "train[:9]") != known[0]


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        (b"en\tde\na\tb\nc\n", "line 3 of .* 1 fields where the header has 2; repair or remove it"),
        (b"en\tde\n\xff\tb\n", "line 2 of .* invalid UTF-8 at byte 0"),
        (b"en\tde\n" + b"a" * 40 + b"\tb\n", "line 2 of .* longer than 32 bytes"),
    ],
)
def test_a_line_that_is_no_row_is_named(written, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", 32)
    (tmp_path / "a.tsv").write_bytes(written)
    found = sources.records(f"{tmp_path}/a.tsv", "train")
    with pytest.raises(ValueError, match=sentence):
        found[len(found) - 1]


@pytest.mark.parametrize(("line", "why"), [(b'{"a"', "invalid JSON"), (b"[1]", "list, not an obj")])
def test_a_line_that_is_no_object_is_named(line, why, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\n' + line)
    found = sources.records(f"{tmp_path}/a.jsonl", "train")
    assert found[0] == {"a": 1}
    with pytest.raises(ValueError, match=f"line 3 of .*{why}"):
        found[1]


@pytest.mark.parametrize(
    ("source", "split", "sentence"),
    [
        ("tran.tsv", "train", r"there is no file .*tran.tsv; did you mean 'train.tsv'\?"),
        ("{split}.tsv", "test", r"there is no file .*test.tsv"),
        ("train.tsv", "test", r"is one split, train, and has no 'test'; name a slice of it"),
        ("train.csv", "train", r"train.csv is neither JSONL nor TSV; use"),
        ("train.tsv", "train[9]", r"'train\[9\]' cannot be read as a slice; write it as"),
        ("train.tsv", "train[9:2]", r"holds no example, out of 200; take a wider slice"),
        ("cut.tsv.gz", "train", r"cut.tsv.gz cannot be read: .*; fetch or write it anew"),
    ],
)
def test_a_source_that_cannot_be_is_a_sentence(source, split, sentence, tmp_path):
    (tmp_path / "train.tsv").write_bytes(tsv(ROWS))
    (tmp_path / "train.csv").write_bytes(tsv(ROWS))
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(tsv(ROWS))[:-20])
    with pytest.raises(ValueError, match=sentence):
        random_access.records(f"{tmp_path}/{source}", split)
