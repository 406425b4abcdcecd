"""Laws of the teacher cache: format, writer, identity, and training from it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import (
    batch,
    inference,
    logs,
    pipeline,
    runs,
    shards,
    steps,
    train,
    transformer,
)
from lm.pipeline import teacher_cache
from lm.preflight import program
from lm.train import teacher_cache_writer as writing
from tests import untrained

VOCAB, STEPS = 512, 4
PAIRS = {"data.task": "docstring_summary", "stage": "finetune", "tokenizer.dir": ""}
SMALL = {"model.num_encoder_layers": 1, "model.num_decoder_layers": 1, "steps": STEPS}
LENGTHS = {"data.input_length": 32, "data.target_length": 12}


@pytest.fixture(scope="module")
def go(tiny_config, tiny_tokens, tmp_path_factory):
    """(devices, **changes) -> workdir of a run trained to its end."""

    def go(devices=1, workdir=None, **changes) -> pathlib.Path:
        workdir = workdir or tmp_path_factory.mktemp("run") / "run"
        changes = {**PAIRS, **LENGTHS, "tokenizer.dir": str(tiny_tokens.directory), **changes}
        changes = {
            "eval_every_steps": 10,
            "checkpoint.every_steps": 10,
            "evaluate.max_examples": 4,
            **changes,
        }
        train.train(runs.make_run(tiny_config(**changes), workdir), jax.devices()[:devices])
        return workdir

    return go


@pytest.fixture(scope="module")
def teacher(tiny_config, tiny_tokens, tmp_path_factory):
    """A workdir with checkpoints 0 and 8, whose parameters differ."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    config = tiny_config(**PAIRS, **LENGTHS) | {"name": "teacher"}
    config["tokenizer"]["dir"] = str(tiny_tokens.directory)
    for step in (0, 8):
        untrained.write(config, workdir, seed=step, step=step)
    return workdir


@pytest.fixture(scope="module")
def asked(tiny_config, tiny_tokens, teacher):
    """(workdir, **changes) -> the run of a student of the teacher."""

    def asked(where, **changes) -> runs.Run:
        changes = {"teacher.workdir": str(teacher), **SMALL, **LENGTHS, **changes}
        changes = {**PAIRS, "tokenizer.dir": str(tiny_tokens.directory), **changes}
        return runs.make_run(tiny_config(**changes | {"stage": "distill"}), where)

    return asked


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    """A cache of all ids, in float32."""
    return written(asked(tmp_path_factory.mktemp("cache") / "whole"), VOCAB, "float32")


def written(run, k, dtype, **options) -> pathlib.Path:
    train.CacheWriter(run, k, dtype, **options).write()
    return run.workdir


# Reading. ----------------------------------------------------------------------------------------

TASKS = {
    "pairs": {"data.task": "docstring_summary"},
    "packed": {"data.task": "docstring_summary", "data.packing": "first_fit"},
    "text": {"data.task": "wikipedia", "stage": "pretrain"},
    "mixed": {
        "data.mixture": (("docstring_summary", 1.0), ("wikipedia", 3.0)),
        "stage": "pretrain",
    },
}


@pytest.fixture(scope="module", params=TASKS)
def marked(request, tiny_config, tmp_path_factory):
    """(examples with a cache of 9 updates, its folder); the stored ids identify the target."""
    root = tmp_path_factory.mktemp("marked")
    run = runs.make_run(tiny_config(**LENGTHS, **TASKS[request.param]), root / "run")
    examples = runs.make_examples(run, runs.make_tokenizer(run))[0]
    identity = {"order": pipeline.data_order_spec(examples, 3), "k": 2, "dtype": "float32"}
    manifest = teacher_cache.open_manifest(root / "cache", identity | {"vocabulary": VOCAB})
    dealt = pipeline.train_batches(examples, 3)
    for count in (4, 3, 2):
        made = (
            teacher_cache.encode_records(rows, mark(rows), manifest["identity"]) for rows in dealt
        )
        manifest = teacher_cache.add_file(root / "cache", manifest, itertools.islice(made, count))
    cache = pipeline.open_teacher_cache(root / "cache")
    return dataclasses.replace(examples, teacher_cache=cache), root / "cache"


def mark(rows):
    """A synthetic top k: each target's own id and its position in the row."""
    place = np.broadcast_to(np.arange(rows.targets.shape[1]), rows.targets.shape)
    said = np.stack([rows.targets, place], axis=-1)
    of = rows.inputs.sum(axis=1, keepdims=True) + 0 * place
    return batch.TeacherTopK(said, said.astype(np.float32), of.astype(np.float32))


def assert_beside(rows):
    real, marks = rows.targets_segment_ids > 0, mark(rows)
    assert real.any()
    for ours, theirs in zip(rows.teacher_top_k, marks, strict=True):
        np.testing.assert_array_equal(ours[real], theirs[real])


def take(dealt, count):
    return list(itertools.islice(dealt, count))


@pytest.mark.parametrize(("start", "hosts", "workers"), [(0, 1, 0), (5, 1, 0), (2, 4, 0)])
def test_each_row_has_its_top_k_from_any_update_on_any_host(marked, start, hosts, workers):
    examples, _ = marked
    for host in range(hosts):
        dealt = pipeline.train_batches(examples, 3, start=start, host=host, hosts=hosts)
        for rows in take(dealt, 9 - start):
            assert_beside(rows)


@pytest.mark.parametrize("marked", ["text"], indirect=True)
def test_worker_processes_read_the_cache_too(marked):
    data = dataclasses.replace(marked[0].data, num_workers=2)
    parts = tuple(dataclasses.replace(part, data=data) for part in marked[0].splits)
    examples = dataclasses.replace(marked[0], splits=parts)
    dealt = pipeline.train_batches(examples, 3, start=1)
    threads = take(pipeline.train_batches(marked[0], 3, start=1), 3)
    for rows, same in zip(take(dealt, 3), threads, strict=True):
        assert_beside(rows)
        np.testing.assert_array_equal(rows.teacher_top_k.ids, same.teacher_top_k.ids)
    dealt.close()


def test_rows_of_another_seed_are_rejected(marked):
    dealt = pipeline.train_batches(marked[0], 4)
    with pytest.raises(
        ValueError, match=r"row 0 of batch 1 is not what the teacher .* read; write"
    ):
        next(dealt)


def test_reading_past_the_end_of_a_cache_is_an_error(marked):
    dealt = pipeline.train_batches(marked[0], 3, start=8)
    assert_beside(next(dealt))
    with pytest.raises(
        ValueError, match=r"ends at batch 9, before batch 10; extend .* --updates=10 or more"
    ):
        next(dealt)


@pytest.mark.parametrize("marked", ["pairs"], indirect=True)
def test_padding_is_not_stored_and_reads_as_finite_numbers(marked):
    examples, folder = marked
    rows = next(iter(pipeline.train_batches(examples, 3)))
    pad = rows.targets_segment_ids == 0
    assert pad.any() and np.isfinite(rows.teacher_top_k.logits).all()
    np.testing.assert_array_equal(rows.teacher_top_k.ids[pad], [[0, 1]] * pad.sum())
    stored = [examples.teacher_cache.record(address) for address in range(len(pad))]
    sizes = [4 + real * (2 * 2 + 2 * 4 + 4) for real in (~pad).sum(axis=1)]
    assert [len(data) for data in stored] == sizes


@pytest.mark.parametrize("marked", ["pairs"], indirect=True)
def test_an_unreadable_row_has_a_uniform_top_k(marked):
    cache, count = marked[0].teacher_cache, 2
    rows = batch.Batch(*(np.zeros((count, width), np.int32) for width in (32, 32, 12, 12)))
    told = cache.read(rows, np.arange(count))
    np.testing.assert_allclose(np.exp(told.logits).sum(-1) + np.exp(told.tail), 1, rtol=1e-6)


@pytest.mark.parametrize("marked", ["pairs"], indirect=True)
def test_a_damaged_file_of_a_cache_is_an_error(marked, tmp_path):
    _, folder = marked
    for place in folder.iterdir():
        (tmp_path / place.name).write_bytes(place.read_bytes())
    file = tmp_path / "taught-00001.array_record"
    data = bytearray(file.read_bytes())
    file.write_bytes(data[:-1])
    cache = pipeline.open_teacher_cache(tmp_path)
    with pytest.raises(ValueError, match=r"has \d+ bytes instead of \d+; remove .* teacher-cache"):
        cache.record(0)
    data[600] ^= 1
    file.write_bytes(data)
    with pytest.raises(shards.DamagedRecord, match=r"record \d+ of .*taught-00001.* teacher-cache"):
        [pipeline.open_teacher_cache(tmp_path).record(row) for row in range(9 * 8)]


def test_a_folder_without_a_cache_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no teacher cache; write one with .*or leave"):
        pipeline.open_teacher_cache(tmp_path)


# Writing. ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_top_k_and_softened_tail_sum_to_one(k, temperature):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)) * 4, jnp.float32)
    told = writing.top_k_logits(logits, k, "float32", temperature)
    p = np.exp(np.asarray(logits, np.float64))
    p = np.sort(p / p.sum(-1, keepdims=True), axis=-1)[..., ::-1]
    np.testing.assert_allclose(np.exp(told.logits), p[..., :k], rtol=1e-5)
    softened = (p[..., k:] ** (1 / temperature)).sum(-1)
    np.testing.assert_allclose(np.exp(told.tail), softened, rtol=1e-5)
    same = jnp.take_along_axis(jax.nn.log_softmax(logits), told.ids, -1)
    np.testing.assert_allclose(told.logits, same, rtol=1e-6)


@pytest.mark.parametrize("dtype", teacher_cache.STORED_DTYPES)
def test_stored_logits_are_read_back_to_the_dtypes_precision(dtype, tmp_path):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 16)) * 9, jnp.float32)
    logits = logits.at[0, 0, 3:].set(-1e9)  # a probability of nothing
    told = jax.device_get(writing.top_k_logits(logits, 16, dtype, 1.0))
    ones = np.ones((2, 3), np.int32)
    rows = batch.Batch(ones, ones, ones, ones)
    identity = {"order": {"batch_size": 2}, "k": 16, "dtype": dtype, "vocabulary": 70_000}
    manifest = teacher_cache.open_manifest(tmp_path, identity)
    teacher_cache.add_file(tmp_path, manifest, [teacher_cache.encode_records(rows, told, identity)])
    read = pipeline.open_teacher_cache(tmp_path).read(rows, np.arange(2))
    np.testing.assert_array_equal(read.ids, told.ids)
    np.testing.assert_array_equal(read.logits, np.asarray(told.logits, np.float32))
    exact = np.sort(np.asarray(jax.nn.log_softmax(logits)), axis=-1)[..., ::-1]
    most = float(jnp.finfo(dtype).max)
    exact = np.maximum(exact, -most)
    np.testing.assert_allclose(read.logits, exact, rtol=float(jnp.finfo(dtype).eps))
    assert read.logits.dtype == np.float32 and np.isfinite(read.logits).all()


@pytest.mark.parametrize(("k", "dtype"), [(256, "float16"), (256, "bfloat16"), (2, "float16")])
def test_the_estimated_size_is_close_to_the_written_size(asked, tmp_path, monkeypatch, k, dtype):
    writer = train.CacheWriter(asked(tmp_path / dtype, steps=6), k, dtype)
    monkeypatch.setattr(teacher_cache, "FILE_BYTES", 4 * writer.update_bytes)  # two files
    foretold, said = writer.disk_bytes(6), writer.describe()
    assert f"6 updates of 8 rows, the {k} likeliest of 512 ids in {dtype}" in said
    assert f"{foretold:,} in all" in said and not (tmp_path / dtype / "manifest.json").exists()
    writer.write()
    size = sum(file.stat().st_size for file in (tmp_path / dtype).glob("*.array_record"))
    assert abs(foretold - size) < 0.2 * size


@pytest.mark.parametrize("temperature", [0.01, 1.0, 7.0])
def test_the_tails_mass_is_that_of_the_softened_distribution(temperature):
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 16)) * 4, jnp.float32)
    told = jax.device_get(writing.top_k_logits(logits, 4, "float32", temperature))
    soft = np.sort(np.asarray(jax.nn.softmax(logits / temperature)), axis=-1)[..., :-4].sum(-1)
    real = np.array([[1, 1, 0], [1, 1, 1]], np.int32)
    rows = batch.Batch(real, real, real, real)
    told = told._replace(tail=np.where(real, told.tail, np.nan).astype(np.float32))
    found = writing._tail_mass(rows, told, temperature)
    np.testing.assert_allclose(found, soft[real > 0].mean(), rtol=1e-4, atol=1e-12)


def test_a_cache_larger_than_the_free_space_is_rejected_first(asked, tmp_path, monkeypatch):
    writer = train.CacheWriter(asked(tmp_path / "cache"), 16, "float16")
    usage = type("Usage", (), {"free": writer.disk_bytes(STEPS) - 1})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match=r"but only [\d,]+ are free; free some space, or use a sm"):
        writer.describe()
    usage.free += 1
    assert "are free." in writer.describe()


def kept(folder):
    return {file.name: file.read_bytes() for file in folder.glob("taught-*")}


def test_an_interrupted_writer_continues_after_its_last_file(asked, tmp_path, monkeypatch):
    run = asked(tmp_path / "cache")
    monkeypatch.setattr(
        teacher_cache, "FILE_BYTES", 2 * train.CacheWriter(run, 4, "float32").update_bytes
    )
    told = train.CacheWriter._records

    def killed(writer, tail_mass):
        yield from itertools.islice(told(writer, tail_mass), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.CacheWriter, "_records", killed)
        train.CacheWriter(run, 4, "float32").write()
    assert list(kept(run.workdir)) == ["taught-00000.array_record"]
    assert not list(run.workdir.glob(".writing*"))
    again = train.CacheWriter(run, 4, "float32")
    assert again.num_written == 2 and "2 updates are there" in again.describe()
    again.write()
    unbroken = written(asked(tmp_path / "other"), 4, "float32")
    assert kept(run.workdir) == kept(unbroken)
    longer = written(run, 4, "float32", updates=STEPS + 1)
    assert pipeline.open_teacher_cache(longer).num_updates == STEPS + 1


def test_a_cache_does_not_depend_on_the_devices(asked, whole, tmp_path):
    changes = {"parallel.strategy": "mesh", "parallel.fsdp": 2, "parallel.tensor": 2}
    run = asked(tmp_path / "mesh", **changes, **{"parallel.num_microbatches": 2})
    theirs, ours = (
        pipeline.open_teacher_cache(whole),
        pipeline.open_teacher_cache(written(run, 64, "float32")),
    )
    assert ours.num_updates == theirs.num_updates == STEPS
    for row in range(0, STEPS * 8, 3):
        assert ours.record(row)[:4] == theirs.record(row)[:4]
        here, there = (
            np.frombuffer(cache.record(row), teacher_cache.target_dtype(cache.identity), offset=4)
            for cache in (ours, theirs)
        )
        np.testing.assert_allclose(here["logits"], there["logits"][:, :64], rtol=1e-4, atol=1e-4)


# Identity. ---------------------------------------------------------------------------------------


def find(run):
    tokens = runs.make_tokenizer(run)
    return train.find_teacher_cache(run, tokens, runs.make_examples(run, tokens)[0])


OTHERS = {
    "teacher": ({"teacher.dtype": "bfloat16"}, r"another teacher: teacher.dtype \(here 'bfloat16'"),
    "seed": ({"seed": 1}, r"another order of data: order.seed \(here 1, there 0\)"),
    "rows": ({"data.batch_size": 16}, r"another order of data: order.batch_size \(here 16,"),
    "packing": ({"data.packing": "first_fit"}, r"another order of data: order.packing"),
    "lengths": ({"data.target_length": 10}, r"another order of data: order.columns"),
    "split": ({"data.train_split": "train[:50%]"}, r"another order of data: order.files"),
    "task": ({"data.task": "wikipedia"}, r"another order of data: order.columns"),
    "temperature": (
        {"teacher.loss": {"jsd": {"temperature": 3.0}}},
        r"another temperature: temperature \(here 3.0, there 2.0\)",
    ),
    "length": ({"steps": STEPS + 1}, r"has 4 updates, and the run 5; .* --updates=5"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_cache_of_another_identity_is_rejected_by_key(asked, whole, tmp_path, what):
    changes, sentence = OTHERS[what]
    with pytest.raises(ValueError, match=sentence):
        find(asked(tmp_path / "run", **{"teacher.cache": str(whole)}, **changes))


def test_students_of_other_sizes_and_learning_rates_share_a_cache(asked, whole, tmp_path):
    changes = {
        "optimizer.learning_rate": 0.1,
        "model.num_encoder_layers": 2,
        "teacher.student_init": "random",
    }
    changes |= {"data.num_workers": 2, "parallel.num_microbatches": 4, "steps": 2}
    assert (
        find(asked(tmp_path / "run", **{"teacher.cache": str(whole)}, **changes)).num_updates == 4
    )


def test_another_update_of_the_teacher_is_another_teacher(asked, whole, teacher, tmp_path):
    assert fingerprint(teacher, 0)[1] != fingerprint(teacher, 8)[1]
    assert fingerprint(teacher, "newest") == fingerprint(teacher, 8)
    named = f"{teacher}@0"
    with pytest.raises(ValueError, match=r"another teacher: teacher.parameters .*teacher.update"):
        find(asked(tmp_path / "run", **{"teacher.cache": str(whole), "teacher.workdir": named}))


def fingerprint(teacher, which):
    with inference.open_checkpoints(runs.read_run(teacher), read_only=True) as saved:
        return saved.fingerprint(which)


def test_a_cache_of_another_tokenizer_is_rejected(asked, whole, tmp_path):
    run = asked(tmp_path / "run", **{"teacher.cache": str(whole)})
    tokens = runs.make_tokenizer(run)
    examples = runs.make_examples(run, tokens)[0]
    other = type("Tokens", (), {"fingerprint": "other"})
    with pytest.raises(ValueError, match=r"another tokenizer: tokenizer \(here 'other'"):
        train.find_teacher_cache(run, other, examples)


def test_a_folder_with_another_cache_is_not_overwritten(asked, whole):
    with pytest.raises(ValueError, match=r"holds a cache of another teacher, .* use another --out"):
        train.CacheWriter(asked(whole), 4, "float32")


WRONG = {
    "k": ({"k": VOCAB + 1}, {}, r"--k=513 is out of bounds; use 1 to 512, all ids"),
    "dtype": ({"dtype": "float8"}, {}, r"--dtype='float8' is unknown; choose one of bfloat16, f"),
    "updates": ({"updates": -1}, {}, r"--updates=-1 is too small"),
}


@pytest.mark.parametrize("what", WRONG)
def test_invalid_writer_options_are_rejected(asked, tmp_path, what):
    options, changes, sentence = WRONG[what]
    with pytest.raises(ValueError, match=sentence):
        train.CacheWriter(asked(tmp_path, **changes), **options)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"teacher.loss": {"hidden": {}}},
            r"the teacher.loss hidden needs the live teacher; remove teacher.cache",
        ),
        (
            {"teacher.loss": {"labels": {}, "logit_mse": {}}},
            r"the teacher.loss logit_mse needs the live teacher",
        ),
        (
            {"teacher.loss": {"forward_kl": {"temperature": 2.0}, "jsd": {}}},
            r"has the temperatures 1, 2, but a teacher cache has one; use one for all terms, or",
        ),
        ({"teacher.on_policy.fraction": 0.5}, r"has no logits of the student's own answers, which"),
    ],
)
def test_terms_that_need_a_live_teacher_reject_a_cache(asked, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        asked("/nowhere", **{"teacher.cache": "/c"}, **changes)


# Training. ---------------------------------------------------------------------------------------

CUT = {
    "parallel.strategy": "mesh",
    "parallel.fsdp": 2,
    "parallel.num_microbatches": 2,
    "data.num_workers": 1,
}


@pytest.fixture(scope="module")
def learn(go, teacher):
    """(devices, workdir, **changes) -> the losses of a student, one per update."""

    def learn(devices=1, workdir=None, **changes):
        changes = {**SMALL, "teacher.workdir": str(teacher), "checkpoint.every_steps": 2, **changes}
        workdir = go(devices, workdir, stage="distill", **changes)
        rows = logs.read(workdir / logs.METRICS)
        return [row["loss"] for row in rows if row["split"] == "train"]

    return learn


@pytest.fixture(scope="module")
def live(learn):
    return learn()


def test_training_from_a_cache_of_all_ids_equals_the_live_teacher(learn, whole, live):
    cached = learn(4, **{"teacher.cache": str(whole)}, **CUT)
    assert len(cached) == STEPS
    np.testing.assert_allclose(cached, live, rtol=2e-4)


@pytest.mark.slow
def test_a_run_with_a_cache_resumes_on_other_devices(learn, whole, live, monkeypatch, tmp_path):
    every, read = pipeline.train_batches, []
    params, workdir = inference.read_params, tmp_path / "run"

    def batches(*arguments, **options):
        yield from itertools.islice(every(*arguments, **options), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "train_batches", batches)
        learn(1, workdir, **{"teacher.cache": str(whole)})
    monkeypatch.setattr(inference, "read_params", lambda *a, **o: read.append(a) or params(*a, **o))
    resumed = learn(4, workdir, **{"teacher.cache": str(whole)})
    np.testing.assert_allclose(resumed, live, rtol=2e-4)
    assert not read  # the teacher's parameters: what it said is enough


def test_a_top_k_cache_is_exact_but_for_the_tail(asked, teacher, tmp_path):
    run = asked(tmp_path / "cache", **{"teacher.loss": {"forward_kl": {}}})
    few = pipeline.open_teacher_cache(written(run, 16, "float32"))
    writer = train.CacheWriter(run, 16, "float32")
    rows = next(writer._batches(0))
    model = transformer.Transformer(runs.read_run(teacher).model)
    params, _ = inference.read_params(runs.read_run(teacher), writer.tokens)
    log_p = jax.jit(lambda rows: jax.nn.log_softmax(steps.apply_model(model, params, rows, None)))(
        rows
    )
    told, real = few.read(rows, np.arange(8)), rows.targets_segment_ids > 0
    exact = np.take_along_axis(np.asarray(log_p), told.ids, -1)
    np.testing.assert_allclose(told.logits[real], exact[real], atol=2e-4)
    mass = np.exp(told.logits).sum(-1) + np.exp(told.tail)
    np.testing.assert_allclose(mass[real], 1, rtol=1e-4)
    assert (np.diff(told.logits, axis=-1) <= 0).all()


def test_the_flops_with_a_cache_exclude_the_teacher(asked, whole, tmp_path):
    beside = asked(tmp_path / "run")
    cached = asked(tmp_path / "run", **{"teacher.cache": str(whole)})
    inputs, targets = beside.lengths
    theirs = transformer.forward_flops(runs.read_run(beside.teacher.workdir).model, inputs, targets)
    assert train.step_flops(beside) - train.step_flops(cached) == 8 * theirs


def test_a_preflight_counts_the_caches_batch_arrays_and_no_teacher(asked, whole, tmp_path):
    of = lambda **changes: program.prepare(asked(tmp_path / "run", **changes), jax.devices()[:1])
    beside, cached = of(), of(**{"teacher.cache": str(whole)})
    assert beside.sizes["teacher"] and not cached.sizes["teacher"]
    more = cached.sizes["batch"] - beside.sizes["batch"]
    assert more == 4 * 8 * LENGTHS["data.target_length"] * (2 * VOCAB + 1)


def test_the_command_prints_the_size_before_it_writes(asked, tmp_path, capfd):
    from lm import cli

    written_out = json.dumps(json.dumps(asked(tmp_path / "unused").config_dict))
    config = tmp_path / "student.py"
    config.write_text(
        "from ml_collections import ConfigDict\nimport json\n\n"
        f"def get_config():\n    return ConfigDict(json.loads({written_out}))\n"
    )
    arguments = ["teacher-cache", f"--config={config}", f"--out={tmp_path / 'cache'}", "--k=4"]
    assert not cli.main([*arguments, "--dry_run"])
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert not cli.main([*arguments, "--updates=3"])
    out, said = capfd.readouterr()
    assert said.index("about") < said.index("are free") and "3 updates" in out
    assert pipeline.open_teacher_cache(tmp_path / "cache").num_updates == 3
