"""Laws of several hosts, run as processes of the command line: one run, one writer, one end."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import time

import pytest

from experiments.kill_drill import children, drill, outcome
from lm import exits, runs
from tests.host_processes import CONFIG, ends  # noqa: F401

pytestmark = pytest.mark.slow

STEPS, SAVE = 16, 4


@pytest.fixture(scope="module")
def config(tiny_config, tiny_tokens, tmp_path_factory):
    """A file for --config of a tiny run with dropout and prepared shards."""
    os.environ.update(children.surroundings(pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])))
    path = tmp_path_factory.mktemp("hosts") / "config.py"
    changes = {
        "steps": STEPS,
        "checkpoint.every_steps": SAVE,
        "log_every_steps": 1,
        "eval_every_steps": 8,
    }
    changes |= {"model.dropout_rate": 0.1, "evaluate.max_examples": 8}
    run_config = tiny_config(**changes | {"data.shards_dir": str(path.parent / "shards")})
    path.write_text(CONFIG)
    path.with_suffix(".json").write_text(json.dumps(run_config))
    runs.make_examples(runs.make_run(run_config, path.parent / "made"), tiny_tokens)
    return path


def start(config, workdir, hosts: int, devices: int, *changes: str) -> list[children.Child]:
    """Start processes of one run with some devices each. changes: config keys as flags."""
    flags, port = ["train", f"--config={config}", f"--workdir={workdir}"], drill.free_port()
    flags += changes
    together = [f"--coordinator=127.0.0.1:{port}", f"--hosts={hosts}"] * (hosts > 1)
    return [
        children.Child(
            [*flags, *together, *([f"--host={host}"] * (hosts > 1))],
            workdir.with_name(f"{workdir.name}.{host}.log"),
            devices=devices,
        )
        for host in range(hosts)
    ]


def reach(workdir: pathlib.Path, step: int, child: children.Child) -> None:
    """Wait for the row of an update."""
    deadline = time.monotonic() + 150
    while not any(row["step"] >= step for row in outcome.rows(workdir)):
        assert child.poll() is None and time.monotonic() < deadline, child.said()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def alone(config):
    """The run of one process with two devices."""
    (child,) = start(config, config.parent / "alone", 1, 2)
    assert ends([child]) == [0], child.said()
    return outcome.read(config.parent / "alone")


@pytest.fixture(scope="module")
def pair(config, alone):
    """The run of two processes with a device each, and what they printed."""
    hosts = start(config, config.parent / "pair", 2, 1)
    assert ends(hosts) == [0, 0], hosts[0].said() + hosts[1].said()
    return outcome.read(config.parent / "pair"), [child.said() for child in hosts]


def test_two_processes_train_like_one_with_the_same_devices(alone, pair):
    pair_rows, alone_rows = pair[0].rows, alone.rows
    assert [row["step"] for row in pair_rows] == [row["step"] for row in alone_rows]
    for row, expected in zip(pair_rows, alone_rows, strict=True):
        for name in ("loss", "nats", "gradient_norm", "token_accuracy"):
            if name in expected:
                assert row[name] == pytest.approx(expected[name], rel=1e-5), (row["step"], name)
    assert pair[0].facts["position"] == alone.facts["position"] == {"next_index": STEPS}


def test_only_the_first_host_writes(pair):
    first, second = pair[1]
    assert f"step {STEPS}/{STEPS}" in first and "step" not in second
    trained = [row["step"] for row in pair[0].rows if row["split"] == "train"]
    assert trained == list(range(1, STEPS + 1))
    assert pair[0].left == []


def test_an_error_of_one_host_is_one_sentence_on_all(config):
    workdir = config.parent / "mistaken"
    hosts = start(config, workdir, 2, 1, f"--config.data.shards_dir={config}/no/folder")
    assert ends(hosts) == [2, exits.UNFINISHED], hosts[0].said() + hosts[1].said()
    assert "lm: another host was lost before the first update" in hosts[1].said()
    assert not any("Traceback" in child.said() for child in hosts)


def test_stopped_or_killed_hosts_resume_bit_for_bit(config, pair):
    workdir = config.parent / "hurt"
    hosts = start(config, workdir, 2, 1)
    reach(workdir, 5, hosts[0])
    hosts[1].send(signal.SIGTERM)
    assert ends(hosts) == [exits.UNFINISHED] * 2, hosts[0].said() + hosts[1].said()
    stopped = outcome.rows(workdir, "events.jsonl")[-1]
    assert stopped["event"] == "stopped" and stopped["step"] == outcome.steps(workdir)[0] >= 5
    assert max(row["step"] for row in outcome.rows(workdir)) == stopped["step"]

    hosts = start(config, workdir, 2, 1)
    reach(workdir, stopped["step"] + 2, hosts[0])
    killed = time.monotonic()
    assert hosts[0].send(signal.SIGKILL), "host 0 is the coordinator"
    assert hosts[1].wait(90) == exits.UNFINISHED, hosts[1].said()
    assert time.monotonic() - killed < 60
    assert "lm: another host was lost" in hosts[1].said()
    assert ends(hosts) == [-signal.SIGKILL, exits.UNFINISHED]

    hosts = start(config, workdir, 2, 1)
    assert ends(hosts) == [0, 0], hosts[0].said() + hosts[1].said()
    assert outcome.differences(outcome.read(workdir), pair[0]) == []
