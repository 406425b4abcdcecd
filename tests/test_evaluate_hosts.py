"""Laws of evaluate on several hosts: real processes through the command line."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

import jax
import pytest

from experiments.kill_drill import children, drill
from lm import evaluate, exits, runs, train


@pytest.fixture(scope="module")
def workdir(tiny_config, tmp_path_factory):
    """A run of 3 updates with 10 held-out pairs, not a multiple of the batch size."""
    os.environ.update(children.surroundings(pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])))
    workdir = tmp_path_factory.mktemp("together") / "run"
    config = tiny_config(
        **{"stage": "finetune", "evaluate.max_decoded_examples": 10, "evaluate.max_examples": 10}
    )
    task = {"source": "tfds:pydocs", "inputs": "{body}", "targets": "{summary}"}
    config["data"] |= {"task": "mine", "custom_tasks": {"mine": task | {"metrics": ["chrf"]}}}
    train.train(runs.make_run(config | {"steps": 3}, workdir), jax.devices()[:2])
    return workdir


def start(workdir, host: int, port: int, *flags: str) -> children.Child:
    host_flags = [f"--coordinator=127.0.0.1:{port}", "--hosts=2", f"--host={host}"]
    log = workdir.with_name(f"{workdir.name}.{host}.log")
    return children.Child(["evaluate", f"--workdir={workdir}", *host_flags, *flags], log, devices=1)


def run_hosts(workdir, *flags: str) -> tuple[list[int | None], list[str]]:
    """Return the exit codes and outputs of two processes; a process that hangs is killed."""
    port = drill.free_port()
    processes = [start(workdir, host, port, *flags) for host in (0, 1)]
    codes = [child.wait(150) for child in processes]
    for child in processes:
        child.end()
    return codes, [child.said() for child in processes]


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one_and_one_of_them_writes(workdir, tmp_path):
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    for copy in (alone, pair):
        shutil.copytree(workdir, copy)
    expected = evaluate.evaluate(alone)
    codes, outputs = run_hosts(pair)
    assert codes == [0, 0], outputs
    actual = json.loads((pair / "evaluate.json").read_text())
    assert actual["examples"] == 10 and actual["tokens"] == expected["tokens"]
    for name in ("nats", "bits_per_byte", "token_accuracy", "chrf", "unigram_nats"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-5), name
        if name in expected["intervals"]:
            interval = pytest.approx(expected["intervals"][name], rel=1e-5)
            assert actual["intervals"][name] == interval, name
    predictions = [(copy / "predictions.jsonl").read_text() for copy in (alone, pair)]
    assert predictions[0] == predictions[1]
    assert '"nats"' in outputs[0] and '"nats"' not in outputs[1], "the first host prints"


@pytest.mark.slow
def test_an_error_of_a_host_ends_all_hosts(workdir):
    codes, outputs = run_hosts(workdir, "--split=tset")
    assert codes == [2, exits.UNFINISHED], outputs
    assert "lm: the split of pydocs='tset' is unknown" in outputs[0]
    assert "lm: another host was lost" in outputs[1]
    assert not any("Traceback" in output for output in outputs)
