"""Several hosts evaluate as one: real processes through the door, each with its rows."""

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
    """A run of 3 updates on pairs, 10 of them held out: no multiple of a batch."""
    os.environ.update(children.surroundings(pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])))
    place = tmp_path_factory.mktemp("together") / "run"
    made = tiny_config(
        **{"stage": "finetune", "evaluate.max_decoded_examples": 10, "evaluate.max_examples": 10}
    )
    mine = {"source": "tfds:pydocs", "inputs": "{body}", "targets": "{summary}"}
    made["data"] |= {"task": "mine", "custom_tasks": {"mine": mine | {"metrics": ["chrf"]}}}
    train.train(runs.make_run(made | {"steps": 3}, place), jax.devices()[:2])
    return place


def started(workdir, host: int, port: int, *flags: str) -> children.Child:
    together = [f"--coordinator=127.0.0.1:{port}", "--hosts=2", f"--host={host}"]
    log = workdir.with_name(f"{workdir.name}.{host}.log")
    return children.Child(["evaluate", f"--workdir={workdir}", *together, *flags], log, devices=1)


def ends(workdir, *flags: str) -> tuple[list[int | None], list[str]]:
    """The exit codes of two processes, and what they said; whoever hangs is killed."""
    port = drill.free_port()
    both = [started(workdir, host, port, *flags) for host in (0, 1)]
    codes = [child.wait(150) for child in both]
    for child in both:
        child.end()
    return codes, [child.said() for child in both]


def test_two_processes_evaluate_as_one_and_one_of_them_writes(workdir, tmp_path):
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    for place in (alone, pair):
        shutil.copytree(workdir, place)
    expected = evaluate.evaluate(alone)
    codes, said = ends(pair)
    assert codes == [0, 0], said
    found = json.loads((pair / "evaluate.json").read_text())
    assert found["examples"] == 10 and found["tokens"] == expected["tokens"]
    for name in ("nats", "bits_per_byte", "token_accuracy", "chrf", "unigram_nats"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
        if name in expected["intervals"]:
            ends_of = expected["intervals"][name]
            assert found["intervals"][name] == pytest.approx(ends_of, rel=1e-5), name
    written = [(place / "predictions.jsonl").read_text() for place in (alone, pair)]
    assert written[0] == written[1]
    assert '"nats"' in said[0] and '"nats"' not in said[1], "one prints"


def test_a_mistake_is_a_sentence_and_no_host_waits(workdir):
    codes, said = ends(workdir, "--split=tset")
    assert codes == [2, exits.UNFINISHED], said
    assert "lm: the split of pydocs='tset' is unknown" in said[0]
    assert "lm: another host was lost" in said[1]
    assert not any("Traceback" in each for each in said)
