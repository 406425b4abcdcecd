"""data.num_workers: the order equals that of one process; a dead worker is an error at once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lm import pipeline, runs

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def examples(tiny_config, tiny_tokens, tmp_path_factory) -> pipeline.Examples:
    """Training examples of text and of packed pairs."""
    changes = {
        "data.mixture": (("wikipedia", None), ("docstring_summary", None)),
        "data.packing": "first_fit",
    }
    run = runs.make_run(tiny_config(**changes), tmp_path_factory.mktemp("made"))
    return runs.make_examples(run, tiny_tokens)[0]


def with_workers(examples: pipeline.Examples, workers: int) -> pipeline.Examples:
    data = dataclasses.replace(examples.data, num_workers=workers)
    splits = (dataclasses.replace(split, data=data) for split in examples.splits)
    return pipeline.Examples(tuple(splits))


def take(iterator, count: int) -> list:
    return list(itertools.islice(iterator, count))


@pytest.mark.parametrize(("workers", "host"), [(1, 0), (3, 1)])
def test_the_order_is_the_same_for_any_number_of_workers(examples, workers, host):
    several = with_workers(examples, workers)
    where = dict(seed=2, start=3, host=host, hosts=2)
    actual = pipeline.train_batches(several, **where)
    expected = take(pipeline.train_batches(examples, **where), 8)
    for rows, reference in zip(take(actual, 8), expected, strict=True):
        for array, right in zip(rows[:4], reference[:4], strict=True):
            np.testing.assert_array_equal(array, right)
            assert array.dtype == right.dtype
    actual.close()


def test_a_killed_worker_is_an_error_at_once_and_the_others_exit(examples):
    others = multiprocessing.active_children()
    batches = pipeline.train_batches(with_workers(examples, 2), seed=0)
    next(batches)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(
        ChildProcessError, match=r"data.num_workers=2 ended with exit code -9 .* again"
    ):
        take(batches, 5)
    assert time.monotonic() - start < 5
    for worker in workers:
        worker.join(timeout=10)
        assert worker.exitcode is not None


def test_workers_ignore_a_signal_to_all_processes(examples):
    others = multiprocessing.active_children()
    batches = pipeline.train_batches(with_workers(examples, 2), seed=0)
    take(batches, 3)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(take(batches, 5))) == 5
    batches.close()
    for worker in workers:
        worker.join(timeout=10)
        assert worker.exitcode == 0


def test_an_error_in_a_worker_is_raised_in_the_parent(examples, tmp_path):
    (text, _) = examples.splits
    gone = dataclasses.replace(text, directory=str(tmp_path / "gone"))
    examples = with_workers(dataclasses.replace(examples, splits=(gone,)), 1)
    # Sizes come from the manifest; the worker opens the files.
    with pytest.raises(ValueError, match="gone.* has 0 bytes instead of .*; remove .*built again"):
        take(pipeline.train_batches(examples, seed=0), 1)


SCRIPT = """
import itertools, os, pathlib, sys
import numpy as np
from lm import objectives, pipeline, shards
from lm.pipeline import batches

class Witness(pipeline.Examples):
    def batch(self, numbers, addresses, seed, damaged):
        super().batch(numbers, addresses, seed)
        return "jax" in sys.modules, os.getpid()

if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1])
    file = shards.write_text(out / "file", [np.arange(3, 3000)], np.array([4]), 4000)
    manifest = shards.write_manifest(out, {}, {"file": file}, {})
    ids = np.arange(3990, 4000)
    vocabulary = objectives.Vocabulary(ids, 1, np.arange(3, 300), np.zeros(4000, bool))
    data = pipeline.DataConfig(input_length=64, batch_size=4, num_workers=2)
    split = pipeline.TaskSplit(
        "t", str(out), manifest, data, objectives.ObjectiveConfig(), vocabulary
    )
    rows = [(np.arange(4), np.arange(4))] * 1000
    made = batches._by_workers(Witness((split,)), 0, rows)
    for (flag, pid), _ in itertools.islice(made, int(sys.argv[2])):
        print(flag, pid, flush=True)
"""


def test_a_process_with_unread_batches_exits(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command, environment = [sys.executable, script, tmp_path, "4"], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, timeout=60, check=False
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4


def test_workers_import_no_jax_and_exit_with_a_killed_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), "999"], env=environment, stdout=subprocess.PIPE
    )
    lines = [process.stdout.readline().split() for _ in range(4)]
    process.kill()
    process.wait()
    process.stdout.close()
    assert [flag for flag, _ in lines] == [b"False"] * 4
    pids = {int(pid) for _, pid in lines}
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs and is no zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_resumes_with_another_number_of_workers_only(tiny_config, tiny_tokens, tmp_path):
    shutil.copytree(tiny_tokens.directory, tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    runs.check_workdir(runs.make_run(tiny_config(**{"data.num_workers": 3}), tmp_path))
    for key, value in (("batch_size", 16), ("max_examples_per_task", 5), ("packing", "first_fit")):
        config = tiny_config(
            **{
                f"data.{key}": value,
                "data.mixture": (("wikipedia", None), ("docstring_summary", None)),
            }
        )
        with pytest.raises(ValueError, match=f"another config: .*data.{key}"):
            runs.check_workdir(runs.make_run(config, tmp_path))
    free = tiny_config()["data"].keys() - runs.without_operational(tiny_config())["data"].keys()
    assert free == {"num_workers", "max_bad_records"}
