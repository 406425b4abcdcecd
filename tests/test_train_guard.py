"""Laws of the guard: bad updates are skipped, logged and rolled back, deterministically."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import logs, pipeline, runs, steps, train
from lm.train import guard
from tests.tiny_runs import T5, assert_same_bits, go, last, rows  # noqa: F401

CONFIG = runs.GuardConfig(max_bad_steps=3, max_rollbacks=2, spike_threshold=6.0)
BATCHES = (4, 5, 6)  # that are bad, in runs of 12 updates
LONG = {"steps": 12, "log_every_steps": 4, "eval_every_steps": 12, "guard.max_bad_steps": 3}


def judged(losses, **changes) -> tuple[guard.Guard, list]:
    made = guard.Guard(dataclasses.replace(CONFIG, **changes))
    return made, [made.check(n + 1, n, loss, math.isfinite(loss)) for n, loss in enumerate(losses)]


def usual(count: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(3.0, 0.1) for _ in range(count)]


@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_a_spike_is_a_loss_above_the_median_plus_spike_threshold_deviations(spread):
    losses = [3 + spread * (loss - 3) for loss in usual(guard.WINDOW)]
    median = np.median(losses)
    deviation = 1.4826 * np.median(np.abs(losses - median))
    bound = median + 6 * max(deviation, 0.001 * median)
    for loss, kind in ((bound + 1e-6, "spike"), (bound - 1e-6, None)):
        _, found = judged([*losses, loss])
        assert (found[-1] and found[-1]["kind"]) == kind
        assert not any(found[:-1])


def test_a_few_outliers_do_not_hide_the_next_spike():
    wild = [
        3.5 if number % 10 == 9 else loss for number, loss in enumerate(usual(guard.MIN_WINDOW))
    ]
    assert judged([*wild, 4.0])[1][-1]["kind"] == "spike"
    assert np.mean(wild) + 6 * np.std(wild) > 4.0


def test_a_loss_that_is_not_finite_is_spelled_as_in_the_logs():
    spelt = [bad["loss"] for bad in judged([math.nan, math.inf, -math.inf])[1]]
    assert spelt == list(logs.jsonl.NON_FINITE)


def test_there_are_no_spikes_before_min_window_or_with_threshold_zero():
    wild = [*usual(guard.MIN_WINDOW - 1), 1e9]
    assert not any(judged(wild)[1])
    assert not any(judged([*usual(200), 1e9], spike_threshold=0.0)[1])


def test_only_recent_good_losses_enter_the_median():
    early, late = usual(300), [loss - 2 for loss in usual(guard.WINDOW)]
    assert judged([*early, *late, 3.0])[1][-1]["kind"] == "spike"
    again = [*usual(200), 50.0, 50.0, 50.0, 50.0]
    assert [bad["kind"] for bad in judged(again, max_bad_steps=9)[1][-4:]] == ["spike"] * 4


def test_an_incomparable_loss_is_never_a_spike_but_must_be_finite():
    made = guard.Guard(CONFIG)
    for n in range(200):
        assert made.check(2 * n + 1, 2 * n, 1.0, True) is None
        assert made.check(2 * n + 2, 2 * n + 1, 50.0, True, is_comparable=False) is None
    assert made.check(401, 400, 3.0, True)["median"] == 1.0
    assert made.check(402, 401, math.nan, False, is_comparable=False)["kind"] == "skipped"


def test_only_consecutive_bad_updates_cause_a_rollback():
    assert judged([math.nan] * 2)[0].should_roll_back is False
    assert judged([math.nan] * 3)[0].should_roll_back
    assert judged([*usual(100), math.inf, 99.0, math.nan])[0].should_roll_back
    assert not judged([math.nan, math.nan, 3.0, math.nan, math.nan])[0].should_roll_back


def test_a_guard_resumed_from_its_memory_equals_the_unbroken_one():
    losses = usual(150) + [99.0, math.nan, 3.0, 99.0, 99.0, math.nan]
    whole, expected = judged(losses, max_bad_steps=9)
    for cut in (0, 1, 70, 151, 155):
        memory = json.loads(json.dumps(judged(losses[:cut], max_bad_steps=9)[0].memory))
        rest = guard.Guard(dataclasses.replace(CONFIG, max_bad_steps=9), memory)
        found = [
            rest.check(n + 1, n, losses[n], math.isfinite(losses[n]))
            for n in range(cut, len(losses))
        ]
        assert found == expected[cut:]
        assert rest.memory == whole.memory


# In the loop. --------------------------------------------------------------------------------


def poisoned(patch, where) -> None:
    """Make the loss NaN in updates where(state, examples)."""
    whole = steps.train_step

    def step(state, examples, teacher=None, *, loss, **options):
        def bad(params, part, *rest):
            total, sums = loss(params, part, *rest)
            times = jnp.where(where(state, examples), jnp.nan, 1.0)
            return total * times, sums | {"loss": sums["loss"] * times}

        return whole(state, examples, teacher, loss=bad, **options)

    patch.setattr(steps, "train_step", step)


@pytest.fixture
def poison(monkeypatch):
    return functools.partial(poisoned, monkeypatch)


@pytest.fixture(scope="module")
def is_bad(tiny_config, tmp_path_factory):
    """(state, examples) -> whether they are a batch of BATCHES."""
    run = runs.make_run(tiny_config(**T5), tmp_path_factory.mktemp("marks"))
    examples = runs.make_examples(run, runs.make_tokenizer(run))[0]
    made = list(itertools.islice(pipeline.train_batches(examples, 0), 20))
    marks = [int(rows.inputs.astype(np.int64).sum()) for rows in made]  # noqa: F402
    assert len(set(marks)) == len(marks)
    chosen = np.array([marks[index] for index in BATCHES])
    return lambda state, examples: jnp.isin(jnp.sum(examples.inputs), chosen)


def events(workdir) -> list[dict]:
    return logs.read(workdir / logs.EVENTS)


def test_an_update_that_is_not_finite_changes_nothing_and_is_logged_with_its_batch(go, poison):  # noqa: F811
    poison(lambda state, examples: state.step == 5)
    workdir = go(**{"checkpoint.every_steps": 5})
    state, facts = last(workdir)
    before = last(workdir, lambda facts: facts["step"] == 5)[0]
    assert (facts["step"], facts["skipped"], int(state.skipped)) == (6, 1, 1)
    for ours, theirs in ((state.params, before.params), (state.opt_state, before.opt_state)):
        assert_same_bits(ours, theirs)
    (told,) = [row for row in events(workdir) if row["event"] == "skipped"]
    assert (told["step"], told["batch"]) == (6, 5)
    assert "show" in told["see"] and "--step=6" in told["see"]
    final = rows(workdir, "train")[-1]
    assert math.isnan(final["loss"]) and final["skipped"] == 1
    assert all(math.isfinite(row["loss"]) for row in rows(workdir, "train")[:-1])


def test_a_row_excludes_skipped_updates_and_the_schedule_does_not_advance(go, poison):  # noqa: F811
    poison(lambda state, examples: state.step == 0)
    first, final = rows(
        go(**{"log_every_steps": 3, "steps": 3, "checkpoint.every_steps": 3}), "train"
    )
    assert math.isnan(first["loss"]) and first["learning_rate"] == 0
    assert final["step"] == 3 and math.isfinite(final["loss"])
    # A warm-up of 2 updates to 0.01: of the third, one was skipped.
    np.testing.assert_allclose(final["learning_rate"], 0.005, rtol=1e-6)


def without_them(monkeypatch):
    whole = pipeline.train_batches

    def batches(*arguments, start=0, **options):
        for index, rows in enumerate(whole(*arguments, **options)):  # noqa: F402
            if index >= start and index not in BATCHES:
                yield rows

    monkeypatch.setattr(pipeline, "train_batches", batches)


@pytest.fixture(scope="module")
def spared(go, is_bad):  # noqa: F811
    """A run without the bad batches."""
    with pytest.MonkeyPatch.context() as patch:
        without_them(patch)
        poisoned(patch, is_bad)  # the same program
        return go(**LONG)


@pytest.mark.parametrize(
    "stopped",
    [(8, 3), *(pytest.param(stop, marks=pytest.mark.slow) for stop in ((), (6,)))],
    ids=str,
)
def test_after_a_rollback_the_run_equals_one_without_the_bad_batches(
    stopped,
    spared,
    go,  # noqa: F811
    is_bad,
    poison,
    tmp_path,
    monkeypatch,
):
    """stopped: the call of should_stop that is true, for each session."""
    poison(is_bad)
    workdir = tmp_path / "run"
    for question in stopped:
        asked = iter(range(1, 99))
        with monkeypatch.context() as patch, pytest.raises(train.Unfinished):
            patch.setattr(train.Signals, "should_stop", lambda self, q=question: next(asked) == q)  # noqa: B023
            go(workdir, **LONG)
    go(workdir, **LONG)
    (state, facts), (expected, _) = last(workdir), last(spared)
    assert_same_bits(state, expected)
    assert facts["position"] == {"next_index": 15} and facts["guard"]["rollbacks"] == 1
    told = [row for row in events(workdir) if row["event"] == "rollback"]
    assert [(row["step"], row["bad"], row["passed_over"]) for row in told] == [
        (4, [5, 6, 7], [4, 6])
    ]
    ours, theirs = rows(workdir, "train"), rows(spared, "train")
    assert [(row["step"], row["loss"]) for row in ours] == [
        (row["step"], row["loss"]) for row in theirs
    ]
    if not stopped:  # what is changed may be the cure: it has all its returns before it
        go(workdir, allow=("steps",), **LONG | {"steps": 13})
        assert last(workdir)[1]["guard"]["rollbacks"] == 0


@pytest.mark.slow
def test_after_max_rollbacks_training_gives_up_with_a_report(go, poison, tmp_path):  # noqa: F811
    poison(lambda state, examples: state.step >= 3)
    changes = LONG | {"log_every_steps": 1, "checkpoint.every_steps": 1, "guard.max_rollbacks": 2}
    with pytest.raises(
        train.Diverged, match=r"guard.max_rollbacks=2 did not help; .*--allow_change"
    ):
        go(tmp_path / "run", profile=(3, 6), **changes)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb")), "of what there was"
    report = json.loads((tmp_path / "run" / "diverged.json").read_text())
    # From update 3, three were bad three times, each time of later batches.
    assert [row["step"] for row in report["updates"]] == [4, 5, 6]
    assert [row["batch"] for row in report["updates"]] == [9, 10, 11]
    assert report["rollbacks"] == 2
    state, facts = last(tmp_path / "run")
    assert facts["step"] == 3 and not facts["guard"]["row"]
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        assert np.isfinite(np.asarray(leaf)).all()
    assert train.Diverged.code == 3
