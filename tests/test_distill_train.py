"""Laws of distillation runs: data, the teacher's cost, its sharding, and errors."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest

from lm import batch, logs, parallel, pipeline, runs, train, transformer
from lm.train import live_teacher
from tests import untrained

PAIRS = {"data.task": "docstring_summary", "data.target_length": 8}
STUDENT = {"stage": "distill", "model.num_encoder_layers": 1, "model.num_decoder_layers": 1}
ON_POLICY = {
    "teacher.loss": {"labels": {}, "reverse_kl": {}, "policy": {}},
    "teacher.on_policy.fraction": 0.5,
    "steps": 4,
}


@pytest.fixture(scope="module")
def teacher(tiny_config, tmp_path_factory):
    """The workdir of an untrained run."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    untrained.write(tiny_config(**PAIRS), workdir)
    return workdir


@pytest.fixture(scope="module")
def student(tiny_config, teacher, tmp_path_factory):
    """(workdir, None for a new one, **changes) -> the run of a student."""

    def student(workdir=None, **changes) -> runs.Run:
        changes = {**PAIRS, **STUDENT, "teacher.workdir": str(teacher), "steps": 2, **changes}
        changes = {"checkpoint.every_steps": 2, "evaluate.max_examples": 8, **changes}
        workdir = workdir or tmp_path_factory.mktemp("student") / "run"
        return runs.make_run(tiny_config(**changes), workdir)

    return student


def rows(run: runs.Run) -> list[dict]:
    found = logs.read(run.workdir / logs.METRICS)
    return [row for row in found if row["split"] == "train"]


def trained(run: runs.Run, devices=1) -> list[dict]:
    train.train(run, jax.devices()[:devices])
    return rows(run)


@pytest.fixture(scope="module")
def practised(student):
    """The workdir of a run that is on-policy in every second update."""
    run = student(**ON_POLICY)
    trained(run)
    return run


# Data. ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        {"data.task": "wikipedia"},
        {
            "data.mixture": (("docstring_summary", 2.0), ("wikipedia", 1.0)),
            "data.target_length": 16,
        },
    ],
)
def test_pre_training_and_mixtures_are_distilled_too(student, data):
    found = trained(student(**data, **{"teacher.dtype": "bfloat16"}))
    for row in found:
        assert math.isfinite(row["loss"]) and row["teacher/forward_kl"] > 0
        assert row["loss"] == pytest.approx(
            0.2 * row["teacher/labels"] + 0.8 * row["teacher/forward_kl"], rel=1e-5
        )


def test_the_students_answers_count_in_divergences_and_not_as_labels(practised):
    given, own = rows(practised)[0], rows(practised)[1]
    assert given["teacher/policy"] == 0 and given["teacher/labels"] > 0
    assert own["teacher/policy"] != 0 and own["teacher/labels"] == 0
    assert all(row["teacher/reverse_kl"] > 0 and row["skipped"] == 0 for row in rows(practised))


def test_an_on_policy_run_resumes_to_the_same_losses(student, practised, monkeypatch):
    run, whole = student(**ON_POLICY), pipeline.train_batches

    def batches(*arguments, **options):
        yield from itertools.islice(whole(*arguments, **options), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "train_batches", batches)
        trained(run)
    ours = trained(run)
    assert [(row["step"], row["loss"]) for row in ours] == [
        (row["step"], row["loss"]) for row in rows(practised)
    ]


@pytest.mark.slow
def test_on_policy_losses_are_the_same_on_four_devices(student, practised):
    for ours, theirs in zip(trained(student(**ON_POLICY), 4), rows(practised), strict=True):
        for name in ("loss", "teacher/reverse_kl", "teacher/policy"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_with_lora_answers_come_from_the_merged_weights(student, monkeypatch):
    lora = {
        "lora.rank": 2,
        "lora.target_pattern": "query/kernel$",
        "teacher.on_policy.fraction": 1.0,
    }
    write, used = live_teacher.StudentAnswers.generate, []

    def written(self, params, placed, index):
        used.append(jax.tree.map(np.asarray, params))
        return write(self, params, placed, index)

    monkeypatch.setattr(live_teacher.StudentAnswers, "generate", written)
    found = trained(student(**ON_POLICY | lora))
    assert all(row["teacher/policy"] != 0 and row["skipped"] == 0 for row in found)
    queries = [params["decoder"]["layers"]["self_attention"]["query"]["kernel"] for params in used]
    assert len(queries) == 4 and np.any(queries[0] != queries[-1])


# Cost. ---------------------------------------------------------------------------------------


def test_rows_and_ledger_have_the_time_of_answers_and_teacher(practised):
    spent = logs.goodput(practised.workdir)
    assert spent["shares"]["decode"] > 0
    assert spent["goodput"] == pytest.approx(spent["shares"]["step"] + spent["shares"]["decode"])
    facts = json.loads((practised.workdir / logs.MANIFEST).read_text())
    # The first answers are compiled, which is not what they cost.
    assert ["decode_share" in row for row in rows(practised)] == [False, False, False, True]
    assert 0 < rows(practised)[3]["decode_share"] < 1
    for row in rows(practised)[1:]:
        share = facts["teacher_seconds"] / row["step_seconds"]
        assert row["teacher_share"] == pytest.approx(share)
        share = facts["teacher_process_gib"] / row["process_memory_peak_gib"]
        assert row["teacher_memory_share"] == pytest.approx(share) and 0 < share < 1


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_teachers_cost_is_measured_in_its_dtype(student, teacher, dtype, size):
    run = student(**{"teacher.dtype": dtype})
    strategy = train.make_strategy(run, jax.devices()[:2])
    theirs = runs.read_run(teacher)
    placed = live_teacher.place_params(run, strategy, untrained.params(theirs))
    cost = live_teacher.measure_cost(run, strategy, placed)
    count = transformer.parameter_count(theirs.model)
    assert cost["teacher_gib"] * 2**30 == size * count
    assert cost["teacher_process_gib"] == 2 * cost["teacher_gib"]  # both devices are this process's
    assert cost["teacher_seconds"] > 0
    assert live_teacher.teacher_config(run).dtype == dtype
    shape = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
    assert shape(strategy.fetch(placed)) == shape(live_teacher.param_shapes(run))


@pytest.mark.slow
def test_a_tied_student_of_an_untied_teacher_prints_a_warning(student, capfd):
    rest = {"steps": 1, "evaluate.max_examples": 1}
    trained(student(**rest))
    assert "never a head" not in capfd.readouterr().err
    trained(student(**rest, **{"model.lm_head": "tied"}))
    assert "model.lm_head='tied' starts as the teacher's embedding, which was never a head" in (
        capfd.readouterr().err
    )


def test_without_a_teacher_the_cost_is_empty(student):
    run = student()
    assert live_teacher.measure_cost(run, train.make_strategy(run, jax.devices()[:1]), None) == {}


# Sharding. -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wider_teacher_is_sharded_by_its_own_sizes(student, tiny_config, tmp_path):
    wide = {"model.d_model": 32, "model.d_ff": 48, "model.num_heads": 8, "model.num_kv_heads": 8}
    theirs = untrained.write(tiny_config(**PAIRS, **wide), tmp_path / "wide")
    mesh = {"parallel.strategy": "mesh", "parallel.fsdp": 2, "parallel.tensor": 2}
    change = {"teacher.workdir": str(theirs.workdir), "teacher.student_init": "random", "steps": 1}
    one, cut = student(**change), student(**change, **mesh)
    strategy = train.make_strategy(cut, jax.devices()[:4])
    placed = live_teacher.place_params(cut, strategy, untrained.params(theirs))
    expected = parallel.make_strategy(cut.parallel, jax.devices()[:4]).shardings(placed)
    for leaf, sharding in zip(jax.tree.leaves(placed), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding == sharding
    parts = [leaf.size / leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(placed)]
    assert set(parts) >= {1.0, 4.0}
    (ours,), (whole,) = trained(cut, 4), trained(one)
    for name in ("loss", "teacher/forward_kl", "gradient_norm"):
        np.testing.assert_allclose(ours[name], whole[name], rtol=1e-4)


def test_checkpoints_hold_only_the_student(practised):
    held = {path.name for path in (practised.workdir / "checkpoints").glob("*/*")}
    assert held and not any("teacher" in name for name in held)


# Errors. -------------------------------------------------------------------------------------


def test_a_teacher_with_nan_logits_changes_no_weight(student, teacher):
    run = student(**{"optimizer.warmup.steps": 0})
    update = train.make_update(run, np.ones(run.model.vocab_size, int), 2, runs.run_length(run, 60))
    state, step = jax.jit(update.init_state)(None), jax.jit(update.train_step)
    inputs, targets = run.lengths
    shapes = [(run.data.batch_size, n) for n in (inputs, inputs, targets, targets)]
    examples = batch.Batch(*[np.ones(shape, np.int32) for shape in shapes])
    whole = untrained.params(runs.read_run(teacher))
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), whole)
    new, sums = step(state, examples, broken)
    assert sums["finite"] == 0 and new.skipped == 1 and new.step == 1
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, new.opt_state, state.opt_state)
    new, sums = step(state, examples, whole)
    assert sums["finite"] == 1 and new.skipped == 0
    before, after = (each.params["embed"]["embedding"] for each in (state, new))
    assert np.any(before != after)


@pytest.mark.slow
def test_a_missing_teacher_is_an_error_on_resume(student, teacher, tmp_path):
    lent = pathlib.Path(shutil.copytree(teacher, tmp_path / "lent"))
    workdir, changes = tmp_path / "run", {"teacher.workdir": str(lent)}
    trained(student(workdir, **changes))
    before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    shutil.rmtree(lent / "checkpoints")
    longer = runs.make_run(
        json.loads((workdir / "config.json").read_text()) | {"steps": 4}, workdir
    )
    with pytest.raises((ValueError, OSError), match="no checkpoint in .*lent"):
        train.train(longer, jax.devices()[:1], allow=("steps",))
    shutil.rmtree(lent)
    with pytest.raises(ValueError, match="lent holds no run .no config.json.; train one there"):
        train.train(longer, jax.devices()[:1], allow=("steps",))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == before
