"""The law of resuming: a killed and resumed run ends as the unbroken one."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lm import checkpoints, logs, optimizers, runs, steps, transformer

ROOT = pathlib.Path(__file__).parents[1]
STEPS, CHECKPOINT, LOG = 30, 4, 2
CONFIG = """
import json, pathlib
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""


@pytest.fixture(scope="module")
def config(tiny_config, tiny_tokens, tmp_path_factory):
    """A config file of a tiny run with dropout and frequent checkpoints; shards exist."""
    path = tmp_path_factory.mktemp("config") / "config.py"
    changes = {
        "steps": STEPS,
        "checkpoint.every_steps": CHECKPOINT,
        "eval_every_steps": 6,
        "log_every_steps": LOG,
    }
    changes |= {"model.dropout_rate": 0.1, "evaluate.max_examples": 8}
    made = tiny_config(**changes | {"data.shards_dir": str(path.parent / "shards")})
    path.write_text(CONFIG)
    path.with_suffix(".json").write_text(json.dumps(made))
    runs.make_examples(runs.make_run(made, path.parent / "made"), tiny_tokens)
    return path


def start(config: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    """python -m lm train, on one device."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # compiles in half the time
    command = [sys.executable, "-m", "lm", "train", f"--config={config}", f"--workdir={workdir}"]
    with open(workdir.with_suffix(".log"), "a") as said:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)


def wait_for(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    """Wait until the log has a row of this step."""
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in logs.read(workdir / logs.METRICS)):
        assert process.poll() is None, workdir.with_suffix(".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_at(process: subprocess.Popen, workdir: pathlib.Path, step: int, seconds: float) -> None:
    """Send SIGKILL this many seconds after the row of this step."""
    wait_for(process, workdir, step)
    time.sleep(seconds)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL, "it had ended before it was killed"


def finish(process: subprocess.Popen, workdir: pathlib.Path) -> None:
    assert process.wait(timeout=180) == 0, workdir.with_suffix(".log").read_text()


def last_checkpoint(workdir: pathlib.Path):
    """(state, facts) of the newest step."""
    run = runs.read_run(workdir)
    optimizer, _ = optimizers.make_optimizer(
        run.optimizer, STEPS, transformer.param_shapes(run.model), optimizers.RunLength(1.0, 1)
    )
    make = functools.partial(
        steps.init_state, transformer.Transformer(run.model), optimizer, steps.StepConfig()
    )
    shapes = jax.eval_shape(make, transformer.param_shapes(run.model))
    with checkpoints.Checkpoints(workdir / "checkpoints", read_only=True) as saved:
        return saved.restore(shapes)


def figures(workdir: pathlib.Path) -> list[dict]:
    """The rows of the log without times."""
    clocks = {"time", "step_seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu"}
    clocks |= {"goodput", "process_memory_peak_gib"}
    rows = logs.read(workdir / logs.METRICS)
    return [{key: row[key] for key in row.keys() - clocks} for row in rows]


def stop_at(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    """Send SIGTERM twice after the row of this step; the run saves and says how to continue."""
    wait_for(process, workdir, step)
    asked = time.monotonic()
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.wait(timeout=60) == 75, workdir.with_suffix(".log").read_text()
    assert time.monotonic() - asked < 10
    said = workdir.with_suffix(".log").read_text().splitlines()[-1]
    stopped = [row for row in logs.read(workdir / logs.EVENTS) if row["event"] == "stopped"][-1]
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert said.startswith(f"lm: SIGTERM stopped the run after update {saved} of {STEPS}, which is")
    assert stopped["step"] == saved >= step and stopped["signal"] == "SIGTERM"


@pytest.fixture(scope="module")
def arms(config, tmp_path_factory):
    """Workdirs of two runs of one config: unbroken, and killed and stopped in turns."""
    root = tmp_path_factory.mktemp("runs")
    unbroken, broken = root / "unbroken", root / "broken"
    # The row of a step with a checkpoint comes right before its save: it is under way.
    kill_at(start(config, broken), broken, 2 * CHECKPOINT, 0.0)
    witness = start(config, unbroken)  # not before, so that it is compiled once
    try:
        kill_at(start(config, broken), broken, 4 * CHECKPOINT, 0.04)
        stop_at(start(config, broken), broken, 5 * CHECKPOINT)
        finish(start(config, broken), broken)
        finish(witness, unbroken)
    finally:
        witness.kill()
    return unbroken, broken


def test_a_killed_and_stopped_run_ends_with_the_bits_of_the_unbroken_run(arms):
    (state, facts), (expected, expected_facts) = (last_checkpoint(arm) for arm in arms)
    assert int(state.step) == STEPS
    assert facts == expected_facts
    assert facts["position"] == {"next_index": STEPS}
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_its_log_has_each_row_once_with_the_same_values(arms):
    ours, expected = (figures(arm) for arm in arms)
    assert ours == expected
    steps_of = lambda split: [row["step"] for row in ours if row["split"] == split]
    assert steps_of("train") == [1, *range(LOG, STEPS + 1, LOG)]
    assert steps_of("heldout") == [6, 12, 18, 24, STEPS]


def test_killed_saves_leave_no_files(arms):
    for workdir in arms:
        kept = sorted(path.name for path in (workdir / "checkpoints").iterdir())
        assert kept == [str(STEPS - STEPS % CHECKPOINT), str(STEPS)]
