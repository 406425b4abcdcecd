"""Encoding: nothing is lost, shards appear complete, and equal inputs give equal bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from lm import shards, sources, tasks, tokenizer
from lm.shards import encoding, processes
from lm.storage import staging
from tests import tiny_data

PAIR = shards.PairLengths(inputs=32, targets=16)
WIKIPEDIA, SUMMARY = tasks.TASKS["wikipedia"], tasks.TASKS["docstring_summary"]


@pytest.fixture(scope="module")
def train_shards(tiny_tfds, tiny_tokens, tmp_path_factory):
    """(directory, manifest) of the text of the tiny training split."""
    out = tmp_path_factory.mktemp("shards") / "train"
    return out, shards.prepare(WIKIPEDIA, "train", str(tiny_tfds), tiny_tokens, None, out)


@pytest.fixture(scope="module")
def pairs(tiny_tfds, tiny_tokens, tmp_path_factory):
    """(directory, manifest) of the pairs of the tiny training split."""
    out = tmp_path_factory.mktemp("pairs") / "train"
    form = (SUMMARY, "train", str(tiny_tfds), tiny_tokens, PAIR)
    return out, shards.prepare(*form, out)


def whole(directory, manifest) -> np.ndarray:
    stream = shards.Stream(str(directory), manifest)
    return stream.read(0, len(stream))


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def texts(name: str, root) -> list[dict]:
    task = tasks.TASKS[name]
    records = sources.records(task.source, "train", str(root))
    return [text for i in range(len(records)) for text in task.to_texts(records[i])]


@dataclasses.dataclass(frozen=True)
class Watched(tasks.Task):
    """The Wikipedia task, with only the records that `watch` accepts."""

    watch: Callable = lambda record: True

    def to_texts(self, record):
        return super().to_texts(record) if self.watch(record) else []


def watched(watch) -> Watched:
    return Watched(WIKIPEDIA.source, watch=watch)


def test_the_stream_is_the_documents_each_followed_by_an_empty_line(
    train_shards, tiny_tfds, tiny_tokens
):
    directory, manifest = train_shards
    gap = tiny_tokens.encode("\n\n")
    documents = [tiny_tokens.encode(text["text"]) for text in texts("wikipedia", tiny_tfds)]
    stream = np.concatenate([piece for ids in documents for piece in (ids, gap)])
    np.testing.assert_array_equal(whole(directory, manifest), stream)
    counts = manifest["counts"]
    assert counts["tokens"] == len(stream)
    assert counts["records"] - counts["dropped"] == len(documents) == counts["documents"]


def test_pairs_are_truncated_and_only_a_complete_target_ends_with_eos(
    pairs, tiny_tfds, tiny_tokens
):
    directory, manifest = pairs
    stored, cut = shards.Pairs(str(directory), manifest), 0
    expected = texts("docstring_summary", tiny_tfds)
    assert len(stored) == len(expected) == manifest["counts"]["examples"]
    for index, text in enumerate(expected):
        inputs, targets = stored[index]
        assert tuple(stored.lengths[index]) == (len(inputs), len(targets))
        ids = tiny_tokens.encode(text["inputs"])[: PAIR.inputs - 1]
        np.testing.assert_array_equal(inputs, [*ids, tiny_tokens.eos])
        uncut = tiny_tokens.encode(text["targets"])
        if len(uncut) < PAIR.targets:
            np.testing.assert_array_equal(targets, [*uncut, tiny_tokens.eos])
        else:
            cut += 1
            assert tiny_tokens.eos not in targets
            np.testing.assert_array_equal(targets, uncut[: PAIR.targets])
    assert 0 < cut == manifest["counts"]["truncated"] < len(stored)


class Codes:
    """A tokenizer whose ids are the code points."""

    eos = 1

    def encode(self, text):
        return np.array([ord(letter) for letter in text], np.int32)


@pytest.mark.parametrize("length", [14, 15, 16, 17])
def test_a_target_is_truncated_exactly_when_its_eos_does_not_fit(length):
    text = {"inputs": "summarize: x", "targets": "t" * length}
    pair = encoding._encode_pair(Codes(), SUMMARY, PAIR, text)
    whole = [ord("t")] * length + [Codes.eos]
    np.testing.assert_array_equal(pair.targets, whole[: PAIR.targets])
    assert pair.is_truncated == (False, length + 1 > PAIR.targets)


@pytest.mark.parametrize("kind", ["train_shards", "pairs"])
def test_the_counts_are_those_of_the_targets(kind, request, tiny_tokens):
    directory, manifest = request.getfixturevalue(kind)
    if kind == "train_shards":
        targets = whole(directory, manifest)
    else:
        stored = shards.Pairs(str(directory), manifest)
        targets = np.concatenate([stored[i][1] for i in range(len(stored))])
    expected = np.bincount(targets, minlength=tiny_tokens.size)
    np.testing.assert_array_equal(np.load(directory / shards.COUNTS), expected)


def test_the_same_inputs_give_the_same_bytes_in_any_number_of_processes(
    train_shards, tiny_tfds, tiny_tokens, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        encoding, "SERIAL_DOCUMENTS", 5
    )  # the other 55 documents by worker processes
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: {0, 1})
    again = tmp_path / "train"
    shards.prepare(WIKIPEDIA, "train", str(tiny_tfds), tiny_tokens, None, again)
    assert contents(again) == contents(train_shards[0])


def test_workers_keep_the_order_of_texts_that_take_unequal_time(tiny_tokens, monkeypatch):
    monkeypatch.setattr(encoding, "SERIAL_DOCUMENTS", 5)
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: {0, 1})
    documents = [f"{i} " + "ab cd " * (200_000 if i == 10 else 1) for i in range(400)]
    encoded = encoding._encode(({"text": text} for text in documents), WIKIPEDIA, None, tiny_tokens)
    assert [list(ids) for ids in encoded] == [list(tiny_tokens.encode(text)) for text in documents]


@pytest.mark.parametrize(("most", "files"), [(1, 60), (1000, 6), (10**6, 1)])
def test_files_end_with_whole_documents_and_give_the_same_stream(
    most, files, train_shards, tiny_tfds, tiny_tokens, tmp_path, monkeypatch
):
    monkeypatch.setattr(encoding, "SHARD_TOKENS", most)
    out = tmp_path / "train"
    manifest = shards.prepare(WIKIPEDIA, "train", str(tiny_tfds), tiny_tokens, None, out)
    assert len(manifest["files"]) == files
    assert manifest["counts"] == train_shards[1]["counts"]
    np.testing.assert_array_equal(whole(out, manifest), whole(*train_shards))
    gap = tiny_tokens.encode("\n\n")
    stream, end = shards.Stream(str(out), manifest), 0
    for file in manifest["files"].values():
        end += file["tokens"]
        np.testing.assert_array_equal(stream.read(end - len(gap), end), gap)


def test_files_of_pairs_have_at_most_their_size_and_are_read_in_order(
    pairs, tiny_tfds, tiny_tokens, tmp_path, monkeypatch
):
    monkeypatch.setattr(encoding, "SHARD_EXAMPLES", 25)
    out = tmp_path / "train"
    task = (SUMMARY, "train", str(tiny_tfds), tiny_tokens, PAIR)
    manifest = shards.prepare(*task, out)
    assert [file["examples"] for file in manifest["files"].values()] == [25, 25, 10]
    actual, expected = shards.Pairs(str(out), manifest), shards.Pairs(str(pairs[0]), pairs[1])
    for index in range(len(expected)):
        for ids, expected_ids in zip(actual[index], expected[index], strict=True):
            np.testing.assert_array_equal(ids, expected_ids)


def test_existing_shards_are_used_without_reading_a_record(
    train_shards, tiny_tfds, tiny_tokens, monkeypatch
):
    before = contents(train_shards[0])
    monkeypatch.setattr(sources, "records", None)
    manifest = shards.prepare(
        WIKIPEDIA, "train", str(tiny_tfds), tiny_tokens, None, train_shards[0]
    )
    assert manifest == train_shards[1]
    assert contents(train_shards[0]) == before


def test_shards_that_another_process_finished_meanwhile_are_used(
    train_shards, tiny_tfds, tiny_tokens, tmp_path, monkeypatch
):
    out, real = tmp_path / "train", staging.staging_dir

    def late(path):
        if not path.exists():
            shutil.copytree(train_shards[0], path)
        return real(path)

    monkeypatch.setattr(staging, "staging_dir", late)
    manifest = shards.prepare(WIKIPEDIA, "train", str(tiny_tfds), tiny_tokens, None, out)
    assert manifest == train_shards[1] and contents(out) == contents(train_shards[0])


@pytest.mark.parametrize("document", [1, 30, 59])
def test_an_interrupted_preparation_leaves_nothing(
    document, train_shards, tiny_tfds, tiny_tokens, tmp_path
):
    seen = []

    def watch(record):
        seen.append(record)
        if len(seen) > document:
            raise KeyboardInterrupt
        return True

    out = tmp_path / "train"
    arguments = (WIKIPEDIA, "train", str(tiny_tfds), tiny_tokens, None, out)
    with pytest.raises(KeyboardInterrupt):
        shards.prepare(watched(watch), *arguments[1:])
    assert not out.exists()
    assert not list(tmp_path.rglob(shards.MANIFEST))
    shards.prepare(*arguments)
    assert contents(out) == contents(train_shards[0])
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_shards_of_another_identity_are_an_error(
    train_shards, tiny_tfds, tiny_tokens, tmp_path_factory
):
    out, before = train_shards[0], contents(train_shards[0])
    data, elsewhere = str(tiny_tfds), tmp_path_factory.mktemp("elsewhere")
    tiny_data.write_tfds(elsewhere, "wikipedia/20230601.en", {"train": [{"text": "Another one."}]})
    other_tokens = tokenizer.train(
        [text["text"] for text in texts("wikipedia", tiny_tfds)],
        tmp_path_factory.mktemp("other"),
        vocab_size=380,
        num_extra_ids=10,
    )
    wrong = {
        "form": (WIKIPEDIA, "train", data, tiny_tokens, PAIR),
        "tokenizer": (WIKIPEDIA, "train", data, other_tokens, None),
        "split": (WIKIPEDIA, "validation", data, tiny_tokens, None),
        "task": (tasks.TASKS["pydocs"], "train", data, tiny_tokens, None),
        "dataset": (WIKIPEDIA, "train", str(elsewhere), tiny_tokens, None),
    }
    for key, arguments in wrong.items():
        with pytest.raises(ValueError, match=f"was built from another {key}.*; remove it or set"):
            shards.prepare(*arguments, out)
    assert contents(out) == before


def test_a_split_without_text_is_an_error(tiny_tfds, tiny_tokens, tmp_path):
    none = watched(lambda record: False)
    with pytest.raises(ValueError, match=r"\(60 records\) holds no text; use a wider split"):
        shards.prepare(none, "train", str(tiny_tfds), tiny_tokens, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dropped_records_are_counted_and_not_stored(tiny_tfds, tiny_tokens, tmp_path):
    even, out = watched(lambda record: len(record["text"]) % 2 == 0), tmp_path / "train"
    manifest = shards.prepare(even, "train", str(tiny_tfds), tiny_tokens, None, out)
    odd_texts = [row["text"] for row in texts("pydocs", tiny_tfds) if len(row["text"]) % 2]
    assert manifest["counts"]["dropped"] == len(odd_texts) > 0
    text = tiny_tokens.decode(whole(out, manifest))
    assert not any(document in text for document in odd_texts)


def test_a_missing_shard_is_an_error(train_shards):
    directory, manifest = train_shards
    facts = {"sha256": "", "bytes": 5, "head": ""}
    wrong = manifest | {"files": {**manifest["files"], "shard-00009.array_record": facts}}
    with pytest.raises(ValueError, match=r"shard-00009.array_record has 0 bytes instead of 5; rem"):
        shards.shard_paths(directory, wrong)


def test_a_truncated_shard_is_an_error(train_shards, tmp_path):
    directory, manifest = train_shards
    copy = pathlib.Path(shutil.copytree(directory, tmp_path / "copy"))
    (name, *_) = manifest["files"]
    (copy / name).write_bytes((copy / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{name} has .* remove .*copy, and it is built again"):
        shards.shard_paths(copy, manifest)


def test_shards_do_not_depend_on_the_path_of_their_dataset(
    train_shards, tiny_tfds, tiny_tokens, tmp_path
):
    moved = shutil.copytree(tiny_tfds, tmp_path / "moved")
    arguments = (WIKIPEDIA, "train", str(moved), tiny_tokens, None, train_shards[0])
    assert shards.prepare(*arguments) == train_shards[1]


def test_the_manifest_has_the_hash_of_every_file(train_shards):
    directory, manifest = train_shards
    assert manifest == json.loads((directory / shards.MANIFEST).read_text())
    for name, facts in manifest["files"].items():
        data = (directory / name).read_bytes()
        expected = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        assert {key: facts[key] for key in expected} == expected
    assert set(manifest["files"]) == {path.name for path in directory.glob("*.array_record")}
