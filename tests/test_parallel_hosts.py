"""Laws of several hosts: two processes with two devices each equal one process with four.

The processes are real, this very file run as a module; they meet over a free port of this machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lm import cli, exits, parallel, steps
from tests import layouts

pytestmark = pytest.mark.slow

LAYOUTS = {
    "pmap": {},
    "fixed": {"deterministic_reduction": True, "num_microbatches": 2},
    "fsdp 4": {"strategy": "mesh", "fsdp": 4},
}
FLAGS = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
TIMEOUT = 400  # seconds for both processes on a busy machine


def trained(options: dict) -> dict:
    """Results of two updates on four devices in this process: sums, bits, rows, disagreement."""
    config = parallel.ParallelConfig(**options)
    strategy = parallel.make_strategy(config, jax.devices()[:4])
    host, hosts = parallel.host_index_and_count()
    step_config = steps.StepConfig(0, config.num_microbatches, config.fixed_shards, ema_decay=0.9)
    step = strategy.compile(layouts.step_of(step_config), donate=True)
    state = strategy.place_state(layouts.made()[2])
    losses, shown = [], strategy.fetch_rows(strategy.place_batch(np.arange(host, 16, hosts)))
    for examples in layouts.BATCHES:
        local_rows = jax.tree.map(lambda x: x[host::hosts], examples)
        state, sums = step(state, strategy.place_batch(local_rows))
        losses.append({name: float(x) for name, x in strategy.fetch_numbers(sums).items()})
    initialized = strategy.init(
        functools.partial(jax.tree.map, jax.numpy.copy), strategy.fetch(state).params
    )
    copied = strategy.find_disagreement(state), strategy.find_disagreement(initialized)
    bits = ""
    if config.fixed_shards:
        leaves = jax.tree.leaves(jax.device_get(strategy.fetch(state)))
        bits = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()
    return {"sums": losses, "rows": shown.tolist(), "bits": bits, "copies": copied}


def main(port: str, host: str) -> None:
    """One of the two processes: print the results of each layout and a barrier as JSON."""
    parallel.initialize(f"localhost:{port}", 2, int(host))
    output = {name: trained(options) for name, options in LAYOUTS.items()}
    time.sleep(2 * (host == "1"))
    came = time.time()
    parallel.barrier("here")
    print(
        json.dumps(
            output | {"came": came, "met": time.time(), "hosts": parallel.host_index_and_count()}
        )
    )


def free_port() -> int:
    """A free port."""
    with socket.socket() as outputs:
        outputs.bind(("localhost", 0))
        return outputs.getsockname()[1]


@pytest.fixture(scope="module")
def pair() -> list[dict]:
    """The JSON output of each of the two processes; both are killed after TIMEOUT."""
    port = str(free_port())
    command = [sys.executable, "-m", "tests.test_parallel_hosts", port]
    options = dict(
        env=os.environ | FLAGS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    hosts = [subprocess.Popen([*command, str(host)], **options) for host in range(2)]
    try:
        outputs = [host.communicate(timeout=TIMEOUT) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, (_, errors) in zip(hosts, outputs, strict=True):
        assert host.returncode == 0, errors[-2000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.fixture(scope="module")
def alone() -> dict:
    """The JSON output of one process with four devices."""
    return {name: trained(options) for name, options in LAYOUTS.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_hosts_take_the_steps_of_one_with_the_same_devices(name, pair, alone):
    for host in pair:
        for actual, expected in zip(host[name]["sums"], alone[name]["sums"], strict=True):
            assert actual == pytest.approx(expected, rel=2e-5, abs=1e-9)
    assert pair[0][name]["sums"] == pair[1][name]["sums"]


def test_deterministic_sums_have_the_same_bits_on_two_hosts(pair, alone):
    bits = {output["fixed"]["bits"] for output in (*pair, alone)}
    assert len(bits) == 1 and len(bits.pop()) == 64


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_host_has_its_rows_in_order_and_equal_copies(name, pair):
    assert [host[name]["rows"] for host in pair] == [list(range(h, 16, 2)) for h in range(2)]
    assert all(host[name]["copies"] == [None, None] for host in pair)


def test_hosts_know_their_index_and_wait_at_a_barrier(pair):
    assert [host["hosts"] for host in pair] == [[0, 2], [1, 2]]
    assert min(host["met"] for host in pair) >= max(host["came"] for host in pair)
    parallel.barrier("nobody else")


# Joining. -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ("host:80", 0, -1),
            r"--coordinator=host:80 --hosts= --host= are incomplete: pass all of",
        ),
        (("", 2, 0), "--coordinator= --hosts=2 --host=0 are incomplete: pass all"),
        (("host", 2, 0), "--coordinator=host has no port; use address:port"),
        (("host:80", 2, 2), "--host=2 is not one of --hosts=2; number them from 0"),
        (("host:80", -2, 0), "--host=0 is not one of --hosts=-2"),
    ],
)
def test_invalid_arguments_of_hosts_are_an_error(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        parallel.initialize(*words)


SLURM = {"JOB_ID": "7", "STEP_NODELIST": "n[1-2]", "PROCID": "1", "LOCALID": "0"}


@pytest.mark.parametrize("tasks, started", [("1", 0), ("2", 1)])
def test_the_environment_of_a_cluster_starts_the_hosts_and_one_machine_does_not(
    tasks, started, monkeypatch
):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    parallel.initialize()
    parallel.initialize("host:80", 1, 0)
    assert not calls
    for name, value in (SLURM | {"NTASKS": tasks}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    parallel.initialize()
    assert len(calls) == started
    assert all(options["heartbeat_timeout_seconds"] <= 60 for options in calls)


def test_hosts_that_do_not_join_are_an_error(monkeypatch):
    def initialize(**options):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="not found within 300 seconds .DEADLINE_EXCEEDED.; start"):
        parallel.initialize("host:80", 2, 0)
    for name, value in (SLURM | {"NTASKS": "2"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    late = r"not found within 300 seconds .DEADLINE_EXCEEDED.; run the same command again"
    with pytest.raises(TimeoutError, match=late) as caught:
        parallel.initialize()

    def work():
        raise caught.value

    assert cli.run_guarded(work) == exits.UNFINISHED, (
        "a late node is no mistake: launchers try again"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
