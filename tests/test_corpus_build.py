"""Sources to a corpus: nothing lost, the same bytes however it is made, whole or not at all."""

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
COPIES, NEAR, SHORT, LONG, BAD = 7, 5, 4, 2, 4


def asked(source, **changes) -> dict:
    made = dict(rules=RULES, heldout=0.2, tokenizer="bytes", shards=3) | changes
    return {"source": str(source), **made}


def recipe(source, **changes) -> documents.CorpusConfig:
    return documents.CorpusConfig(**asked(source, **changes))


def flags_of(source, out, **changes) -> list[str]:
    given = asked(source, **changes) | {"out": out}
    return [f"--{name}={value}" for name, value in given.items()]


def contents(directory) -> dict[str, bytes]:
    paths = (path for path in pathlib.Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def stored(out, split: str) -> list[str]:
    """The documents of a split, decoded from its tokens."""
    stream = shards.Stream(f"{out}/{split}", shards.read_manifest(f"{out}/{split}"))
    text = tokenizer.Tokenizer(f"{out}/tokenizer").decode(stream.read(0, len(stream)))
    assert text.endswith("\n\n")
    return text[:-2].split("\n\n")


def made_up(seed: int, count: int) -> list[str]:
    """Different documents of several lines and scripts."""
    rng = random.Random(seed)
    spell = lambda: "".join(rng.choices("abcdefgäß東京кот\u0915\u093f{", k=rng.randint(2, 7)))
    line = lambda: " ".join(spell() for _ in range(rng.randint(8, 20))) + "  ."
    return ["\n".join(line() for _ in range(rng.randint(1, 4))) for _ in range(count)]


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    """JSON lines of 200 documents and, among them, all that a corpus leaves out."""
    rng = random.Random(0)
    texts = made_up(0, 200)
    texts += [f" {rng.choice(texts).upper()}\n" for _ in range(COPIES)]
    longest = sorted(texts[:200], key=len)[-NEAR:]
    texts += [text.replace(text.split()[3], "other", 1) for text in longest]
    texts += ["x" * 19] * SHORT + ["y" * 3001] * LONG
    made = [json.dumps({"text": text, "id": i}).encode() for i, text in enumerate(texts)]
    made, tail = made[:200], made[200:]
    tail += [b'{"text": "not \xff UTF-8"}', b"{not JSON", b'{"text": 3}', b'{"other": "column"}']
    rng.shuffle(tail)
    for line in tail:
        made.insert(rng.randrange(1, len(made)), line)
    return made


@pytest.fixture(scope="module")
def folder_of(lines, tmp_path_factory):
    """The lines as JSONL in a folder, in three files of which one is compressed."""
    made = tmp_path_factory.mktemp("sources")
    write(made / "a.jsonl", lines[:70])
    (made / "b").mkdir()
    write(made / "b/c.jsonl.gz", lines[70:150])
    write(made / "b/d.jsonl", lines[150:])
    return made


def write(path: pathlib.Path, lines: list[bytes]) -> None:
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def made(folder_of, tmp_path_factory):
    """(folder, manifest) of their corpus, made by this process alone."""
    out = tmp_path_factory.mktemp("made") / "corpus"
    manifest, found = build.build(recipe(folder_of), out, workers=1)
    assert not found
    return out, manifest


def parsed(line: bytes):
    try:
        return json.loads(line)["text"]
    except (ValueError, KeyError):
        return None


def expected(lines: list[bytes]) -> list[str]:
    """The documents that are to be kept, found the slow way: each compared with all before it."""
    kept, seen, before = [], set(), []
    for text in map(parsed, lines):
        text = text.strip() if isinstance(text, str) else ""
        if not 20 <= len(text) <= 3000:
            continue
        normalised = dedupe.normalize(text)
        if normalised in seen:
            continue
        seen.add(normalised)
        shingles = set(dedupe.shingles(normalised).tolist())
        like = [len(shingles & other) / len(shingles | other) for other in before]
        before.append(shingles)
        assert not any(0.6 < share < 0.85 for share in like), "MinHash might err on such a pair"
        if max(like, default=0) < 0.85:
            kept.append(text)
    return kept


# Nothing lost. -------------------------------------------------------------------------------


def test_all_records_are_kept_dropped_or_quarantined(made, lines):
    records, splits = made[1]["records"], made[1]["splits"]
    assert records["read"] == len(lines)
    assert records["dropped"] == {"max_characters": LONG, "min_characters": SHORT}
    assert records["duplicates"] == {"exact": COPIES, "near": NEAR}
    assert records["quarantined"] == BAD
    lost = SHORT + LONG + COPIES + NEAR + BAD
    assert sum(counts["documents"] for counts in splits.values()) == len(lines) - lost


def test_rules_that_found_nothing_are_counted_too(tmp_path):
    write(tmp_path / "in.txt", [b"a b c d e f."])
    wanted = recipe(tmp_path / "in.txt", rules="min_words=2,lorem_ipsum,strip", heldout=0)
    records = build.build(wanted, tmp_path / "out", 1)[0]["records"]
    assert records["dropped"] == {"lorem_ipsum": 0, "min_words": 0, "strip": 0}
    assert records["lines"] == {"min_words": 0, "strip": 0}
    assert records["duplicates"] == {"exact": 0, "near": 0}


def test_the_tokens_are_the_kept_documents(made, lines):
    out, manifest = made
    texts = {split: stored(out, split) for split in documents.SPLITS}
    assert sorted(texts["train"] + texts["validation"]) == sorted(expected(lines))
    for split, counts in manifest["splits"].items():
        assert counts["documents"] == len(texts[split])
        assert counts["text_bytes"] == sum(len(text.encode()) for text in texts[split])
        assert counts["tokens"] == counts["text_bytes"] + 2 * len(texts[split])


def test_within_a_file_documents_are_in_the_order_of_the_sources(made, lines):
    place = {text: number for number, text in enumerate(expected(lines))}
    for split in documents.SPLITS:
        places = [place[text] for text in stored(made[0], split)]
        descents = sum(a > b for a, b in zip(places, places[1:], strict=False))
        assert descents <= 2, "three files, each in order"


def test_what_cannot_be_read_is_kept_with_its_reason_and_place(made, lines):
    rows = [json.loads(row) for row in (made[0] / folder.QUARANTINE).read_text().splitlines()]
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


def test_an_enormous_record_is_quarantined_and_the_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.documents, "MAX_RECORD_BYTES", 500)
    write(tmp_path / "in.txt", [b"A line of more than twenty.", b"z" * 501, b"", b"Another " * 9])
    wanted = recipe(tmp_path / "in.txt", unit="line", heldout=0)
    records = build.build(wanted, tmp_path / "out", 1)[0]["records"]
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


def test_hostile_text_comes_back_as_it_was(tmp_path):
    texts = [f"{text} number {number} of them" for number, text in enumerate(HOSTILE)]
    rows = [
        json.dumps({"text": text}, ensure_ascii=number % 2 == 0)
        for number, text in enumerate(texts)
    ]
    rows += [json.dumps({"text": text}) for text in ("\ud800 half a pair", "a NUL \0 in it")]
    write(tmp_path / "in.jsonl", [row.encode() for row in rows])
    wanted = recipe(tmp_path / "in.jsonl", rules="none", heldout=0, shards=1)
    records = build.build(wanted, tmp_path / "out", 1)[0]["records"]
    assert records["read"] == len(texts) + 2 and records["quarantined"] == 2
    assert stored(tmp_path / "out", "train") == [text.removeprefix("\ufeff") for text in texts]


def test_the_manifest_says_what_decides_the_bytes(made, folder_of):
    identity, tokens = made[1]["identity"], tokenizer.Tokenizer(made[0] / "tokenizer")
    assert [source["name"] for source in identity["sources"]] == [
        "a.jsonl", "b/c.jsonl.gz", "b/d.jsonl"
    ]  # fmt: skip
    assert identity["rules"] == RULES and identity["shards"] == 3
    numbers = {"pieces": 259, "size": 359, "rows": 384, "fingerprint": tokens.fingerprint}
    assert made[1]["tokenizer"] == numbers
    assert set(made[1]["packages"]) >= {"sentencepiece", "array_record", "unicode"}
    assert str(folder_of.parent) not in (made[0] / "manifest.json").read_text()


# The same bytes. -----------------------------------------------------------------------------


def test_the_bytes_depend_neither_on_batches_nor_on_where_the_sources_lie(
    made, folder_of, tmp_path, monkeypatch
):
    monkeypatch.setattr(build, "BATCH_RECORDS", 7)
    monkeypatch.setattr(build, "SPOOLED", 300)
    moved = shutil.copytree(folder_of, tmp_path / "moved")
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    build.build(recipe(moved), tmp_path / "out", 1)
    assert contents(tmp_path / "out") == contents(made[0])


def test_how_records_are_dealt_over_files_changes_names_alone(made, lines, tmp_path):
    write(tmp_path / "one.jsonl", lines)
    build.build(recipe(tmp_path / "one.jsonl"), tmp_path / "out", 1)
    ours, theirs = contents(tmp_path / "out"), contents(made[0])
    assert set(ours) == set(theirs)
    shards = [name for name in ours if not name.endswith((".json", ".jsonl"))]
    assert len(shards) == 11 and all(ours[name] == theirs[name] for name in shards)


def test_a_document_stays_in_its_split_and_file_whatever_comes_beside_it(made, lines, tmp_path):
    more = [json.dumps({"text": text}).encode() for text in made_up(1, 50)]
    write(tmp_path / "more.jsonl", more + lines)
    build.build(recipe(tmp_path / "more.jsonl"), tmp_path / "out", 1)
    for split in documents.SPLITS:
        before, after = stored(made[0], split), stored(tmp_path / "out", split)
        assert [text for text in after if text in set(before)] == before
        assert len(after) > len(before)


def test_splits_and_files_get_their_shares():
    keys = np.frombuffer(b"".join(dedupe.key(str(i)) for i in range(20_000)), dedupe.KEY)
    heldout = documents.is_heldout(keys, 0.1)
    assert abs(heldout.mean() - 0.1) < 0.01
    for own in (keys, keys[heldout]):
        numbers = np.bincount(documents.shard_of(own, 5), minlength=5) / len(own)
        assert np.abs(numbers - 0.2).max() < 0.04
    assert not documents.is_heldout(keys, 0).any()


def test_a_tokenizer_learns_from_a_share_of_many_documents_and_from_all_of_few(monkeypatch):
    keys = np.frombuffer(b"".join(dedupe.key(str(i)) for i in range(20_000)), dedupe.KEY)
    assert documents.is_sampled(keys, len(keys)).all()
    monkeypatch.setattr(documents, "SAMPLE", 5000)
    sampled = documents.is_sampled(keys, len(keys))
    assert abs(sampled.sum() - 5000) < 300
    assert abs(documents.is_heldout(keys[sampled], 0.5).mean() - 0.5) < 0.03


def test_the_tokenizer_is_trained_on_the_training_split_or_copied(lines, tmp_path, monkeypatch):
    write(tmp_path / "in.jsonl", lines)
    train, seen = tokenizer.train, []

    def seeing(texts, *args, **options):
        seen.extend(texts)
        return train(seen, *args, **options)

    monkeypatch.setattr(tokenizer, "train", seeing)
    for kind in ("unigram", "bpe"):
        wanted = recipe(tmp_path / "in.jsonl", tokenizer=kind, pieces=320)
        manifest = build.build(wanted, tmp_path / kind, 1)[0]
        assert seen == stored(tmp_path / kind, "train")
        assert manifest["tokenizer"]["pieces"] == 320
        seen.clear()
    wanted = recipe(tmp_path / "in.jsonl", tokenizer=str(tmp_path / "bpe/tokenizer"))
    build.build(wanted, tmp_path / "copied", 1)
    ours, theirs = contents(tmp_path / "copied"), contents(tmp_path / "bpe")
    assert {name for name in ours if ours[name] != theirs[name]} == {
        "manifest.json", "train/manifest.json", "validation/manifest.json"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "kept"), [("none", 0), ("exact", COPIES), ("near", COPIES + NEAR)]
)
def test_only_the_duplicates_asked_for_are_dropped(kind, kept, lines, tmp_path):
    write(tmp_path / "in.jsonl", lines)
    wanted = recipe(tmp_path / "in.jsonl", dedupe=kind, heldout=0)
    manifest = build.build(wanted, tmp_path / "out", 1)[0]
    assert list(manifest["splits"]) == ["train"]
    assert sum(manifest["records"]["duplicates"].values()) == kept
    left = len(lines) - BAD - SHORT - LONG - kept
    assert (
        manifest["splits"]["train"]["documents"] == left == len(stored(tmp_path / "out", "train"))
    )


# Whole or not at all. ------------------------------------------------------------------------


def test_a_finished_corpus_is_found_without_reading_a_record(made, folder_of, monkeypatch):
    before = contents(made[0])
    monkeypatch.setattr(sources.SourceFile, "raw_records", None)
    assert build.build(recipe(folder_of), made[0], 1) == (made[1], True)
    assert contents(made[0]) == before


def test_another_corpus_is_refused_by_what_differs(made, folder_of, tmp_path):
    before = contents(made[0])
    changes = {"rules": "none", "dedupe": "exact", "heldout": 0.1, "shards": 2}
    for key, value in changes.items():
        with pytest.raises(ValueError, match=f"holds a corpus of other {key}; remove it or set"):
            build.build(recipe(folder_of, **{key: value}), made[0], 1)
    with pytest.raises(ValueError, match="other sources"):
        build.build(recipe(folder_of, column="id"), made[0], 1)
    write(tmp_path / "in.jsonl", [b'{"text": "other"}'])
    with pytest.raises(ValueError, match="other sources"):
        build.build(recipe(tmp_path / "in.jsonl"), made[0], 1)
    with pytest.raises(ValueError, match="is there already and is no corpus"):
        build.build(recipe(folder_of), tmp_path, 1)
    assert contents(made[0]) == before


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (build.Spool, "add"),
        (build, "_kept"),
        (folder, "make_tokenizer"),
        (documents, "write_shard"),
        (folder, "finish_corpus"),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_what_stops_it_leaves_nothing(place, name, error, folder_of, made, tmp_path, monkeypatch):
    plain, calls = getattr(place, name), []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 2 or name not in ("add", "write_shard"):
            raise error
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stopping)
        sentence = "no space left for .*; free some" if isinstance(error, OSError) else "^$"
        with pytest.raises((KeyboardInterrupt, OSError), match=sentence):
            build.build(recipe(folder_of), tmp_path / "out", 1)
    assert not list(tmp_path.iterdir())
    build.build(recipe(folder_of), tmp_path / "out", 1)
    assert contents(tmp_path / "out") == contents(made[0])


def test_two_processes_do_not_make_the_same_corpus_at_once(folder_of, tmp_path):
    room = tmp_path / ".out.lm-part"
    (room / "new").mkdir(parents=True)
    (room / staging.OWNER_MARK).touch()
    (room / "new" / "theirs").write_text("work")
    held = os.open(room, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is making .*out; wait for it"):
        build.build(recipe(folder_of), tmp_path / "out", 1)
    assert (room / "new" / "theirs").exists()
    os.close(held)
    build.build(recipe(folder_of), tmp_path / "out", 1)
    assert not room.exists() and not (tmp_path / "out" / "theirs").exists()


def test_what_a_quicker_process_has_made_is_found_under_the_lock(
    made, folder_of, tmp_path, monkeypatch
):
    looked, plain = [], folder.read_finished_corpus

    def finished(out, identity):
        looked.append(out)
        if len(looked) == 2:
            shutil.copytree(made[0], out)
        return plain(out, identity)

    monkeypatch.setattr(folder, "read_finished_corpus", finished)
    monkeypatch.setattr(build, "_gather", None)
    assert build.build(recipe(folder_of), tmp_path / "out", 1) == (made[1], True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out.part", ".out.lm-part"])
@pytest.mark.parametrize("rules_", [RULES, "min_characters=9999"])
def test_a_folder_of_the_users_own_is_never_emptied(name, rules_, folder_of, tmp_path):
    own = tmp_path / name
    own.mkdir()
    (own / "thesis.txt").write_text("years of work")
    with contextlib.suppress(ValueError):
        build.build(recipe(folder_of, rules=rules_), tmp_path / "out", 1)
    assert contents(own) == {"thesis.txt": b"years of work"}
    if name == ".out.lm-part":
        with pytest.raises(
            ValueError, match=r"\.out\.lm-part is needed .* something else; move it"
        ):
            build.build(recipe(folder_of), tmp_path / "out", 1)


def test_the_last_step_is_one_renaming(folder_of, made, tmp_path, monkeypatch):
    def stopped(path, target):
        if pathlib.Path(target) == tmp_path / "out":
            assert contents(path) == contents(made[0]), "all of it is there before"
            raise KeyboardInterrupt
        return plain(path, target)

    plain = pathlib.Path.replace
    monkeypatch.setattr(pathlib.Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        build.build(recipe(folder_of), tmp_path / "out", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "lost",
    [
        *("train", "train/manifest.json", "validation/shard-00001-of-00003.array_record"),
        *("quarantine.jsonl", "train/lengths.npy", "validation/counts.npy"),
    ],
)
def test_a_finished_corpus_with_a_part_gone_is_not_there_already(lost, made, folder_of, tmp_path):
    copy = pathlib.Path(shutil.copytree(made[0], tmp_path / "copy"))
    shutil.rmtree(copy / lost) if (copy / lost).is_dir() else (copy / lost).unlink()
    with pytest.raises(ValueError, match=f"{lost}.*; remove {copy}, and make that corpus anew"):
        build.build(recipe(folder_of), copy, 1)


@pytest.mark.parametrize(
    "file", ["manifest.json", "train/manifest.json", "tokenizer/tokenizer.json"]
)
def test_a_finished_corpus_with_a_damaged_part_is_a_sentence(file, made, folder_of, tmp_path):
    copy = pathlib.Path(shutil.copytree(made[0], tmp_path / "copy"))
    (copy / file).write_text("{")
    with pytest.raises(ValueError, match=rf"{file} is damaged .*remove {copy}, and .* anew\."):
        build.build(recipe(folder_of), copy, 1)


def test_another_tokenizer_at_the_same_place_makes_another_corpus(folder_of, tmp_path):
    wanted = recipe(folder_of, tokenizer=str(tmp_path / "tokens"), heldout=0)
    tokenizer.write_byte_tokenizer(tmp_path / "tokens", 5)
    build.build(wanted, tmp_path / "out", 1)
    tokenizer.write_byte_tokenizer(tmp_path / "tokens", 6)
    with pytest.raises(ValueError, match="holds a corpus of other tokenizer;"):
        build.build(wanted, tmp_path / "out", 1)


def test_a_column_that_is_named_is_the_one_of_a_default(folder_of, made):
    assert build.build(recipe(folder_of, column="text"), made[0], 1)[1]


def test_a_column_is_a_matter_of_each_source(tmp_path):
    from array_record.python import array_record_module

    lines = [json.dumps({"text": f"document {i} " * 9}).encode() for i in range(9)]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", lines)
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "in/b.array_record"), "")
    for line in lines:
        writer.write(line)
    writer.close()
    build.build(recipe(tmp_path / "in", heldout=0), tmp_path / "out", 1)
    with pytest.raises(ValueError, match="holds a corpus of other sources"):
        build.build(recipe(tmp_path / "in", heldout=0, column="text"), tmp_path / "out", 1)


def test_a_workshop_that_another_process_made_anew_is_not_emptied(tmp_path, monkeypatch):
    """B opens the folder; A ends and removes it; C makes a new one; B locks what is gone."""
    out, real = tmp_path / "out", fcntl.flock
    room = tmp_path / ".out.lm-part"

    def late(lock, how):
        shutil.rmtree(room)
        (room / "new").mkdir(parents=True)
        return real(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="another process is making .*out; wait for it"):
        staging.staging_dir(out).__enter__()
    assert (room / "new").exists()


def test_a_link_is_made_where_it_points(folder_of, made, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "none").symlink_to(tmp_path / "later")
    for name, place in (("link", "real"), ("none", "later")):
        assert not build.build(recipe(folder_of), tmp_path / name, 1)[1]
        assert contents(tmp_path / place) == contents(made[0])
        assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("source", ["{0}", "{0}/**/*.jsonl", "{0}/b/c.jsonl.gz, {0}"])
@pytest.mark.parametrize("out", ["{0}/made", "{0}/b/x/made", "{0}", "{0}/link"])
def test_a_corpus_is_not_made_where_its_source_would_read_it(source, out, folder_of, tmp_path):
    copy = shutil.copytree(folder_of, tmp_path / "copy")
    (copy / "link").symlink_to(copy / "b" / "there")
    source, out, before = source.format(copy), out.format(copy), contents(copy)
    for make in (build.build, lambda recipe, out, _: command.plan(recipe, out)):
        with pytest.raises(
            ValueError, match="--out=.* lies in --source=.*; set an --out elsewhere"
        ):
            make(recipe(source), out, 1)
    assert contents(copy) == before


def test_short_documents_are_written_before_they_are_many(tmp_path, monkeypatch):
    write(tmp_path / "in.txt", [b"%d" % number for number in range(3000)])
    monkeypatch.setattr(build, "SPOOLED", 20 * build.HELD)
    monkeypatch.setattr(build, "BATCH_RECORDS", 10)
    held, add = [], build.Spool.add
    monkeypatch.setattr(
        build.Spool, "add", lambda self, found: held.append(len(found)) or add(self, found)
    )
    wanted = recipe(tmp_path / "in.txt", unit="line", rules="none", heldout=0, shards=1)
    build.build(wanted, tmp_path / "out", 1)
    assert sum(held) == 3000 and max(held) <= 20


@pytest.mark.parametrize("moment", ["spool/keys", "train"])
def test_a_killed_run_leaves_nothing_that_reads_as_finished(moment, made, folder_of, tmp_path):
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "lm", "corpus", *flags_of(folder_of, out), "--workers=2"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / ".out.lm-part" / "new" / moment).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    if moment == "train":
        assert subprocess.run(arguments, check=False, capture_output=True).returncode == 0
        assert contents(out) == contents(made[0]), "two workers make the bytes of one"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Workers. ------------------------------------------------------------------------------------


def slow_square(common: int, item: int) -> tuple[int, bool]:
    time.sleep(0.05 * (item == 3))
    return common + item * item, "jax" in sys.modules


def failing(item: int) -> int:
    if item == 2:
        raise ValueError(f"item {item} is bad")
    return item


def dying(item: int) -> int:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def telling(_) -> str:
    time.sleep(0.2)
    return "working"


def work_for_ever() -> None:
    for said in processes.ordered_map(telling, iter(int, 1), 2):
        print(said, flush=True)


def test_workers_end_with_a_parent_that_is_killed():
    code = "from tests import test_corpus_build; test_corpus_build.work_for_ever()"
    arguments = [sys.executable, "-c", code]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout.readline() == b"working\n"
        process.kill()
        process.communicate(timeout=10)  # ends when no worker holds the pipe any more
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_order_and_items_are_taken_as_they_are_needed(workers):
    taken = []
    items = (taken.append(item) or item for item in range(40))
    for number, result in enumerate(processes.ordered_map(slow_square, items, workers, (5,))):
        assert result == (5 + number * number, workers == 1 and "jax" in sys.modules)
        assert len(taken) <= number + 2 + processes.AHEAD * workers
    assert number == 39


def test_what_happens_to_a_worker_is_said():
    with pytest.raises(ValueError, match="item 2 is bad"):
        list(processes.ordered_map(failing, range(9), 2))
    with pytest.raises(ValueError, match="one of 2 worker processes was killed.* --workers"):
        list(processes.ordered_map(dying, range(9), 2))


# The door. -----------------------------------------------------------------------------------


def run(*flags: str) -> int:
    return cli.main(["corpus", *flags])


def test_the_door_builds_finds_and_tells(folder_of, made, tmp_path, capsys):
    flags = flags_of(folder_of, tmp_path / "out")
    assert run(*flags, "--dry_run") == 0
    said = capsys.readouterr().out
    assert "b/c.jsonl.gz" in said and "min_characters=20: drop a text" in said
    assert not list(tmp_path.iterdir())
    assert run(*flags, "--workers=1") == 0
    said = capsys.readouterr().out
    assert re.search(rf"duplicates: near +{NEAR}\n.*quarantine.jsonl +{BAD}\n", said)
    assert contents(tmp_path / "out") == contents(made[0])
    assert run(*flags) == 0
    assert capsys.readouterr().out == said.rstrip("\n") + " is already there\n"


def test_the_doors_defaults_are_the_recipes():
    plain = documents.CorpusConfig("x")
    for name, value in vars(plain).items():
        assert name == "source" or cli.FLAGS[name][1] == value, name


def test_a_truncated_archive_stops_with_its_name_and_place(folder_of, tmp_path, capsys):
    copy = shutil.copytree(folder_of, tmp_path / "copy")
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
        ({"heldout": 1.0}, r"--heldout=1.0 is not a share in \[0, 1\); use 0.01"),
        ({"heldout": 1e-9}, "--heldout=1e-09 leaves validation without a document of 200"),
        ({"shards": -1}, "--shards=-1 is below 0"),
        ({"shards": 100_000}, "--shards=100000 is above 99999; use 0 to choose by size"),
        ({"tokenizer": "unigrm"}, "--tokenizer='unigrm' is neither .* did you mean 'unigram'"),
        ({"tokenizer": "lm"}, "there is no tokenizer in lm"),
        ({"tokenizer": "bpe", "pieces": 259}, "--pieces=259 has no room beside the 259 of bytes"),
        (
            {"tokenizer": "unigram", "pieces": 9000},
            "--pieces=9000 is more than .* or --pieces=[0-9]+.$",
        ),
        (
            {"tokenizer": "unigram", "pieces": 260},
            "--pieces=260 cannot .*--pieces=[0-9]+ or more.$",
        ),
        ({"rules": "min_characters=9999"}, "leaves no document of 222 records: dropped 218 by min"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    changes, sentence, folder_of, tmp_path, capsys
):
    assert run(*flags_of(folder_of, tmp_path / "out", **changes)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(sentence, said), said
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
def test_flags_that_do_not_go_together_are_a_sentence(flags, sentence, capsys):
    assert run(*flags) == 2
    assert re.search(sentence, capsys.readouterr().err)


def test_a_recipe_names_every_rule_with_its_limit_so_that_defaults_may_change(folder_of):
    wanted = recipe(folder_of, rules="default")
    said = folder.corpus_identity(wanted, build.parts_of(wanted))["rules"]
    assert (
        rules.parse_rules(said) == rules.parse_rules("default")
        and said == "min_characters=50,max_characters=1000000"
    )
    assert "data_dir" not in folder.corpus_identity(wanted, build.parts_of(wanted))


def test_the_summary_names_all_counts(made):
    said = command.summary(made[1])
    for number in (*made[1]["records"]["dropped"].values(), made[1]["splits"]["train"]["tokens"]):
        assert f" {number:,}" in said
