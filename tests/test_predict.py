"""Laws of predict: a file of inputs to a file of answers, in order, whole, whatever interrupts."""

from __future__ import annotations

import json
import pathlib

import pytest

from lm import evaluate, run, train

CHANGES = {"data.task": "docstring_summary", "stage": "finetune", "steps": 2, "every.checkpoint": 2}
CHANGES |= {"every.evaluate": 2, "data.batch_size": 2, "evaluate.decode": 1, "parallel.data": 2}


@pytest.fixture(scope="module")
def workdir(tiny_config, tmp_path_factory):
    """A run that was trained for two updates."""
    at = tmp_path_factory.mktemp("predict") / "run"
    train.train(run.make_run(tiny_config(**CHANGES), at))
    return at


def rows_of(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_x(workdir, tmp_path):
    rows = [{"inputs": "summarize: " + "kilo lima " * (i % 20)} for i in range(37)]
    evaluate.predict(workdir, rows, str(tmp_path / "out"))
    print((tmp_path/"out").read_text())
    print(list(tmp_path.iterdir()))
