"""Laws of a full disk: one error, earlier checkpoints stay, and the run resumes with space."""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import checkpoints, inference, logs, runs, steps, train
from tests.states import FACTS, abstract, bits, names

# Orbax does not close writers on a full disk; Python warns when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SENTENCE = "checkpoint 3 could not be written in .*: earlier checkpoints are complete"


def large_state(step: int) -> steps.State:
    """A state of 3 MB."""
    rng = np.random.default_rng(step)
    big = lambda: {"a": jnp.asarray(rng.normal(size=(3, 2**17)).astype(np.float32))}
    return steps.State(jnp.asarray(step, jnp.int32), big(), big(), jnp.asarray(0, jnp.int32))


@contextlib.contextmanager
def limited(size: int):
    """Limit the size of files that this process writes to `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def filled(directory: pathlib.Path, leave: int = 0):
    """Fill the disk of a directory up to some free bytes."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**16))
        file.truncate(file.tell() - leave)
    try:
        yield
    finally:
        ballast.unlink()


@pytest.fixture(scope="module")
def whole_run(tiny_config, tmp_path_factory):
    """A tiny run that saves at every update, trained with enough space."""
    folder = tmp_path_factory.mktemp("whole")
    changes = {"steps": 4, "checkpoint.every_steps": 1, "data.shards_dir": str(folder / "shards")}
    first = runs.make_run(tiny_config(**changes), folder / "run")
    train.train(first, jax.devices()[:1])
    return first


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 12 MB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a disk of its own")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def check_full(directory, full, background: bool) -> None:
    like = abstract(large_state(0))
    with checkpoints.Checkpoints(directory, background=background) as saved:
        for step in (1, 2):
            saved.save(large_state(step), FACTS)
        saved.wait()
        for _ in range(2):
            with full(), pytest.raises(OSError, match=SENTENCE):
                saved.save(large_state(3), FACTS)
                saved.wait()
            assert names(directory) == ["1", "2"]  # the unfinished step was removed
            assert bits(saved.restore(like)[0]) == bits(large_state(2))
        saved.wait()  # raised once only
        saved.save(large_state(3), FACTS)
    with checkpoints.Checkpoints(directory, read_only=True) as saved:
        assert saved.steps() == [3, 2]
        assert bits(saved.restore(like)[0]) == bits(large_state(3))


@pytest.mark.parametrize("background", [True, False])
def test_a_file_size_limit_is_an_error_and_saving_works_afterwards(background, tmp_path):
    check_full(tmp_path / "checkpoints", lambda: limited(2**20), background)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_an_error_and_saving_works_afterwards(background, small_disk):
    check_full(small_disk / "checkpoints", lambda: filled(small_disk), background)


def params_of(workdir) -> list:
    run = runs.read_run(workdir)
    return bits(inference.read_params(run, runs.make_tokenizer(run))[0])


@pytest.mark.slow
@pytest.mark.parametrize("share", [1.7])
def test_a_run_resumes_bit_for_bit_after_a_full_disk(share, whole_run, small_disk):
    first, workdir = whole_run, small_disk / "run"
    num_bytes = sum(
        path.stat().st_size for path in (first.workdir / "checkpoints" / "4").rglob("*")
    )
    run = runs.make_run(first.config_dict, workdir)
    with filled(small_disk, int(share * num_bytes)), pytest.raises(OSError, match="space"):
        train.train(run, jax.devices()[:1])
    train.train(run, jax.devices()[:1])
    assert params_of(workdir) == params_of(first.workdir)
    rows = [logs.read(folder / logs.METRICS) for folder in (workdir, first.workdir)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
