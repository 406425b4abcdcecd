"""Tests of gs://: a run in a bucket equals the run on a disk, file by file and bit by bit."""

from __future__ import annotations

import asyncio
import copy
import pathlib
import types

import numpy as np
import pytest

from experiments.kill_drill import outcome
from lm import cli, evaluate, inference, interop, logs, pipeline, report, runs, show, storage, train
from lm.storage import gcs
from tests.gcs import download

CHANGES = {"model.dropout_rate": 0.1, "checkpoint.every_steps": 2, "checkpoint.max_to_keep": 2}


def names(folder: pathlib.Path) -> set[str]:
    """The files of a run, except arrays, whose file names are random."""
    paths = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {name.partition("tfevents")[0] for name in paths if "/d/" not in name}


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config(**CHANGES)


@pytest.fixture(scope="module")
def on_disk(config, tmp_path_factory):
    """The run on a disk."""
    workdir = tmp_path_factory.mktemp("disk") / "run"
    train.train(runs.make_run(config, workdir))
    return workdir


@pytest.fixture(scope="module")
def in_bucket(config, bucket):
    """The same run in a bucket."""
    train.train(runs.make_run(config, f"{bucket}/run"))
    return f"{bucket}/run"


def test_a_run_in_a_bucket_equals_the_run_on_a_disk(on_disk, in_bucket, tmp_path):
    copied = download(in_bucket, tmp_path)
    assert outcome.differences(outcome.read(copied), outcome.read(on_disk)) == []
    assert names(copied) == names(on_disk)
    same = ["config.json", "tokenizer/tokenizer.model", "tokenizer/tokenizer.json"]
    same += [f"shards/{split}/shard-00000.array_record" for split in ("train", "heldout")]
    for name in same:
        assert (copied / name).read_bytes() == (on_disk / name).read_bytes(), name
    boards = [next((at / "tensorboard").iterdir()) for at in (copied, on_disk)]
    assert boards[0].stat().st_size == boards[1].stat().st_size


@pytest.mark.slow
def test_every_reader_of_a_run_reads_it_in_a_bucket(on_disk, in_bucket, tmp_path):
    without = lambda figures: {k: v for k, v in figures.items() if k != "command"}
    actual, expected = (evaluate.evaluate(at) for at in (in_bucket, on_disk))
    assert without(actual) == without(expected) and actual["nats"] > 0
    assert evaluate.evaluate(in_bucket) == actual  # read from the file in the bucket
    for at in (in_bucket, on_disk):
        inference.predict(at, [{"inputs": "a b"}], f"{at}/answers.jsonl")
    answers = f"{in_bucket}/answers.jsonl"
    assert storage.as_path(answers).read_bytes() == (on_disk / "answers.jsonl").read_bytes() > b""
    assert list(inference.InputFile(answers)) == list(
        inference.InputFile(str(on_disk / "answers.jsonl"))
    )
    read = [runs.read_run(at) for at in (in_bucket, on_disk)]
    assert show.rows(read[0], "train", 3) == show.rows(read[1], "train", 3)
    pages = [report.read_run_folders([at])[0] for at in (in_bucket, on_disk)]
    for metric in ("loss", "nats"):
        assert pages[0].series("heldout", metric) == pages[1].series("heldout", metric)
    report.write([in_bucket], f"{in_bucket}/report.html", title="lm")
    assert storage.as_path(f"{in_bucket}/report.html").read_text().startswith("<!")
    for at, out in ((in_bucket, "ours"), (on_disk, "theirs")):
        interop.write(at, tmp_path / out)
    exported = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(exported) > 3
    for name in exported:
        actual, expected = (tmp_path / out / name for out in ("ours", "theirs"))
        assert actual.read_bytes() == expected.read_bytes(), name


def test_an_export_to_a_bucket_equals_the_one_on_a_disk(on_disk, bucket, tmp_path):
    interop.write(on_disk, f"{bucket}/exported")
    interop.write(on_disk, tmp_path / "exported")
    actual = download(f"{bucket}/exported", tmp_path / "copy")
    for path in (tmp_path / "exported").iterdir():
        assert (actual / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="is not empty"):
        interop.write(on_disk, f"{bucket}/exported")


def test_a_run_starts_from_one_in_a_bucket(config, in_bucket, on_disk, tmp_path):
    params = []
    for init_from in (in_bucket, str(on_disk)):
        changed = config | {"init_from": init_from, "tokenizer": config["tokenizer"] | {"dir": ""}}
        run = runs.make_run(changed, tmp_path / "next")
        tokens = runs.make_tokenizer(run)
        params.append(train.setup.initial_params(run, tokens, None))
    leaves = [np.asarray(leaf) for tree in params for leaf in _leaves(tree)]
    half = len(leaves) // 2
    assert half > 5
    assert all(np.array_equal(a, b) for a, b in zip(leaves[:half], leaves[half:], strict=True))


def _leaves(tree) -> list:
    import jax

    return jax.tree.leaves(tree)


@pytest.mark.slow
def test_teacher_tokenizer_trace_and_import_may_be_in_a_bucket(
    config, bucket, in_bucket, on_disk, tmp_path
):
    flags = [f"--config=configs/distill.py:{in_bucket}", f"--workdir={bucket}/student"]
    named = cli.parse_flags("train", cli.TRAIN, flags).config
    assert named.teacher.workdir == in_bucket
    student_config = copy.deepcopy(config) | {
        "stage": "distill",
        "teacher": named.teacher.to_dict(),
        "steps": 2,
    }
    student_config["tokenizer"]["dir"] = f"{in_bucket}/tokenizer"
    train.train(runs.make_run(student_config, f"{bucket}/student"), profile=(2, 2))
    rows = logs.read(f"{bucket}/student/metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2]
    assert "no trace" not in [row["event"] for row in logs.read(f"{bucket}/student/events.jsonl")]
    traced = gcs.filesystem().find(f"{bucket}/student/profile")
    assert any(name.endswith(".xplane.pb") for name in traced)

    interop.write(on_disk, tmp_path / "exported")
    interop.read(tmp_path / "exported", f"{bucket}/imported", copy.deepcopy(config))
    read = [runs.read_run(at) for at in (f"{bucket}/imported", on_disk)]
    params = [_leaves(inference.read_params(at, runs.make_tokenizer(at))[0]) for at in read]
    assert len(params[0]) > 5
    assert all(np.array_equal(a, b) for a, b in zip(*params, strict=True))
    with pytest.raises(ValueError, match="from which no checkpoint is imported; copy it"):
        interop.read(in_bucket, tmp_path / "never", config)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(
    config, bucket, on_disk, in_bucket, store, caplog, tmp_path
):
    prefix = in_bucket.removeprefix("gs://lm-test/")
    there = store.buckets["lm-test"]
    for name in [name for name in there if name.startswith(f"{prefix}/")]:
        store.put("lm-test", name.replace(prefix, f"{prefix}-hurt", 1), there[name][0])
    arrays = [n for n in there if n.startswith(f"{prefix}-hurt/checkpoints/6/params/d/")]
    worst = max(arrays, key=lambda name: len(there[name][0]))
    data = bytearray(there[worst][0])
    data[len(data) // 2] ^= 1
    store.put("lm-test", worst, bytes(data))

    train.train(runs.make_run(config, f"{in_bucket}-hurt"))
    assert "checkpoint 6" in caplog.text and "is damaged" in caplog.text
    aside = {name.split("/")[3] for name in there if f"{prefix}-hurt/checkpoints/6." in name}
    assert len(aside) == 1 and aside.pop().startswith("6.corrupt-")
    copied = download(f"{in_bucket}-hurt", tmp_path)
    events = [row["event"] for row in outcome.rows(copied, "events.jsonl")]
    assert "resumed" in events
    assert outcome.differences(outcome.read(copied), outcome.read(on_disk)) == []


def test_a_corpus_in_a_bucket_gives_the_same_batches(tiny_config, bucket, tmp_path):
    from lm.corpus import build, documents
    from tests.tiny_data import made_up_documents

    text = "\n".join(row["text"] for row in made_up_documents(5, 60))
    (tmp_path / "text.txt").write_text(text)
    options = dict(tokenizer="bytes", unit="line", rules="none", heldout_fraction=0.2, shards=2)
    recipe = documents.CorpusConfig(source=str(tmp_path / "text.txt"), **options)
    build.build(recipe, tmp_path / "corpus", workers=1)
    storage.copy_dir(tmp_path / "corpus", storage.as_path(f"{bucket}/corpus"))
    seen = []
    for corpus_dir in (f"{bucket}/corpus", str(tmp_path / "corpus")):
        changes = {
            "data.task": corpus_dir,
            "tokenizer.dir": "",
            "tokenizer.kind": "bytes",
            "tokenizer.vocab_size": 259,
        }
        run = runs.make_run(tiny_config(**changes), f"{bucket}/unused")
        tokens = runs.make_tokenizer(run)
        train_examples, heldout = runs.make_examples(run, tokens)
        batches = pipeline.train_batches(train_examples, 0, start=0)
        rows = [next(batches) for _ in range(3)] + list(pipeline.heldout_batches(heldout, 0, 8))
        seen.append([np.asarray(column) for batch in rows for column in batch])
        assert len(list(runs.Texts(run, runs.splits(run)[1], 5))) == 5
    assert len(seen[0]) == len(seen[1]) > 12
    assert all(np.array_equal(a, b) for a, b in zip(*seen, strict=True))


def test_copy_dir_copies_every_file_and_the_mark_last(bucket, store, tmp_path):
    prefix, folder = bucket.removeprefix("gs://lm-test/"), storage.as_path(f"{bucket}/folder")
    for name in ("", "deep/", "deep/x", "mark"):  # the first two as the Cloud console creates them
        store.put("lm-test", f"{prefix}/folder/{name}", name.encode())
    copied = lambda: {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    refused = lambda write, name: name.endswith("deep/x") and not write
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="cannot be copied"):
        patch.setattr(store, "refused", refused)
        storage.copy_dir(folder, tmp_path / "on", "mark")
    assert "on/mark" not in copied()
    storage.copy_dir(folder, tmp_path / "on", "mark")
    assert copied() >= {"on/mark", "on/deep/x"} and "on/deep/" not in copied()
    storage.copy_dir(tmp_path / "on", storage.as_path(f"{bucket}/back"), "mark")
    assert (storage.as_path(bucket) / "back/deep/x").read_text() == "deep/x"
    assert storage.glob_paths(f"{bucket}/ba*") == [f"{bucket}/back"]


def test_unreachable_and_missing_objects_raise_different_errors(bucket, monkeypatch):
    at_once = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0))
    monkeypatch.setattr(gcs.retry, "asyncio", at_once)  # six retries take 34 seconds
    away = gcs.UncachedFileSystem(endpoint_url="http://127.0.0.1:9", token="anon")
    for ask in (away.cat_file, away.exists):
        with pytest.raises(OSError, match="gs://b/x y cannot be reached .*check the network"):
            ask("b/x y")
    with pytest.raises(FileNotFoundError, match=f"{bucket}/x y does not exist"):
        storage.as_path(f"{bucket}/x y").read_bytes()
    with pytest.raises(ValueError, match="names no bucket"):
        storage.as_path("gs:///run")


def test_rows_are_uploaded_periodically_and_events_at_once(bucket, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(storage.paths.time, "monotonic", lambda: clock[0])
    with logs.RunLog(f"{bucket}/log", 9, name="x") as log:
        there = lambda: [row["step"] for row in logs.read(f"{bucket}/log/metrics.jsonl")]
        log.write(1, "train", {"loss": 1.0})
        log.write(2, "train", {"loss": 1.0})
        assert there() == [1]  # not every row uploads the whole object
        clock[0] += storage.paths.FLUSH_SECONDS
        log.write(3, "train", {"loss": 1.0})
        assert there() == [1, 2, 3]
        log.write(4, "train", {"loss": 1.0})
        for kind in ("odd", "odder"):
            log.event(kind, 4)
            assert logs.read(f"{bucket}/log/events.jsonl")[-1]["event"] == kind
        assert there() == [1, 2, 3]
        log.flush()
        assert there() == [1, 2, 3, 4]
        log.rewind(2)
        log.write(3, "train", {"loss": 2.0})
    assert [row["loss"] for row in logs.read(f"{bucket}/log/metrics.jsonl")] == [1, 1, 2]


def test_a_forbidden_read_is_an_error_and_not_a_missing_file(bucket, store, config, monkeypatch):
    monkeypatch.setattr(store, "refused", lambda write, name: True)
    for ask in (runs.is_claimed, runs.read_config, lambda at: storage.as_path(at).is_dir()):
        with pytest.raises(OSError, match="cannot be reached .*does not have storage.*gcloud auth"):
            ask(f"{bucket}/run")
    gcs.check_bucket.cache_clear()
    with pytest.raises(OSError, match="cannot be reached"):
        runs.make_run(config, f"{bucket}/run")


@pytest.mark.slow
def test_a_forbidden_write_is_an_error_with_a_message(bucket, store, config, monkeypatch):
    monkeypatch.setattr(store, "refused", lambda write, name: write)
    with pytest.raises(OSError, match=r"gs://.*cannot be (written|reached|copied)"):
        train.train(runs.make_run(config, f"{bucket}/refused"))
    monkeypatch.setattr(store, "refused", lambda write, name: write and "/checkpoints/2" in name)
    with pytest.raises(OSError, match=r"checkpoint 2 could not be written in gs://"):
        train.train(runs.make_run(config, f"{bucket}/later"))


def test_missing_permission_to_delete_is_reported_at_the_start(bucket, store, config, monkeypatch):
    monkeypatch.setattr(store, "refused", lambda write, name: name == "b/lm-test")
    run = runs.make_run(config, f"{bucket}/no-deletion")
    with pytest.raises(OSError, match="gs://lm-test cannot be reached .*Legacy Bucket Reader"):
        inference.open_checkpoints(run)
    inference.open_checkpoints(run, read_only=True)


def test_a_missing_bucket_and_a_missing_package_are_reported(bucket, config, monkeypatch):
    with pytest.raises(ValueError, match="no bucket gs://lm-none; create it with `gcloud storage"):
        runs.make_run(config, "gs://lm-none/run")
    with pytest.raises(ValueError, match="no bucket gs://a; create it"):
        runs.make_run(config | {"init_from": "gs://a/run"}, bucket)
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    monkeypatch.delitem(__import__("sys").modules, "lm.storage.gcs")
    monkeypatch.delattr("lm.storage.gcs")
    with pytest.raises(ValueError, match="pip install gcsfs"):
        runs.make_run(config, f"{bucket}/run")


def test_a_tfds_directory_in_a_bucket_is_refused(config, bucket, tmp_path):
    changed = config | {"data": config["data"] | {"tfds_dir": f"{bucket}/tfds"}}
    with pytest.raises(ValueError, match="is in a bucket, but TFDS is read from a local disk only"):
        train.check(runs.make_run(changed, tmp_path))


def test_the_compilation_cache_may_be_in_a_bucket(bucket, monkeypatch):
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    hits = []
    count = lambda event, **facts: hits.append(event) if event.endswith("/cache_hits") else None
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", f"{bucket}/cache")
    jax.monitoring.register_event_listener(count)
    try:
        assert (
            cli.run_guarded(
                lambda: jax.config.update("jax_compilation_cache_dir", f"{bucket}/cache")
            )
            == 0
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for seen in (0, 1):
            compilation_cache.reset_cache()
            jax.clear_caches()
            assert jax.jit(lambda x: x * 3 + 2)(jax.numpy.arange(5)).tolist() == [2, 5, 8, 11, 14]
            assert bool(hits) == bool(seen)
        assert gcs.filesystem().find(f"{bucket}/cache")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        compilation_cache.reset_cache()
        jax.monitoring.unregister_event_listener(count)
