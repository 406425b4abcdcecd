"""Building a corpus: nothing is lost, the bytes do not depend on the run, it appears atomically."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lm import cli, shards, sources, tokenizer
from lm.corpus import build, command, dedupe, documents, folder, rules
from lm.shards import processes
from lm.storage import staging

RULES = "min_characters=20,max_characters=3000"
ALL_TRAIN = {"heldout_fraction": 0}
COPIES, NEAR, SHORT, LONG, BAD = 7, 5, 4, 2, 4


def config_dict(source, **changes) -> dict:
    config = dict(rules=RULES, heldout_fraction=0.2, tokenizer="bytes", shards=3) | changes
    return {"source": str(source), **config}


def corpus_config(source, **changes) -> documents.CorpusConfig:
    return documents.CorpusConfig(**config_dict(source, **changes))


def flags_of(source, out, **changes) -> list[str]:
    flags = config_dict(source, **changes) | {"out": out}
    return [f"--{name}={value}" for name, value in flags.items()]


def contents(directory) -> dict[str, bytes]:
    paths = (path for path in pathlib.Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def stored_documents(out, split: str) -> list[str]:
    """The documents of a split, decoded from its tokens."""
    stream = shards.Stream(f"{out}/{split}", shards.read_manifest(f"{out}/{split}"))
    text = tokenizer.Tokenizer(f"{out}/tokenizer").decode(stream.read(0, len(stream)))
    assert text.endswith("\n\n")
    return text[:-2].split("\n\n")


def random_documents(seed: int, count: int) -> list[str]:
    """Distinct documents of several lines and scripts."""
    rng = random.Random(seed)
    spell = lambda: "".join(rng.choices("abcdefgäß東京кот\u0915\u093f{", k=rng.randint(2, 7)))
    line = lambda: " ".join(spell() for _ in range(rng.randint(8, 20))) + "  ."
    return ["\n".join(line() for _ in range(rng.randint(1, 4))) for _ in range(count)]


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    """JSON lines of 200 documents, mixed with all kinds that a corpus leaves out."""
    rng = random.Random(0)
    texts = random_documents(0, 200)
    texts += [f" {rng.choice(texts).upper()}\n" for _ in range(COPIES)]
    longest = sorted(texts[:200], key=len)[-NEAR:]
    texts += [text.replace(text.split()[3], "other", 1) for text in longest]
    texts += ["x" * 19] * SHORT + ["y" * 3001] * LONG
    rows = [json.dumps({"text": text, "id": i}).encode() for i, text in enumerate(texts)]
    rows, tail = rows[:200], rows[200:]
    tail += [b'{"text": "not \xff UTF-8"}', b"{not JSON", b'{"text": 3}', b'{"other": "column"}']
    rng.shuffle(tail)
    for line in tail:
        rows.insert(rng.randrange(1, len(rows)), line)
    return rows


@pytest.fixture(scope="module")
def source_dir(lines, tmp_path_factory):
    """A directory with the lines in three JSONL files, one compressed."""
    directory = tmp_path_factory.mktemp("sources")
    write(directory / "a.jsonl", lines[:70])
    (directory / "b").mkdir()
    write(directory / "b/c.jsonl.gz", lines[70:150])
    write(directory / "b/d.jsonl", lines[150:])
    return directory


def write(path: pathlib.Path, lines: list[bytes]) -> None:
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def built(source_dir, tmp_path_factory):
    """(directory, manifest) of their corpus, built by this process alone."""
    out = tmp_path_factory.mktemp("made") / "corpus"
    manifest, existed = build.build(corpus_config(source_dir), out, workers=1)
    assert not existed
    return out, manifest


def parsed(line: bytes):
    try:
        return json.loads(line)["text"]
    except (ValueError, KeyError):
        return None


def expected_documents(lines: list[bytes]) -> list[str]:
    """Reference: the documents that remain when each is compared with all before it."""
    remaining, observed, earlier = [], set(), []
    for text in map(parsed, lines):
        text = text.strip() if isinstance(text, str) else ""
        if not 20 <= len(text) <= 3000:
            continue
        normalized = dedupe.normalize(text)
        if normalized in observed:
            continue
        observed.add(normalized)
        shingles = set(dedupe.shingles(normalized).tolist())
        similarities = [
            len(shingles & other_set) / len(shingles | other_set) for other_set in earlier
        ]
        earlier.append(shingles)
        assert not any(0.6 < share < 0.85 for share in similarities), (
            "MinHash may misjudge such a pair"
        )
        if max(similarities, default=0) < 0.85:
            remaining.append(text)
    return remaining


# Nothing lost. -------------------------------------------------------------------------------


def test_all_records_are_kept_dropped_or_quarantined(built, lines):
    records, splits = built[1]["records"], built[1]["splits"]
    assert records["read"] == len(lines)
    assert records["dropped"] == {"max_characters": LONG, "min_characters": SHORT}
    assert records["duplicates"] == {"exact": COPIES, "near": NEAR}
    assert records["quarantined"] == BAD
    num_lost = SHORT + LONG + COPIES + NEAR + BAD
    assert sum(counts["documents"] for counts in splits.values()) == len(lines) - num_lost


def test_rules_that_drop_nothing_are_listed(tmp_path):
    write(tmp_path / "in.txt", [b"a b c d e f."])
    config = corpus_config(tmp_path / "in.txt", rules="min_words=2,lorem_ipsum,strip", **ALL_TRAIN)
    records = build.build(config, tmp_path / "out", 1)[0]["records"]
    assert records["dropped"] == {"lorem_ipsum": 0, "min_words": 0, "strip": 0}
    assert records["lines"] == {"min_words": 0, "strip": 0}
    assert records["duplicates"] == {"exact": 0, "near": 0}


def test_the_tokens_decode_to_the_remaining_documents(built, lines):
    out, manifest = built
    texts = {split: stored_documents(out, split) for split in documents.SPLITS}
    assert sorted(texts["train"] + texts["validation"]) == sorted(expected_documents(lines))
    for split, counts in manifest["splits"].items():
        assert counts["documents"] == len(texts[split])
        assert counts["text_bytes"] == sum(len(text.encode()) for text in texts[split])
        assert counts["tokens"] == counts["text_bytes"] + 2 * len(texts[split])


def test_within_a_file_documents_are_in_the_order_of_the_sources(built, lines):
    position = {text: number for number, text in enumerate(expected_documents(lines))}
    for split in documents.SPLITS:
        positions = [position[text] for text in stored_documents(built[0], split)]
        descents = sum(a > b for a, b in zip(positions, positions[1:], strict=False))
        assert descents <= 2, "three files, each in order"


def test_unreadable_records_are_quarantined_with_reason_and_position(built, lines):
    rows = [json.loads(row) for row in (built[0] / folder.QUARANTINE).read_text().splitlines()]
    whole = {"a.jsonl": lines[:70], "b/c.jsonl.gz": lines[70:150], "b/d.jsonl": lines[150:]}
    for row in rows:
        line = whole[row["source"]][row["position"]]
        assert row["excerpt"] == line.decode("utf-8", "backslashreplace")
    assert [(row["source"], row["position"]) for row in rows] == sorted(
        (row["source"], row["position"]) for row in rows
    )
    reasons = " | ".join(sorted(row["reason"] for row in rows))
    assert re.fullmatch(
        r"invalid JSON: .* \| invalid UTF-8 at byte 14 \| no column 'text' \| .*int, not text",
        reasons,
    )


def test_an_enormous_record_is_quarantined_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.documents, "MAX_RECORD_BYTES", 500)
    write(tmp_path / "in.txt", [b"A line of more than twenty.", b"z" * 501, b"", b"Another " * 9])
    config = corpus_config(tmp_path / "in.txt", unit="line", **ALL_TRAIN)
    records = build.build(config, tmp_path / "out", 1)[0]["records"]
    assert records["quarantined"] == records["dropped"]["empty"] == 1 and records["read"] == 4
    row = json.loads((tmp_path / "out" / folder.QUARANTINE).read_text())
    assert row["position"] == 1 and row["reason"].startswith("longer") and "zzz" in row["excerpt"]


HOSTILE = (
    "a\u2028b\u2029c",
    "a\x85b\x0cc\x1cd\x1ee",
    'quote " and \\\\ and \\n',
    "👩‍👩‍👧‍👦 e\u0301\u0327" * 3,
)
HOSTILE += (
    "\u202eright to left\u202c שלום",
    "\ufeffmark \ufeff inside",
    "\U0010ffff\ue000\ufdd0",
    "<pad></s>",
)


def test_hostile_text_decodes_unchanged(tmp_path):
    texts = [f"{text} number {number} of them" for number, text in enumerate(HOSTILE)]
    rows = [
        json.dumps({"text": text}, ensure_ascii=number % 2 == 0)
        for number, text in enumerate(texts)
    ]
    rows += [json.dumps({"text": text}) for text in ("\ud800 half a pair", "a NUL \0 in it")]
    write(tmp_path / "in.jsonl", [row.encode() for row in rows])
    config = corpus_config(tmp_path / "in.jsonl", rules="none", heldout_fraction=0, shards=1)
    records = build.build(config, tmp_path / "out", 1)[0]["records"]
    assert records["read"] == len(texts) + 2 and records["quarantined"] == 2
    assert stored_documents(tmp_path / "out", "train") == [
        text.removeprefix("\ufeff") for text in texts
    ]


def test_the_manifest_lists_everything_that_decides_the_bytes(built, source_dir):
    identity, tokens = built[1]["identity"], tokenizer.Tokenizer(built[0] / "tokenizer")
    assert [source["name"] for source in identity["sources"]] == [
        "a.jsonl", "b/c.jsonl.gz", "b/d.jsonl"
    ]  # fmt: skip
    assert identity["rules"] == RULES and identity["shards"] == 3
    numbers = {"pieces": 259, "size": 359, "rows": 384, "fingerprint": tokens.fingerprint}
    assert built[1]["tokenizer"] == numbers
    assert set(built[1]["packages"]) >= {"sentencepiece", "array_record", "unicode"}
    assert str(source_dir.parent) not in (built[0] / "manifest.json").read_text()


# The same bytes. -----------------------------------------------------------------------------


def test_the_bytes_depend_neither_on_batches_nor_on_the_sources_path(
    built, source_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(build, "BATCH_RECORDS", 7)
    monkeypatch.setattr(build, "SPOOL_BYTES", 300)
    moved = shutil.copytree(source_dir, tmp_path / "moved")
    (tmp_path / "out").mkdir()  # an empty directory is replaced
    build.build(corpus_config(moved), tmp_path / "out", 1)
    assert contents(tmp_path / "out") == contents(built[0])


def test_the_division_of_records_into_files_changes_names_only(built, lines, tmp_path):
    write(tmp_path / "one.jsonl", lines)
    build.build(corpus_config(tmp_path / "one.jsonl"), tmp_path / "out", 1)
    actual, expected = contents(tmp_path / "out"), contents(built[0])
    assert set(actual) == set(expected)
    shards = [name for name in actual if not name.endswith((".json", ".jsonl"))]
    assert len(shards) == 11 and all(actual[name] == expected[name] for name in shards)


def test_a_document_keeps_its_split_and_file_when_documents_are_added(built, lines, tmp_path):
    extra = [json.dumps({"text": text}).encode() for text in random_documents(1, 50)]
    write(tmp_path / "more.jsonl", extra + lines)
    build.build(corpus_config(tmp_path / "more.jsonl"), tmp_path / "out", 1)
    for split in documents.SPLITS:
        before, after = (
            stored_documents(built[0], split),
            stored_documents(tmp_path / "out", split),
        )
        assert [text for text in after if text in set(before)] == before
        assert len(after) > len(before)


def test_splits_and_files_have_the_expected_shares():
    keys = np.frombuffer(b"".join(dedupe.key(str(i)) for i in range(20_000)), dedupe.KEY)
    heldout = documents.is_heldout(keys, 0.1)
    assert abs(heldout.mean() - 0.1) < 0.01
    for members in (keys, keys[heldout]):
        numbers = np.bincount(documents.shard_of(members, 5), minlength=5) / len(members)
        assert np.abs(numbers - 0.2).max() < 0.04
    assert not documents.is_heldout(keys, 0).any()


def test_a_tokenizer_is_trained_on_a_sample_of_many_documents_or_on_all_of_few(monkeypatch):
    keys = np.frombuffer(b"".join(dedupe.key(str(i)) for i in range(20_000)), dedupe.KEY)
    assert documents.is_sampled(keys, len(keys)).all()
    monkeypatch.setattr(documents, "TOKENIZER_DOCUMENTS", 5000)
    sampled = documents.is_sampled(keys, len(keys))
    assert abs(sampled.sum() - 5000) < 300
    assert abs(documents.is_heldout(keys[sampled], 0.5).mean() - 0.5) < 0.03


def test_the_tokenizer_is_trained_on_the_training_split_or_copied(lines, tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", lines)
    train, observed = tokenizer.train, []

    def seeing(texts, *args, **options):
        observed.extend(texts)
        return train(observed, *args, **options)

    monkeypatch.setattr(tokenizer, "train", seeing)
    for kind in ("unigram", "bpe"):
        config = corpus_config(tmp_path / "in.jsonl", tokenizer=kind, vocab_size=320)
        manifest = build.build(config, tmp_path / kind, 1)[0]
        assert observed == stored_documents(tmp_path / kind, "train")
        assert manifest["tokenizer"]["pieces"] == 320
        observed.clear()
    config = corpus_config(tmp_path / "in.jsonl", tokenizer=str(tmp_path / "bpe/tokenizer"))
    build.build(config, tmp_path / "copied", 1)
    actual, expected = contents(tmp_path / "copied"), contents(tmp_path / "bpe")
    assert {name for name in actual if actual[name] != expected[name]} == {
        "manifest.json", "train/manifest.json", "validation/manifest.json"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "num_dropped"), [("none", 0), ("exact", COPIES), ("near", COPIES + NEAR)]
)
def test_only_the_configured_kinds_of_duplicates_are_dropped(kind, num_dropped, lines, tmp_path):
    write(tmp_path / "in.jsonl", lines)
    config = corpus_config(tmp_path / "in.jsonl", dedupe=kind, **ALL_TRAIN)
    manifest = build.build(config, tmp_path / "out", 1)[0]
    assert list(manifest["splits"]) == ["train"]
    assert sum(manifest["records"]["duplicates"].values()) == num_dropped
    remaining = len(lines) - BAD - SHORT - LONG - num_dropped
    assert (
        manifest["splits"]["train"]["documents"]
        == remaining
        == len(stored_documents(tmp_path / "out", "train"))
    )


# Atomic. ------------------------------------------------------------------------


def test_a_finished_corpus_is_found_without_reading_a_record(built, source_dir, monkeypatch):
    earlier = contents(built[0])
    monkeypatch.setattr(sources.SourceFile, "raw_records", None)
    assert build.build(corpus_config(source_dir), built[0], 1) == (built[1], True)
    assert contents(built[0]) == earlier


def test_another_corpus_is_an_error_that_names_the_difference(built, source_dir, tmp_path):
    earlier = contents(built[0])
    changes = {"rules": "none", "dedupe": "exact", "heldout_fraction": 0.1, "shards": 2}
    for key, value in changes.items():
        name = key.removesuffix("_fraction")
        with pytest.raises(ValueError, match=f"was built from another {name}; remove it or set"):
            build.build(corpus_config(source_dir, **{key: value}), built[0], 1)
    with pytest.raises(ValueError, match="another sources"):
        build.build(corpus_config(source_dir, column="id"), built[0], 1)
    write(tmp_path / "in.jsonl", [b'{"text": "other"}'])
    with pytest.raises(ValueError, match="another sources"):
        build.build(corpus_config(tmp_path / "in.jsonl"), built[0], 1)
    with pytest.raises(ValueError, match="exists and has other contents"):
        build.build(corpus_config(source_dir), tmp_path, 1)
    assert contents(built[0]) == earlier


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (build.Spool, "add"),
        (build, "_deduplicate"),
        (folder, "make_tokenizer"),
        (documents, "write_shard"),
        (folder, "write_manifests"),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_build_leaves_nothing(
    owner, name, error, source_dir, built, tmp_path, monkeypatch
):
    plain, calls = getattr(owner, name), []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 2 or name not in ("add", "write_shard"):
            raise error
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        sentence = "no space left for .*; free some" if isinstance(error, OSError) else "^$"
        with pytest.raises((KeyboardInterrupt, OSError), match=sentence):
            build.build(corpus_config(source_dir), tmp_path / "out", 1)
    assert not list(tmp_path.iterdir())
    build.build(corpus_config(source_dir), tmp_path / "out", 1)
    assert contents(tmp_path / "out") == contents(built[0])


def test_two_processes_do_not_build_the_same_corpus_at_once(source_dir, tmp_path):
    staging_dir = tmp_path / ".out.lm-part"
    (staging_dir / "new").mkdir(parents=True)
    (staging_dir / staging.OWNER_MARK).touch()
    (staging_dir / "new" / "unfinished").write_text("work")
    lock = os.open(staging_dir, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is writing .*out; wait for it"):
        build.build(corpus_config(source_dir), tmp_path / "out", 1)
    assert (staging_dir / "new" / "unfinished").exists()
    os.close(lock)
    build.build(corpus_config(source_dir), tmp_path / "out", 1)
    assert not staging_dir.exists() and not (tmp_path / "out" / "unfinished").exists()


def test_a_corpus_finished_by_another_process_is_found_under_the_lock(
    built, source_dir, tmp_path, monkeypatch
):
    plain = staging.staging_dir

    def finish_first(out):
        shutil.copytree(built[0], out)
        return plain(out)

    monkeypatch.setattr(staging, "staging_dir", finish_first)
    monkeypatch.setattr(build, "_read_sources", None)
    assert build.build(corpus_config(source_dir), tmp_path / "out", 1) == (built[1], True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out.part", ".out.lm-part"])
@pytest.mark.parametrize("rule_names", [RULES, "min_characters=9999"])
def test_a_users_directory_is_never_emptied(name, rule_names, source_dir, tmp_path):
    directory = tmp_path / name
    directory.mkdir()
    (directory / "thesis.txt").write_text("years of work")
    with contextlib.suppress(ValueError):
        build.build(corpus_config(source_dir, rules=rule_names), tmp_path / "out", 1)
    assert contents(directory) == {"thesis.txt": b"years of work"}
    if name == ".out.lm-part":
        with pytest.raises(
            ValueError, match=r"\.out\.lm-part is needed .* not empty; move its contents"
        ):
            build.build(corpus_config(source_dir), tmp_path / "out", 1)


def test_the_last_step_is_one_rename(source_dir, built, tmp_path, monkeypatch):
    def stopped(path, target):
        if pathlib.Path(target) == tmp_path / "out":
            assert contents(path) == contents(built[0]), "complete before the rename"
            raise KeyboardInterrupt
        return plain(path, target)

    plain = pathlib.Path.replace
    monkeypatch.setattr(pathlib.Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        build.build(corpus_config(source_dir), tmp_path / "out", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "file_name",
    [
        *("train", "train/manifest.json", "validation/shard-00001-of-00003.array_record"),
        *("quarantine.jsonl", "train/lengths.npy", "validation/counts.npy"),
    ],
)
def test_a_finished_corpus_with_a_missing_file_is_refused(file_name, built, source_dir, tmp_path):
    copy = pathlib.Path(shutil.copytree(built[0], tmp_path / "copy"))
    shutil.rmtree(copy / file_name) if (copy / file_name).is_dir() else (copy / file_name).unlink()
    with pytest.raises(
        ValueError, match=f"{file_name}.*; remove {copy}, and build that corpus again"
    ):
        build.build(corpus_config(source_dir), copy, 1)


@pytest.mark.parametrize(
    "file", ["manifest.json", "train/manifest.json", "tokenizer/tokenizer.json"]
)
def test_a_finished_corpus_with_a_damaged_file_is_one_error_line(file, built, source_dir, tmp_path):
    copy = pathlib.Path(shutil.copytree(built[0], tmp_path / "copy"))
    (copy / file).write_text("{")
    with pytest.raises(ValueError, match=rf"{file} is damaged .*remove {copy}, and .* again\."):
        build.build(corpus_config(source_dir), copy, 1)


def test_another_tokenizer_at_the_same_path_is_another_corpus(source_dir, tmp_path):
    config = corpus_config(source_dir, tokenizer=str(tmp_path / "tokens"), **ALL_TRAIN)
    tokenizer.write_byte_tokenizer(tmp_path / "tokens", 5)
    build.build(config, tmp_path / "out", 1)
    tokenizer.write_byte_tokenizer(tmp_path / "tokens", 6)
    with pytest.raises(ValueError, match="was built from another tokenizer;"):
        build.build(config, tmp_path / "out", 1)


def test_naming_the_default_column_changes_nothing(source_dir, built):
    assert build.build(corpus_config(source_dir, column="text"), built[0], 1)[1]


def test_each_source_file_has_its_own_column(tmp_path):
    from array_record.python import array_record_module

    lines = [json.dumps({"text": f"document {i} " * 9}).encode() for i in range(9)]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", lines)
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "in/b.array_record"), "")
    for line in lines:
        writer.write(line)
    writer.close()
    build.build(corpus_config(tmp_path / "in", **ALL_TRAIN), tmp_path / "out", 1)
    with pytest.raises(ValueError, match="was built from another sources"):
        build.build(corpus_config(tmp_path / "in", column="text", **ALL_TRAIN), tmp_path / "out", 1)


def test_a_staging_directory_recreated_by_another_process_is_not_emptied(tmp_path, monkeypatch):
    """B opens the directory; A removes it; C creates a new one; B locks the removed one."""
    out, real = tmp_path / "out", fcntl.flock
    staging_dir = tmp_path / ".out.lm-part"

    def late(lock, flags):
        shutil.rmtree(staging_dir)
        (staging_dir / "new").mkdir(parents=True)
        return real(lock, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="another process is writing .*out; wait for it"):
        staging.staging_dir(out).__enter__()
    assert (staging_dir / "new").exists()


def test_a_corpus_is_written_to_the_target_of_a_link(source_dir, built, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "none").symlink_to(tmp_path / "later")
    for name, owner in (("link", "real"), ("none", "later")):
        assert not build.build(corpus_config(source_dir), tmp_path / name, 1)[1]
        assert contents(tmp_path / owner) == contents(built[0])
        assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("source", ["{0}", "{0}/**/*.jsonl", "{0}/b/c.jsonl.gz, {0}"])
@pytest.mark.parametrize("out", ["{0}/made", "{0}/b/x/made", "{0}", "{0}/link"])
def test_an_output_inside_the_source_is_refused(source, out, source_dir, tmp_path):
    copy = shutil.copytree(source_dir, tmp_path / "copy")
    (copy / "link").symlink_to(copy / "b" / "there")
    source, out, earlier = source.format(copy), out.format(copy), contents(copy)
    for make in (build.build, lambda config, out, _: command.plan(config, out)):
        with pytest.raises(
            ValueError, match="--out=.* lies in --source=.*; set an --out elsewhere"
        ):
            make(corpus_config(source), out, 1)
    assert contents(copy) == earlier


def test_the_spool_buffers_a_bounded_number_of_short_documents(tmp_path, monkeypatch):
    write(tmp_path / "in.txt", [b"%d" % number for number in range(3000)])
    monkeypatch.setattr(build, "SPOOL_BYTES", 20 * build.DOCUMENT_OVERHEAD)
    monkeypatch.setattr(build, "BATCH_RECORDS", 10)
    buffered, add = [], build.Spool.add
    monkeypatch.setattr(
        build.Spool,
        "add",
        lambda self, docs: buffered.append(len(docs)) or add(self, docs),
    )
    config = corpus_config(tmp_path / "in.txt", unit="line", rules="none", shards=1, **ALL_TRAIN)
    build.build(config, tmp_path / "out", 1)
    assert sum(buffered) == 3000 and max(buffered) <= 20


@pytest.mark.parametrize("moment", ["spool/keys", "train"])
def test_a_killed_run_leaves_nothing_that_reads_as_finished(moment, built, source_dir, tmp_path):
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "lm", "corpus", *flags_of(source_dir, out), "--workers=2"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / ".out.lm-part" / "new" / moment).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    if moment == "train":
        assert subprocess.run(arguments, check=False, capture_output=True).returncode == 0
        assert contents(out) == contents(built[0]), "two workers write the bytes of one"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Workers. ------------------------------------------------------------------------------------


def slow_square(common: int, item: int) -> tuple[int, bool]:
    time.sleep(0.05 * (item == 3))
    return common + item * item, "jax" in sys.modules


def fail_at_two(item: int) -> int:
    if item == 2:
        raise ValueError(f"item {item} is bad")
    return item


def die_at_two(item: int) -> int:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def report_working(_) -> str:
    time.sleep(0.2)
    return "working"


def run_forever() -> None:
    for output in processes.ordered_map(report_working, iter(int, 1), 2):
        print(output, flush=True)


def test_workers_end_with_a_parent_that_is_killed():
    code = "from tests import test_corpus_build; test_corpus_build.run_forever()"
    arguments = [sys.executable, "-c", code]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout.readline() == b"working\n"
        process.kill()
        process.communicate(timeout=10)  # returns once no worker has the pipe open
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_order_and_items_are_consumed_lazily(workers):
    consumed = []
    items = (consumed.append(item) or item for item in range(40))
    for number, result in enumerate(processes.ordered_map(slow_square, items, workers, (5,))):
        assert result == (5 + number * number, workers == 1 and "jax" in sys.modules)
        assert len(consumed) <= number + 2 + processes.AHEAD * workers
    assert number == 39


def test_errors_and_kills_of_workers_are_reported():
    with pytest.raises(ValueError, match="item 2 is bad"):
        list(processes.ordered_map(fail_at_two, range(9), 2))
    with pytest.raises(ValueError, match="one of 2 worker processes was killed.* --workers"):
        list(processes.ordered_map(die_at_two, range(9), 2))


# The command. -----------------------------------------------------------------------------------


def run(*flags: str) -> int:
    return cli.main(["corpus", *flags])


def test_the_command_builds_finds_and_reports(source_dir, built, tmp_path, capsys):
    flags = flags_of(source_dir, tmp_path / "out")
    assert run(*flags, "--dry_run") == 0
    output = capsys.readouterr().out
    assert "b/c.jsonl.gz" in output and "min_characters=20: drop a text" in output
    assert not list(tmp_path.iterdir())
    assert run(*flags, "--workers=1") == 0
    output = capsys.readouterr().out
    assert re.search(rf"duplicates: near +{NEAR}\n.*quarantine.jsonl +{BAD}\n", output)
    assert contents(tmp_path / "out") == contents(built[0])
    assert run(*flags) == 0
    assert capsys.readouterr().out == output.rstrip("\n") + " is already there\n"


def test_the_commands_defaults_are_those_of_the_config():
    plain = documents.CorpusConfig("x")
    for name, value in vars(plain).items():
        assert name == "source" or cli.FLAGS[name][1] == value, name


def test_a_truncated_archive_is_named_with_the_position(source_dir, tmp_path, capsys):
    copy = shutil.copytree(source_dir, tmp_path / "copy")
    path = copy / "b/c.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-300])
    assert run(*flags_of(copy, tmp_path / "out")) == 2
    assert re.search(r"c.jsonl.gz cannot be read after its first \d+ rec", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"column": "txet"}, "has no column 'txet'; name with --column one of text, id"),
        ({"rules": "spam"}, "--rules='spam' is unknown; choose one of"),
        ({"dedupe": "fuzzy"}, "--dedupe='fuzzy' is unknown; choose one of exact, near, none"),
        ({"heldout_fraction": 1.0}, r"--heldout_fraction=1.0 is not in \[0, 1\)"),
        ({"heldout_fraction": 1e-9}, "_fraction=1e-09 leaves validation without a document of 200"),
        ({"shards": -1}, "--shards=-1 is below 0"),
        ({"shards": 100_000}, "--shards=100000 is above 99999; use 0 to choose by size"),
        ({"tokenizer": "unigrm"}, "--tokenizer='unigrm' is neither .* did you mean 'unigram'"),
        ({"tokenizer": "lm"}, "there is no tokenizer in lm"),
        ({"tokenizer": "bpe", "vocab_size": 259}, "--vocab_size=259 must exceed the 259 of bytes"),
        (
            {"tokenizer": "unigram", "vocab_size": 9000},
            "--vocab_size=9000 is more than .* or --vocab_size=[0-9]+.$",
        ),
        (
            {"tokenizer": "unigram", "vocab_size": 260},
            "--vocab_size=260 cannot .*--vocab_size=[0-9]+ or more.$",
        ),
        ({"rules": "min_characters=9999"}, "leaves no document of 222 records: dropped 218 by min"),
    ],
)
def test_a_mistake_is_one_error_line_and_writes_nothing(
    changes, sentence, source_dir, tmp_path, capsys
):
    assert run(*flags_of(source_dir, tmp_path / "out", **changes)) == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert re.search(sentence, output), output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "needs --source=... and --out=..., to build a corpus of any text; or --config"),
        (["--source=x"], "needs --source=... and --out"),
        (["--source=x", "--out=y", "--workers=-1"], "--workers=-1 is below 0"),
        (["--source=x", "--out=y", "--config=configs/demo.py"], "--source takes no --config;"),
        (["--source=x", "--out=y", "--ngram=8"], "--source takes no --ngram; leave that out"),
        (["--config=configs/demo.py", "--workdir=x", "--rules=c4"], "--config takes no --rules;"),
        (["--source=configs", "--out=gs://b/x", "--dry_run"], "--out=gs://b/x is an address; name"),
        (["--config=configs/demo.py"], "needs --source=.* or --config=... and --workdir"),
    ],
)
def test_incompatible_flags_are_one_error_line(flags, sentence, capsys):
    assert run(*flags) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_old_flags_are_refused_with_the_new_name(capsys):
    for name, new_name in (("pieces", "vocab_size"), ("heldout", "heldout_fraction")):
        assert run("--source=x", "--out=y", f"--{name}=1") == 2
        assert f"does not take --{name}; it is now --{new_name}." in capsys.readouterr().err


def test_the_identity_states_every_limit_so_that_defaults_may_change(source_dir):
    config = corpus_config(source_dir, rules="default")
    output = folder.corpus_identity(config, folder.list_files(config))["rules"]
    assert (
        rules.parse_rules(output) == rules.parse_rules("default")
        and output == "min_characters=50,max_characters=1000000"
    )
    assert "data_dir" not in folder.corpus_identity(config, folder.list_files(config))


def test_the_summary_has_all_counts(built):
    output = command.summary(built[1])
    for number in (*built[1]["records"]["dropped"].values(), built[1]["splits"]["train"]["tokens"]):
        assert f" {number:,}" in output
