"""Laws of several hosts: two processes of two devices do what one process with the four does.

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
PATIENCE = 400  # seconds that both may take on a busy machine


def trained(options: dict) -> dict:
    """What this process sees of two updates on four devices: figures, bits, rows, agreement."""
    config = parallel.ParallelConfig(**options)
    strategy = parallel.make_strategy(config, jax.devices()[:4])
    host, hosts = parallel.host_index_and_count()
    step_config = steps.StepConfig(0, config.num_microbatches, config.fixed_shards, ema_decay=0.9)
    step = strategy.compile(layouts.step_of(step_config), donate=True)
    state = strategy.place_state(layouts.made()[2])
    losses, shown = [], strategy.fetch_rows(strategy.place_batch(np.arange(host, 16, hosts)))
    for examples in layouts.BATCHES:
        own = jax.tree.map(lambda x: x[host::hosts], examples)
        state, sums = step(state, strategy.place_batch(own))
        losses.append({name: float(x) for name, x in strategy.fetch_numbers(sums).items()})
    made = strategy.init(
        functools.partial(jax.tree.map, jax.numpy.copy), strategy.fetch(state).params
    )
    copied = strategy.find_disagreement(state), strategy.find_disagreement(made)
    bits = ""
    if config.fixed_shards:
        leaves = jax.tree.leaves(jax.device_get(strategy.fetch(state)))
        bits = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()
    return {"sums": losses, "rows": shown.tolist(), "bits": bits, "copies": copied}


def main(port: str, host: str) -> None:
    """One of the two processes: a line of JSON for each layout, and when the hosts met."""
    parallel.initialize(f"localhost:{port}", 2, int(host))
    said = {name: trained(options) for name, options in LAYOUTS.items()}
    time.sleep(2 * (host == "1"))
    came = time.time()
    parallel.barrier("here")
    print(
        json.dumps(
            said | {"came": came, "met": time.time(), "hosts": parallel.host_index_and_count()}
        )
    )


def free_port() -> int:
    """A port that no one listens on now."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def pair() -> list[dict]:
    """What each of the two processes has to say; both are killed if they take too long."""
    port = str(free_port())
    command = [sys.executable, "-m", "tests.test_parallel_hosts", port]
    options = dict(
        env=os.environ | FLAGS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    hosts = [subprocess.Popen([*command, str(host)], **options) for host in range(2)]
    try:
        found = [host.communicate(timeout=PATIENCE) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, (_, errors) in zip(hosts, found, strict=True):
        assert host.returncode == 0, errors[-2000:]
    return [json.loads(said.splitlines()[-1]) for said, _ in found]


@pytest.fixture(scope="module")
def alone() -> dict:
    """What one process with four devices has to say."""
    return {name: trained(options) for name, options in LAYOUTS.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_hosts_take_the_steps_of_one_with_the_same_devices(name, pair, alone):
    for host in pair:
        for ours, theirs in zip(host[name]["sums"], alone[name]["sums"], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-9)
    assert pair[0][name]["sums"] == pair[1][name]["sums"]


def test_fixed_sums_have_the_same_bits_on_two_hosts(pair, alone):
    bits = {said["fixed"]["bits"] for said in (*pair, alone)}
    assert len(bits) == 1 and len(bits.pop()) == 64


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_host_has_its_own_rows_in_order_and_sound_copies(name, pair):
    assert [host[name]["rows"] for host in pair] == [list(range(h, 16, 2)) for h in range(2)]
    assert all(host[name]["copies"] == [None, None] for host in pair)


def test_hosts_know_their_number_and_wait_for_the_last(pair):
    assert [host["hosts"] for host in pair] == [[0, 2], [1, 2]]
    assert min(host["met"] for host in pair) >= max(host["came"] for host in pair)
    parallel.barrier("nobody else")


# How they find each other. --------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ("here:80", 0, -1),
            r"--coordinator=here:80 --hosts= --host= are incomplete: pass all of",
        ),
        (("", 2, 0), "--coordinator= --hosts=2 --host=0 are incomplete: pass all"),
        (("here", 2, 0), "--coordinator=here has no port; use address:port"),
        (("here:80", 2, 2), "--host=2 is not one of --hosts=2; number them from 0"),
        (("here:80", -2, 0), "--host=0 is not one of --hosts=-2"),
    ],
)
def test_words_that_name_no_host_are_a_sentence(words, sentence):
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
    parallel.initialize("here:80", 1, 0)
    assert not calls
    for name, value in (SLURM | {"NTASKS": tasks}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    parallel.initialize()
    assert len(calls) == started
    assert all(options["heartbeat_timeout_seconds"] <= 60 for options in calls)


def test_hosts_that_do_not_come_are_a_sentence(monkeypatch):
    def initialize(**options):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="not found within 300 seconds .DEADLINE_EXCEEDED.; start"):
        parallel.initialize("here:80", 2, 0)
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
