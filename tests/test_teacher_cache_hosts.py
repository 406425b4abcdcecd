"""Laws of distillation on several hosts, in real processes: caches and losses do not depend on the
number of processes that share the devices.
"""

from __future__ import annotations

import json
import os
import pathlib

import pytest

from experiments.kill_drill import children, drill, outcome
from lm import runs
from tests import host_processes, untrained

pytestmark = pytest.mark.slow

STEPS = 4
ON_POLICY = ({"labels": {"weight": 0.5}, "reverse_kl": {"weight": 0.5}}, 0.5)
OUT = {"teacher-cache": "out", "train": "workdir"}  # the flag of what a command writes


@pytest.fixture(scope="module")
def config(tiny_config, tiny_tokens, tmp_path_factory):
    """A config file of a student with dropout and an untrained teacher; shards exist."""
    home = tmp_path_factory.mktemp("hosts")
    pairs = {"data.task": "docstring_summary", "data.target_length": 12, "steps": STEPS}
    pairs |= {
        "data.shards_dir": str(home / "shards"),
        "evaluate.max_examples": 8,
        "eval_every_steps": STEPS,
    }
    teacher = untrained.write(tiny_config(**pairs), home / "teacher")
    runs.make_examples(teacher, tiny_tokens)
    student = {"stage": "distill", "teacher.workdir": str(home / "teacher")}
    student |= {
        "model.num_decoder_layers": 1,
        "model.dropout_rate": 0.1,
        "checkpoint.every_steps": 2,
    }
    (home / "config.py").write_text(host_processes.CONFIG)
    (home / "config.json").write_text(json.dumps(tiny_config(**pairs | student)))
    with pytest.MonkeyPatch.context() as patch:
        cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
        for key, value in children.surroundings(cache).items():
            patch.setenv(key, value)
        yield home / "config.py"


def written(config, command: str, name: str, hosts: int, *flags: str) -> pathlib.Path:
    """The folder that a command wrote on two devices, shared by this number of processes."""
    out, port = config.parent / name, drill.free_port()
    flags = (command, f"--config={config}", f"--{OUT[command]}={out}", *flags)
    together = (f"--coordinator=127.0.0.1:{port}", f"--hosts={hosts}") * (hosts > 1)
    started = [
        children.Child(
            [*flags, *together, *[f"--host={host}"] * (hosts > 1)],
            config.parent / f"{name}.{host}.log",
            devices=2 // hosts,
        )
        for host in range(hosts)
    ]
    codes = host_processes.ends(started)
    assert codes == [0] * hosts, "\n".join(child.said() for child in started)
    return out


@pytest.fixture(scope="module")
def caches(config):
    """The caches of one process and of two."""
    return [written(config, "teacher-cache", f"cache{hosts}", hosts) for hosts in (1, 2)]


def assert_alike(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    """Assert equal training rows, up to the order of additions."""
    ours, theirs = (
        [row for row in outcome.rows(where) if row["split"] == "train"] for where in (ours, theirs)
    )
    assert [row["step"] for row in ours] == [*range(1, STEPS + 1)]
    for row, expected in zip(ours, theirs, strict=True):
        learnt = {name for name in row if name.startswith("teacher/")}
        assert learnt
        for name in {"loss", "gradient_norm", *learnt}:
            assert row[name] == pytest.approx(expected[name], rel=1e-5), (row["step"], name)


def test_two_processes_write_the_cache_of_one(caches):
    one, two = ({file.name: file.read_bytes() for file in each.iterdir()} for each in caches)
    assert one == two and len(one) == 2


def test_two_processes_train_from_a_cache_as_one_and_one_resumes_them(config, caches):
    flags = f"--config.teacher.cache={caches[1]}", "--allow_change=steps"
    alone = written(config, "train", "alone", 1, *flags)
    written(config, "train", "pair", 2, *flags, "--config.steps=2")
    assert_alike(written(config, "train", "pair", 1, *flags), alone)


def test_two_processes_train_on_policy_as_one(config):
    loss, policy = ON_POLICY
    flags = f"--config.teacher.loss={loss}", f"--config.teacher.on_policy.fraction={policy}"
    one, two = (written(config, "train", f"own{hosts}", hosts, *flags) for hosts in (1, 2))
    assert_alike(two, one)
