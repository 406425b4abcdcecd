"""Laws of checkpoints of several hosts: one folder, one decision, each host its own shards."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments import damage
from lm import checkpoints, steps
from tests.states import FACTS, bits, files, names

ROOT = pathlib.Path(__file__).parents[1]


def global_state(step: int, spec, mesh) -> steps.State:
    """A state over all devices of all hosts; its bits depend on the step."""
    x = np.random.default_rng(step).normal(size=(8, 64)).astype(np.float32)
    distribute = lambda x, spec: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, spec), lambda index: x[index]
    )
    scalar = lambda value: distribute(np.asarray(value, np.int32), PartitionSpec())
    tree = {"sharded": distribute(x, spec), "whole": distribute(x * 2, PartitionSpec())}
    return steps.State(scalar(step), tree, {"count": scalar(step)}, scalar(0))


def abstract(state):
    form = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return jax.tree.map(form, state)


def own_bits(tree) -> list:
    """The bits of this host's parts."""
    return [[np.asarray(s.data).tobytes() for s in x.addressable_shards] for x in tree]


def check(actual, step: int, spec, mesh) -> None:
    expected = global_state(step, spec, mesh)
    assert int(actual[0].step) == actual[1]["step"] == step
    for item in ("params", "opt_state"):
        parts = [jax.tree.leaves(getattr(state, item)) for state in (actual[0], expected)]
        assert own_bits(parts[0]) == own_bits(parts[1])


def check_global(directory: pathlib.Path, mesh) -> None:
    """Arrays over all hosts: saved, resharded, damaged, unreadable on one host, incompatible."""
    rows, columns = PartitionSpec("all"), PartitionSpec(None, "all")
    like = abstract(global_state(0, columns, mesh))
    with checkpoints.Checkpoints(directory, max_to_keep=3) as saved:
        for step in (1, 2, 3):
            saved.save(global_state(step, rows, mesh), FACTS)
        saved.wait()
        check(saved.restore(like), 3, columns, mesh)
        multihost_utils.sync_global_devices("restored")
        if jax.process_index() == 0:
            damage.flip(files(directory / "3" / "params")[0], np.random.default_rng(0))
        multihost_utils.sync_global_devices("damaged")
        check(saved.restore(like), 2, columns, mesh)
        assert [name[:9] for name in names(directory)] == ["1", "2", "3.corrupt"]
        saved.save(global_state(3, rows, mesh), FACTS)
        saved.wait()
        if jax.process_index() != 0:
            whole = saved._read_items
            saved._read_items = lambda step, *rest: 1 / 0 if step == 3 else whole(step, *rest)
        check(saved.restore(like), 2, columns, mesh)
        assert saved.steps() == [2, 1]
        check(saved.restore(like, lambda facts: facts["step"] < 2), 1, columns, mesh)
        assert saved.steps() == [1]


def check_local(directory: pathlib.Path) -> None:
    """Every host has the whole state on one device."""
    whole = jax.tree.map(np.asarray, {"a": np.arange(6, dtype=np.float32)})
    placed = jax.device_put(whole, jax.local_devices()[0])
    count = jax.device_put(np.int32(4), jax.local_devices()[0])
    with checkpoints.Checkpoints(directory) as saved:
        saved.save(steps.State(count, placed, {"m": placed["a"]}, count), FACTS)
        saved.wait()
        form = jax.ShapeDtypeStruct((6,), np.float32)
        actual, _ = saved.restore(steps.State(count, {"a": form}, {"m": form}, count))
        assert bits(actual.params) == bits(whole) and bits(actual.opt_state["m"]) == bits(
            whole["a"]
        )
        assert actual.params["a"].devices() == {jax.local_devices()[0]}


def work_as(host: str, port: str, directory: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(host))
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    check_global(pathlib.Path(directory) / "global", mesh)
    check_local(pathlib.Path(directory) / "local")
    print("sound")


def test_two_hosts_save_restore_and_fall_back_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    code = "import sys; from tests import test_checkpoints_hosts as t; t.work_as(*sys.argv[1:])"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(host), port, str(tmp_path)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for host in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    assert all("sound" in output for output in outputs)
