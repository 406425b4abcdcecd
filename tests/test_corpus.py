"""Laws of the token shards: nothing lost, nothing half, the same bytes from the same inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from lm import corpus, sources, tasks, tokenizer
from tests import conftest

FORM = corpus.Form(raw=34)
PAIR = corpus.Form(inputs=32, targets=16)


@pytest.fixture(scope="module")
def shards(tiny_tfds, tiny_tokens, tmp_path_factory):
    """(directory, manifest) of the chunks of the tiny training split."""
    out = tmp_path_factory.mktemp("shards") / "train"
    return out, corpus.prepare("wikipedia", "train", str(tiny_tfds), tiny_tokens, FORM, out)


@pytest.fixture(scope="module")
def pairs(tiny_tfds, tiny_tokens, tmp_path_factory):
    """(directory, manifest) of the pairs of the tiny training split."""
    out = tmp_path_factory.mktemp("pairs") / "train"
    form = ("docstring_summary", "train", str(tiny_tfds), tiny_tokens, PAIR)
    return out, corpus.prepare(*form, out)


def stored(directory, manifest) -> list[bytes]:
    from array_record.python import array_record_module

    found = []
    for path in corpus.files_of(directory, manifest):
        found += array_record_module.ArrayRecordReader(path).read_all()
    return found


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def texts(task: str, root) -> list[dict]:
    records = sources.tfds_records(tasks.task_named(task).dataset, "train", str(root))
    made = (tasks.task_named(task).to_text(records[i]) for i in range(len(records)))
    return [text for text in made if text]


def test_chunks_and_the_tail_are_the_documents_joined_by_an_empty_line(
    shards, tiny_tfds, tiny_tokens
):
    directory, manifest = shards
    gap = tiny_tokens.encode("\n\n")
    documents = [tiny_tokens.encode(text["text"]) for text in texts("wikipedia", tiny_tfds)]
    stream = np.concatenate([part for ids in documents for part in (ids, gap)])
    chunks = [corpus.read_example(data) for data in stored(directory, manifest)]
    assert all(targets is None and len(ids) == FORM.raw for ids, targets in chunks)
    whole = np.concatenate([ids for ids, _ in chunks])
    np.testing.assert_array_equal(whole, stream[: len(whole)])
    counts = manifest["counts"]
    assert counts["tail"] == len(stream) - len(whole) < FORM.raw
    assert counts["tokens"] == len(whole) == counts["examples"] * FORM.raw
    assert counts["documents"] - counts["dropped"] == len(documents)


@pytest.mark.parametrize("raw", [2, 7, 1000])
def test_whatever_the_chunk_the_stream_is_the_same(raw):
    rng = np.random.default_rng(raw)
    documents = [rng.integers(3, 400, rng.integers(0, 40)) for _ in range(50)]
    gap, counts = np.array([9, 9]), {}
    encoded = ((ids,) for ids in documents)
    chunks = list(corpus._chunks(encoded, corpus.Form(raw=raw), gap, counts))
    stream = np.concatenate([part for ids in documents for part in (ids, gap)])
    assert len(chunks) == len(stream) // raw
    joined = np.concatenate([np.empty(0, int), *(chunk[1:] for chunk in chunks)])
    np.testing.assert_array_equal(joined, stream[: len(stream) - counts["tail"]])


def test_a_pair_is_its_texts_cut_and_only_an_uncut_target_ends_with_eos(
    pairs, tiny_tfds, tiny_tokens
):
    directory, manifest = pairs
    found, cut = stored(directory, manifest), 0
    expected = texts("docstring_summary", tiny_tfds)
    for data, text in zip(found, expected, strict=True):
        inputs, targets = corpus.read_example(data)
        ids = tiny_tokens.encode(text["inputs"])[: PAIR.inputs - 1]
        np.testing.assert_array_equal(inputs, [*ids, tiny_tokens.eos])
        whole = tiny_tokens.encode(text["targets"])
        if len(whole) < PAIR.targets:
            np.testing.assert_array_equal(targets, [*whole, tiny_tokens.eos])
        else:
            cut += 1
            assert tiny_tokens.eos not in targets
            np.testing.assert_array_equal(targets, whole[: PAIR.targets])
    assert 0 < cut == manifest["counts"]["truncated"] < len(found)


@pytest.mark.parametrize("length", [14, 15, 16, 17])
def test_a_target_is_truncated_exactly_when_its_eos_does_not_fit(length):
    counts, ids = {"truncated": 0}, np.arange(100, 100 + length)
    (example,) = corpus._pairs([(ids[:3], ids)], PAIR, 1, counts)
    _, targets = corpus.read_example(example.astype("<i4").tobytes())
    fits = length + 1 <= PAIR.targets
    assert (targets[-1] == 1) == fits == (counts["truncated"] == 0)


@pytest.mark.parametrize("kind", ["shards", "pairs"])
def test_the_counts_are_those_of_the_targets(kind, request, tiny_tokens):
    directory, manifest = request.getfixturevalue(kind)
    targets = []
    for data in stored(directory, manifest):
        first, second = corpus.read_example(data)
        targets.append(first if second is None else second)
    expected = np.bincount(np.concatenate(targets), minlength=tiny_tokens.size)
    np.testing.assert_array_equal(np.load(directory / corpus.COUNTS), expected)


def test_the_same_inputs_give_the_same_bytes_in_any_number_of_processes(
    shards, tiny_tfds, tiny_tokens, tmp_path, monkeypatch
):
    monkeypatch.setattr(corpus, "SERIAL", 5)  # the other 55 documents by worker processes
    monkeypatch.setattr(corpus.os, "cpu_count", lambda: 2)
    again = tmp_path / "train"
    corpus.prepare("wikipedia", "train", str(tiny_tfds), tiny_tokens, FORM, again)
    assert contents(again) == contents(shards[0])


def test_workers_keep_the_order_of_texts_that_take_unequal_time(tiny_tokens, monkeypatch):
    monkeypatch.setattr(corpus, "SERIAL", 5)
    monkeypatch.setattr(corpus.os, "cpu_count", lambda: 2)
    texts = [(f"{i} " + "ab cd " * (200_000 if i == 10 else 1),) for i in range(400)]
    encoded = [tuple(map(list, ids)) for ids in corpus._encode(texts, tiny_tokens)]
    assert encoded == [(list(tiny_tokens.encode(text)),) for (text,) in texts]


def test_shards_are_cut_at_their_size_and_read_in_order(
    shards, tiny_tfds, tiny_tokens, tmp_path, monkeypatch
):
    monkeypatch.setattr(corpus, "SHARD_EXAMPLES", 50)
    out = tmp_path / "train"
    manifest = corpus.prepare("wikipedia", "train", str(tiny_tfds), tiny_tokens, FORM, out)
    assert len(manifest["files"]) == -(-manifest["counts"]["examples"] // 50) > 1
    assert stored(out, manifest) == stored(*shards)


def test_shards_that_are_there_are_found_without_reading_a_record(
    shards, tiny_tfds, tiny_tokens, monkeypatch
):
    before = contents(shards[0])
    monkeypatch.setattr(sources, "tfds_records", None)
    found = corpus.prepare("wikipedia", "train", str(tiny_tfds), tiny_tokens, FORM, shards[0])
    assert found == shards[1]
    assert contents(shards[0]) == before


@pytest.mark.parametrize("document", [1, 30, 59])
def test_an_interrupted_preparation_leaves_nothing_that_reads_as_finished(
    document, shards, tiny_tfds, tiny_tokens, tmp_path, monkeypatch
):
    task, seen = tasks.TASKS["wikipedia"], []

    def to_text(record):
        seen.append(record)
        if len(seen) > document:
            raise KeyboardInterrupt
        return task.to_text(record)

    out = tmp_path / "train"
    arguments = ("wikipedia", "train", str(tiny_tfds), tiny_tokens, FORM, out)
    with monkeypatch.context() as patch:
        patch.setitem(tasks.TASKS, "wikipedia", dataclasses.replace(task, to_text=to_text))
        with pytest.raises(KeyboardInterrupt):
            corpus.prepare(*arguments)
    assert not out.exists()
    assert not list(tmp_path.rglob(corpus.MANIFEST))
    corpus.prepare(*arguments)
    assert contents(out) == contents(shards[0])
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_shards_of_something_else_are_refused_by_name(
    shards, tiny_tfds, tiny_tokens, tmp_path_factory
):
    out, before = shards[0], contents(shards[0])
    data, elsewhere = str(tiny_tfds), tmp_path_factory.mktemp("elsewhere")
    conftest.write_tfds(elsewhere, "wikipedia/20230601.en", {"train": [{"text": "Another one."}]})
    other = tokenizer.train(
        [text["text"] for text in texts("wikipedia", tiny_tfds)],
        tmp_path_factory.mktemp("other"),
        pieces=380,
        num_sentinels=10,
    )
    wrong = {
        "form": ("wikipedia", "train", data, tiny_tokens, corpus.Form(raw=35)),
        "tokenizer": ("wikipedia", "train", data, other, FORM),
        "split": ("wikipedia", "validation", data, tiny_tokens, FORM),
        "task": ("pydocs", "train", data, tiny_tokens, FORM),
        "dataset": ("wikipedia", "train", str(elsewhere), tiny_tokens, FORM),
    }
    for key, arguments in wrong.items():
        with pytest.raises(ValueError, match=f"shards of another {key} .*remove it or set"):
            corpus.prepare(*arguments, out)
    assert contents(out) == before


def test_too_little_text_for_one_example_is_a_sentence(tiny_tfds, tiny_tokens, tmp_path):
    form = corpus.Form(raw=10**6)
    with pytest.raises(ValueError, match=r"\(60 records\) makes not one example of 1000000 tokens"):
        corpus.prepare("wikipedia", "train", str(tiny_tfds), tiny_tokens, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dropped_records_are_counted_and_leave_no_trace(
    shards, tiny_tfds, tiny_tokens, tmp_path, monkeypatch
):
    task = tasks.TASKS["wikipedia"]
    keep = lambda record: None if len(record["text"]) % 2 else task.to_text(record)
    monkeypatch.setitem(tasks.TASKS, "wikipedia", dataclasses.replace(task, to_text=keep))
    out = tmp_path / "train"
    manifest = corpus.prepare("wikipedia", "train", str(tiny_tfds), tiny_tokens, FORM, out)
    odd = [row["text"] for row in texts("pydocs", tiny_tfds) if len(row["text"]) % 2]
    assert manifest["counts"]["dropped"] == len(odd) > 0
    text = tiny_tokens.decode(
        np.concatenate([corpus.read_example(data)[0] for data in stored(out, manifest)])
    )
    assert not any(document in text for document in odd)


def test_a_missing_shard_is_named(shards):
    directory, manifest = shards
    whole = {"sha256": "", "bytes": 5}
    wrong = manifest | {"files": {**manifest["files"], "shard-00009.array_record": whole}}
    with pytest.raises(ValueError, match=r"shard-00009.array_record has 0 bytes instead of 5; rem"):
        corpus.files_of(directory, wrong)


def test_a_truncated_shard_is_named(shards, tmp_path):
    directory, manifest = shards
    copy = pathlib.Path(shutil.copytree(directory, tmp_path / "copy"))
    (name, *_) = manifest["files"]
    (copy / name).write_bytes((copy / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{name} has .* remove .*copy, and it is made anew"):
        corpus.files_of(copy, manifest)


def test_shards_do_not_care_where_their_dataset_lies(shards, tiny_tfds, tiny_tokens, tmp_path):
    moved = shutil.copytree(tiny_tfds, tmp_path / "moved")
    arguments = ("wikipedia", "train", str(moved), tiny_tokens, FORM, shards[0])
    assert corpus.prepare(*arguments) == shards[1]


def test_the_manifest_knows_every_file_by_its_bytes(shards):
    directory, manifest = shards
    assert manifest == json.loads((directory / corpus.MANIFEST).read_text())
    for name, whole in manifest["files"].items():
        data = (directory / name).read_bytes()
        assert whole == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert set(manifest["files"]) == {path.name for path in directory.glob("*.array_record")}
