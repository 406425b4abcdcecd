"""Laws of the drill, and a run killed at named points: every one is found, none changes a bit."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from experiments.kill_drill import __main__ as program
from experiments.kill_drill import children, outcome, page
from lm import runs

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
STEPS, SAVE = 12, 3
CONFIG = """
import json, pathlib
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""
POINTS = (  # what is about to happen when the process dies, one after another in one run
    "open checkpoints/0/commit_success.txt",
    "open checkpoints/3.*/facts/metadata",
    "os.re.* checkpoints/0/",
    "os.rmdir checkpoints/3",
)
TOUCHES = """
import os, shutil, sys
from experiments.kill_drill import faults
faults.watch(sys.argv[1], int(sys.argv[3]), sys.argv[2])
home = sys.argv[1]
os.mkdir(home + "/a")
open(home + "/a/b", "w").close()
open(home + "/a/b").close()
os.rename(home + "/a/b", home + "/a/c")
open(sys.argv[2] + ".other", "w").close()
shutil.rmtree(home + "/a")
"""


def touched(folder: pathlib.Path, last: int) -> tuple[int, list[str]]:
    """The exit code and the record of a process that makes and removes a folder with a file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    record = folder.with_suffix(".record")
    record.unlink(missing_ok=True)
    line = [sys.executable, "-c", TOUCHES, str(folder), str(record), str(last)]
    code = subprocess.run(line, cwd=ROOT, check=False).returncode
    return code, record.read_text().splitlines()


def test_every_change_of_a_folder_is_a_point_and_the_process_dies_before_it(tmp_path):
    code, points = touched(tmp_path / "home", 0)
    expected = ["os.mkdir a", "open a/b", "os.rename a/b", "shutil.rmtree a", "os.remove a/c"]
    assert code == 0 and points == [*expected, "os.rmdir a"]
    assert touched(tmp_path / "home", 3) == (-signal.SIGKILL, points[:3])
    assert (tmp_path / "home" / "a" / "b").exists(), "it was renamed first"
    assert touched(tmp_path / "home", 5)[0] == -signal.SIGKILL
    assert (tmp_path / "home" / "a" / "c").exists(), "it was removed first"


@pytest.fixture(scope="module")
def config(tiny_config, tiny_tokens, tmp_path_factory):
    """A file for --config of a tiny run with dropout, its shards made."""
    os.environ.update(children.surroundings(pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])))
    path = tmp_path_factory.mktemp("points") / "config.py"
    changes = {
        "steps": STEPS,
        "checkpoint.every_steps": SAVE,
        "log_every_steps": 1,
        "eval_every_steps": 6,
    }
    changes |= {"model.dropout_rate": 0.1, "evaluate.max_examples": 8}
    made = tiny_config(**changes | {"data.shards_dir": str(path.parent / "shards")})
    path.write_text(CONFIG)
    path.with_suffix(".json").write_text(json.dumps(made))
    runs.make_examples(runs.make_run(made, path.parent / "made"), tiny_tokens)
    return path


def child(config, workdir, **faults) -> children.Child:
    arguments = ["train", f"--config={config}", f"--workdir={workdir}"]
    return children.Child(arguments, workdir.with_suffix(".log"), faults=faults)


@pytest.fixture(scope="module")
def unbroken(config):
    workdir = config.parent / "unbroken"
    one = child(config, workdir)
    assert one.wait() == 0, one.said()
    return outcome.read(workdir)


def test_a_run_killed_at_named_points_is_the_run_that_was_not(config, unbroken):
    workdir = config.parent / "killed"
    for pattern in POINTS:
        record = workdir.with_suffix(".points")
        one = child(config, workdir, watch=(str(workdir), pattern, str(record)))
        assert one.wait() == -signal.SIGKILL, (pattern, one.said())
    one = child(config, workdir)
    assert one.wait() == 0, one.said()
    assert outcome.differences(outcome.read(workdir), unbroken) == []


def test_whatever_is_changed_in_an_outcome_is_told(unbroken):
    assert outcome.differences(unbroken, unbroken) == []
    found = [outcome.differences(*pair) for pair in program.alterations(unbroken)]
    assert all(len(words) == 1 for words in found), found
    starts = [words[0].split(" ")[0] for words in found]
    assert starts == ["leaves", "facts", "log,", "log,", "left"]


def test_held_out_figures_alone_may_be_a_little_apart(unbroken):
    def moved(split: str, factor: float) -> outcome.Outcome:
        (last,) = [row for row in unbroken.rows if row["step"] == STEPS and row["split"] == split]
        rows = [
            row | {"loss": row["loss"] * factor} if row == last else row for row in unbroken.rows
        ]
        return outcome.evened(unbroken._replace(rows=rows), unbroken)

    assert outcome.differences(moved("heldout", 1 + 1e-6), unbroken) == []
    for split, factor in (("heldout", 1.001), ("train", 1 + 1e-6)):
        (said,) = outcome.differences(moved(split, factor), unbroken)
        assert said.endswith(f"at {STEPS} {split}: loss"), said


ROW = {"faults": 3, "right": True, "identical": True}


def test_the_table_counts_trials_faults_and_what_they_cost():
    rows = [ROW | {"kind": "kill", "lost": [0, 4], "resume_seconds": [2.0, 3.0]} for _ in range(9)]
    rows.append(ROW | {"kind": "term", "faults": 1, "right": False, "identical": False})
    text = page.table(rows)
    assert "| kill | 9 | 27 | 9 of 9 | 0 / 4 | 2.0 / 3.0 |  |" in text
    assert "| term | 1 | 1 | 0 of 1 |  |  |  |" in text
    assert "| **all** | 10 | 28 | 9 of 10 |" in text
    told = page.sums(rows)
    assert (told["kills"], told["compared"], told["identical"], told["wrong"]) == (27, 10, 9, 1)


def test_silent_corruptions_are_counted_among_damaged_checkpoints_alone():
    found = [{"fault": "flip", "wrong": ""}, {"fault": "", "wrong": ""}]
    rows = [ROW | {"kind": "damaged", "found": found}]
    assert page.sums(rows)["damaged"] == 1 and page.sums(rows)["silent"] == 0
    rows = [ROW | {"kind": "damaged", "found": [*found, {"fault": "flip", "wrong": "silent"}]}]
    assert page.sums(rows)["damaged"] == 2 and page.sums(rows)["silent"] == 1


def test_a_process_that_is_killed_is_told_from_one_that_ended(config, capfd):
    one = children.Child(["show", "--help"], config.with_suffix(".log"))
    assert one.wait() == 0 and "python -m lm show" in one.said()
    assert not one.send(signal.SIGKILL)
    wrong = children.Child(["trian"], config.with_suffix(".log"), plain=True)
    assert wrong.wait() == 2 and "did you mean 'train'" in wrong.said()
