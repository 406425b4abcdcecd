"""Laws of the loop: transfers, saves, resuming, tracing, hangs and lost hosts."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from lm import evaluate, inference, logs, parallel, runs, steps, train
from lm.train import watchdog
from tests.tiny_runs import (  # noqa: F401
    ROOT,
    T5,
    assert_same_bits,
    go,
    interrupted,
    last,
    pretrained,
    rows,
)


def test_between_logs_nothing_is_transferred_or_compiled(go, monkeypatch):  # noqa: F811
    from jax._src import array

    moved, compiled, now = [], [], [0]
    whole, value = train.Loop._update, array.ArrayImpl._value

    def update(self):
        now[0] = self.step + 1
        whole(self)
        now[0] = 0

    def spy(self):
        moved.append(now[0])
        return value.fget(self)

    def count(event, seconds, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(now[0])

    monkeypatch.setattr(array.ArrayImpl, "_value", property(spy))
    monkeypatch.setattr(train.Loop, "_update", update)
    jax.monitoring.register_event_duration_secs_listener(count)
    go(
        **{
            "log_every_steps": 3,
            "checkpoint.every_steps": 3,
            "steps": 7,
            "model.dropout_rate": 0.05,
        }
    )
    assert moved and compiled, "the spies see what there is"
    assert not [step for step in moved if step], "an update itself moves nothing to the host"
    assert set(compiled) <= {0, 1}, "later updates compile nothing"


def test_a_state_whose_copies_differ_is_never_saved(tiny_config, tmp_path, monkeypatch):
    whole = steps.train_step

    def drifting(state, *arguments, axis, **options):
        state, sums = whole(state, *arguments, axis=axis, **options)
        one = (jax.lax.axis_index(axis.name) == 1) & (state.step == 4)
        wrong = jax.tree.map(lambda leaf: leaf * (1 + 1e-6 * one), state.params)
        return state._replace(params=wrong), sums

    monkeypatch.setattr(steps, "train_step", drifting)
    config = tiny_config(**T5, **{"checkpoint.every_steps": 2, "evaluate.max_examples": 8})
    run = runs.make_run(config, tmp_path / "run")
    with pytest.raises(train.Unfinished, match=r"copies of params/.* differ .* from update 2"):
        train.train(run, jax.devices()[:2])
    assert last(tmp_path / "run")[1]["step"] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel.strategy": "mesh", "parallel.fsdp": 2, "log_every_steps": 2},
        pytest.param(
            {"model.dtype": "bfloat16", "model.scan_layers": False, "model.remat_policy": "full"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mesh", "bfloat16"],
)
def test_a_run_resumes_on_other_devices_and_in_another_dtype(
    changes,
    interrupted,  # noqa: F811
    pretrained,  # noqa: F811
    tiny_config,
    tmp_path,
):
    workdir = tmp_path / "run"
    shutil.copytree(interrupted, workdir)
    made = {"checkpoint.every_steps": 2, "evaluate.max_examples": 16} | T5 | changes
    train.train(runs.make_run(tiny_config(**made), workdir), jax.devices()[:4])
    facts = last(workdir)[1]
    assert facts["step"] == 6 and facts["position"] == {"next_index": 6}
    expected = rows(pretrained, "heldout")[-1]["nats"]
    np.testing.assert_allclose(rows(workdir, "heldout")[-1]["nats"], expected, rtol=5e-3)
    config = json.loads((workdir / "config.json").read_text())
    assert config == json.loads(json.dumps(tiny_config(**made)))
    told = logs.read(workdir / logs.EVENTS)
    (changed,) = [row for row in told if row["event"] == "changed"]
    assert {line.split()[0] for line in changed["keys"]} == set(changes)
    (resumed,) = [row for row in told if row["event"] == "resumed"]
    assert resumed["step"] == 4 and len(resumed["devices"]) == 4
    assert resumed["versions"] == logs.versions() and resumed["command"] == logs.command()
    assert "commit" in resumed


def test_only_allowed_config_keys_change_midway(
    interrupted,  # noqa: F811
    tiny_config,
    tmp_path,
):
    workdir = tmp_path / "run"
    shutil.copytree(interrupted, workdir)
    changes = {"optimizer.learning_rate": 0.5, "loss.z_loss": 0.1}
    made = tiny_config(
        **{"checkpoint.every_steps": 2, "evaluate.max_examples": 16}, **T5, **changes
    )
    run, allow = runs.make_run(made, workdir), ("optimizer.learning_rate", "loss")
    with pytest.raises(ValueError, match=r"loss.z_loss .*--allow_change=loss.z_loss\."):
        train.train(run, jax.devices()[:1], allow=allow[:1])
    train.train(run, jax.devices()[:1], allow=allow)
    assert rows(workdir, "train")[-1]["learning_rate"] == pytest.approx(0.5)
    train.train(run, jax.devices()[:1])  # it is the run's config now


def test_a_duration_in_tokens_becomes_updates_and_evaluation_uses_the_average(go, pretrained):  # noqa: F811
    tokens = 3 * 8 * sum(runs.read_run(pretrained).lengths)  # of three updates, padding counted
    change = {"steps": 0, "duration.tokens": float(tokens), "optimizer.ema_decay": 0.5}
    workdir = go(**change)
    state, facts = last(workdir)
    assert facts["step"] == 3
    run = runs.read_run(workdir)
    params, _ = inference.read_params(run, runs.make_tokenizer(run))
    assert_same_bits(params, state.average)
    with pytest.raises(AssertionError):
        assert_same_bits(params, state.params)
    found = evaluate.evaluate(workdir)["nats"]
    assert found == pytest.approx(rows(workdir, "heldout")[-1]["nats"], rel=1e-6)


def test_log_frequency_changes_no_bit_of_a_run_and_the_seed_changes_all(go, pretrained):  # noqa: F811
    state = last(pretrained)[0]
    assert_same_bits(last(go(log_every_steps=5, eval_every_steps=6))[0], state)
    other = last(go(seed=1))[0]
    for ours, theirs in zip(*map(jax.tree.leaves, (state.params, other.params)), strict=True):
        assert np.any(np.asarray(ours) != np.asarray(theirs))


def test_the_manifest_has_the_planned_cost(pretrained):  # noqa: F811
    told = json.loads((pretrained / "run.json").read_text())
    run = runs.read_run(pretrained)
    assert told["planned_updates"] == 6
    assert told["planned_tokens"] == 6 * run.data.batch_size * sum(run.lengths)
    assert told["planned_flops"] == 6 * train.step_flops(run)
    assert told["config"] == run.config_dict
    assert told["tokenizer"] == runs.make_tokenizer(run).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("profile", [(2, 5), (6, 99), (2, 4), (7, 9)], ids=str)
def test_the_profiled_updates_are_traced_or_the_log_says_why_not(
    profile,
    interrupted,  # noqa: F811
    go,  # noqa: F811
    tmp_path,
):
    workdir = shutil.copytree(interrupted, tmp_path / "run")  # after update 4 of 6
    go(workdir, profile=profile)
    traced = list((workdir / "profile").rglob("*.xplane.pb"))
    told = [row["said"] for row in logs.read(workdir / logs.EVENTS) if row["event"] == "no trace"]
    none = ["--profile={}:{} is no update still to come".format(*profile)]
    assert (len(traced), told) == ((1, []) if profile in ((2, 5), (6, 99)) else (0, none))


@pytest.mark.slow
def test_a_trace_is_written_when_the_run_stops_inside_it(go, tmp_path, monkeypatch):  # noqa: F811
    asked = iter(range(1, 99))
    monkeypatch.setattr(train.Signals, "should_stop", lambda self: next(asked) == 4)
    with pytest.raises(train.Unfinished):
        go(tmp_path / "run", profile=(2, 9))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


# Hangs and lost hosts. -----------------------------------------------------------------------


@pytest.fixture
def left(monkeypatch):
    """(messages of exit_now, an event that it sets), instead of exiting."""
    said, fired = [], threading.Event()
    monkeypatch.setattr(watchdog, "exit_now", lambda sentence: (said.append(sentence), fired.set()))
    return said, fired


def test_the_watchdog_is_silent_while_activities_end_in_time(left, tmp_path):
    said, fired = left
    with train.Watchdog(0.5, tmp_path, said.append) as watch:
        watch.beat("what compiles", 4)
        time.sleep(1.0)
        for number in range(5):
            watch.beat(f"update {number}")
            time.sleep(0.1)
    assert not fired.wait(1.0) and not said
    with train.Watchdog(0.0, tmp_path, said.append):
        time.sleep(0.2)
    assert not said


@pytest.mark.slow
def test_a_hanging_update_ends_the_process_and_a_long_compilation_does_not(
    left,
    go,  # noqa: F811
    monkeypatch,
    tmp_path,
):
    said, fired = left
    whole = steps.train_step

    def stuck(step):
        if step == 4:
            fired.wait(60)

    def slow(state, *arguments, **options):
        time.sleep(3)  # longer than guard.hang_timeout_seconds, while it is traced
        jax.debug.callback(stuck, state.step)
        return whole(state, *arguments, **options)

    monkeypatch.setattr(steps, "train_step", slow)
    monkeypatch.setattr(watchdog, "SLOW_FACTOR", 60)  # for machines that have much else to do
    go(tmp_path / "run", **{"guard.hang_timeout_seconds": 2.0})
    # Of the last updates under way, which are two or three, the newest.
    assert len(said) == 1 and said[0].startswith(("update 5", "update 6")), said
    stacks = (tmp_path / "run" / "stacks.txt").read_text()
    assert "Thread" in stacks and "loop.py" in stacks
    told = [row for row in logs.read(tmp_path / "run" / logs.EVENTS) if row["event"] == "hang"]
    assert len(told) == 1


def test_the_watchdog_ends_the_process_on_a_full_disk(left, tmp_path):
    def tell(sentence):
        raise OSError("no space left")

    said, fired = left
    with contextlib.suppress(OSError), train.Watchdog(0.2, tmp_path / "gone", tell):
        assert fired.wait(30)
    assert len(said) == 1 and said[0].startswith("the start has not ended")


def test_each_host_has_its_own_file_of_stacks(left, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "host_index_and_count", lambda: (1, 2))
    with train.Watchdog(0.2, tmp_path, left[0].append):
        assert left[1].wait(30)
    assert [path.name for path in tmp_path.iterdir()] == ["stacks.1.txt"]


@pytest.mark.parametrize("hosts", [1, 2])
def test_device_errors_are_user_errors_and_all_others_with_several_hosts_a_lost_host(
    hosts, monkeypatch
):
    monkeypatch.setattr(parallel, "host_index_and_count", lambda: (0, hosts))
    monkeypatch.setattr(watchdog, "on_abort", lambda tell: None)
    cures = {
        "RESOURCE_EXHAUSTED: 9 GiB": (
            r"9 GiB.* data.batch_size, .*num_microbatches, "
            r".*model.remat_policy"
        ),
        "INVALID_ARGUMENT: a shape": "refuse this program .*a shape",
    }
    lost = []
    for text, cure in cures.items():
        with pytest.raises(ValueError, match=cure), watchdog.detect_lost_host(lost.append):
            raise jax.errors.JaxRuntimeError(text)
    alone = pytest.raises(jax.errors.JaxRuntimeError) if hosts == 1 else contextlib.nullcontext()
    with alone, watchdog.detect_lost_host(lost.append):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: no\nanswer")
    assert lost == ["UNAVAILABLE: no answer"] * (hosts - 1)
    # jax says it in a ValueError as well, and it may lie inside the sentence of a failed save.
    gone, lost[:] = ValueError("UNKNOWN: Gloo AllGather failed"), []
    with pytest.raises(ValueError, match="Gloo"), watchdog.detect_lost_host(lost.append):
        raise gone
    with pytest.raises(OSError, match="room"), watchdog.detect_lost_host(lost.append):
        raise OSError("make room") from gone
    with pytest.raises(ValueError, match="use 1"), watchdog.detect_lost_host(lost.append):
        raise ValueError("checkpoint.max_to_keep=0 is too small; use 1.")
    assert lost == [str(gone)] * 2 * (hosts - 1)


def test_an_abort_in_cpp_code_prints_a_message_and_exits_as_unfinished():
    code = "import os; from lm.train import watchdog as w; w.on_abort(lambda: w.exit_now('gone'))"
    command = [sys.executable, "-c", code + "; os.abort()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (75, "lm: gone")
