"""Tests of records read from JSONL and TSV files: equal in every format, with readable errors."""

from __future__ import annotations

import bz2
import gzip
import json

import pytest

from lm import sources
from lm.sources import documents, random_access
from tests import tiny_data

ROWS = [{"en": f"the {i} cats", "de": f"die {i} Katzen"} for i in range(200)]


def tsv(rows) -> bytes:
    lines = ["en\tde", *(f"{row['en']}\t{row['de']}" for row in rows)]
    return ("\n".join(lines) + "\n").encode()


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n\n" for row in rows).encode()  # blank lines are skipped


def all_records(source: str, split: str = "train") -> list[dict]:
    records = sources.records(source, split)
    return [records[i] for i in range(len(records))]


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("train.tsv", tsv(ROWS)),
        ("train.jsonl", jsonl(ROWS)),
        ("train.tsv.gz", gzip.compress(tsv(ROWS))),
        ("train.ndjson.bz2", bz2.compress(jsonl(ROWS))),
        ("train.tsv", b"\xef\xbb\xbf" + tsv(ROWS).replace(b"\n", b"\r\n")),
    ],
)
def test_a_table_has_the_same_rows_in_every_format(name, contents, tmp_path):
    (tmp_path / name).write_bytes(contents)
    assert all_records(f"{tmp_path}/{name.replace('train', '{split}')}") == ROWS
    assert all_records(f"{tmp_path}/{name}") == ROWS  # without {split}: train


def test_several_files_and_globs_are_one_split_in_order(tmp_path):
    for number in range(3):
        (tmp_path / f"part{number}.tsv").write_bytes(tsv(ROWS[50 * number :][:50]))
    assert all_records(f"{tmp_path}/part*.tsv") == ROWS[:150]
    assert all_records(f"{tmp_path}/part1.tsv,{tmp_path}/part0.tsv") == ROWS[50:100] + ROWS[:50]


@pytest.mark.parametrize(
    ("cut", "first", "last"),
    [("[:50%]", 0, 100), ("[50%:]", 100, 200), ("[20:30]", 20, 30), ("[-5:]", 195, 200)],
)
def test_a_split_may_be_a_slice(cut, first, last, tmp_path):
    (tmp_path / "a.tsv").write_bytes(tsv(ROWS))
    assert all_records(f"{tmp_path}/a.tsv", f"train{cut}") == ROWS[first:last]


def test_the_held_out_split_is_its_own_file_or_the_end_of_train(tmp_path):
    (tmp_path / "train.tsv").write_bytes(tsv(ROWS))
    by_split = f"{tmp_path}/{{split}}.tsv"
    for source in (f"{tmp_path}/train.tsv", by_split):
        splits = sources.resolve_splits(source, "train", "validation")
        assert splits == ("train[:99%]", "train[99%:]")
        assert all_records(source, splits[0]) + all_records(source, splits[1]) == ROWS
    assert sources.resolve_splits(by_split, "train[:9]", "train[9:]") == ("train[:9]", "train[9:]")
    with pytest.raises(ValueError, match="share examples; use disjoint slices, as train"):
        sources.resolve_splits(by_split, "train[:10]", "train[9:]")
    with pytest.raises(ValueError, match=r"is a slice, and there is no 'validation'; name the sl"):
        sources.resolve_splits(by_split, "train[:10]", "validation")
    (tmp_path / "validation.tsv").write_bytes(tsv(ROWS[:3]))
    assert sources.resolve_splits(by_split, "train", "validation") == ("train", "validation")
    assert all_records(by_split, "validation") == ROWS[:3]


@pytest.mark.parametrize("count", [2, 3, 41, 50, 51, 60, 150, 200])
def test_at_least_one_row_is_held_out_and_the_rest_is_trained_on(count, tmp_path):
    (tmp_path / "train.tsv").write_bytes(tsv(ROWS[:count]))
    train, heldout = sources.resolve_splits(f"{tmp_path}/train.tsv", "train", "validation")
    train_rows, heldout_rows = (
        all_records(f"{tmp_path}/train.tsv", split) for split in (train, heldout)
    )
    assert train_rows + heldout_rows == ROWS[:count]
    assert len(heldout_rows) == max(1, count - round(count * 0.99))
    expected = ("train[:99%]", "train[99%:]") if count > 50 else ("train[:-1]", "train[-1:]")
    assert (train, heldout) == expected, "shards are identified by these strings"


def test_one_example_of_a_small_tfds_dataset_is_held_out(tmp_path):
    tiny_data.write_tfds(tmp_path, "few", {"train": ROWS[:41], "more": ROWS[:60]})
    split = lambda train: sources.resolve_splits("tfds:few", train, "validation", str(tmp_path))
    read = lambda split: [*sources.records("tfds:few", split, str(tmp_path))]
    assert split("more") == ("more[:99%]", "more[99%:]")
    assert split("train") == ("train[:-1]", "train[-1:]")
    assert [read(name) for name in split("train")] == [ROWS[:40], ROWS[40:41]]


@pytest.mark.parametrize("count", [0, 1])
def test_holding_out_needs_two_rows(count, tmp_path):
    (tmp_path / "train.tsv").write_bytes(tsv(ROWS[:count]))
    message = f"train.tsv has {count} of the 2 examples or more that train needs for one to be hel"
    with pytest.raises(ValueError, match=message):
        sources.resolve_splits(f"{tmp_path}/train.tsv", "train", "validation")


@pytest.mark.parametrize(
    ("header", "column"), [("en\tde\tde", "de"), ("a\tb\ta", "a"), ("\ten\t", "")]
)
def test_a_repeated_column_in_the_header_is_refused(header, column, tmp_path):
    (tmp_path / "a.tsv").write_text(f"{header}\n1\t2\t3\n")
    message = f"a.tsv has the column {column!r} more than once in its header; rename one"
    with pytest.raises(ValueError, match=message):
        sources.records(f"{tmp_path}/a.tsv", "train")


def test_the_fingerprint_depends_on_the_bytes_and_not_on_the_path(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.tsv").write_bytes(tsv(ROWS))
    fingerprints = [
        sources.source_fingerprint(f"{tmp_path}/{f}/train.tsv", "train[:9]") for f in "ab"
    ]
    assert fingerprints[0] == fingerprints[1]
    (tmp_path / "b" / "train.tsv").write_bytes(tsv(ROWS[1:]))
    assert sources.source_fingerprint(f"{tmp_path}/b/train.tsv", "train[:9]") != fingerprints[0]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"en\tde\na\tb\nc\n", "line 3 of .* 1 fields where the header has 2; repair or remove it"),
        (b"en\tde\n\xff\tb\n", "line 2 of .* invalid UTF-8 at byte 0"),
        (b"en\tde\n" + b"a" * 40 + b"\tb\n", "line 2 of .* longer than 32 bytes"),
    ],
)
def test_the_error_for_an_invalid_row_names_its_line(contents, message, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", 32)
    (tmp_path / "a.tsv").write_bytes(contents)
    records = sources.records(f"{tmp_path}/a.tsv", "train")
    with pytest.raises(ValueError, match=message):
        records[len(records) - 1]


@pytest.mark.parametrize(
    ("line", "reason"), [(b'{"a"', "invalid JSON"), (b"[1]", "list, not an obj")]
)
def test_the_error_for_invalid_json_names_its_line(line, reason, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\n' + line)
    records = sources.records(f"{tmp_path}/a.jsonl", "train")
    assert records[0] == {"a": 1}
    with pytest.raises(ValueError, match=f"line 3 of .*{reason}"):
        records[1]


@pytest.mark.parametrize(
    ("source", "split", "message"),
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
def test_an_invalid_source_is_refused_with_a_message(source, split, message, tmp_path):
    (tmp_path / "train.tsv").write_bytes(tsv(ROWS))
    (tmp_path / "train.csv").write_bytes(tsv(ROWS))
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(tsv(ROWS))[:-20])
    with pytest.raises(ValueError, match=message):
        random_access.records(f"{tmp_path}/{source}", split)
