"""Hosts that run one program: joining, barriers, exchanging rows."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import jax
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from lm import exits

HEARTBEAT_SECONDS = 30  # a host without a heartbeat for this long is lost
JOIN_SECONDS = 300  # timeout for the other hosts at the start
BARRIER_MS = 24 * 60 * 60 * 1000
EXIT_BARRIER_MS = 20_000  # timeout for the other hosts to fail with the same error

Hosts = tuple[int, int]  # (the index of this host from 0, the number of hosts)


def initialize(
    coordinator: str = "", hosts: int = 0, host: int = -1, *, timeout: int = JOIN_SECONDS
) -> None:
    """Join the other hosts, before any device is used; does nothing on a single machine.

    Without coordinator, hosts and host the environment decides (TPU pods, SLURM, Open MPI).

    Args:
      coordinator: address:port of host 0, the same on all hosts.
      hosts: the number of hosts.
      host: the index of this host, from 0.
      timeout: seconds to wait for the other hosts.

    Raises:
      ValueError: the arguments are invalid or incomplete, or their hosts did not join.
      TimeoutError: the hosts of the environment did not join; they may be late.
    """
    passed = (bool(coordinator), hosts != 0, host != -1)
    if any(passed) and not all(passed):
        raise ValueError(
            f"--coordinator={coordinator} --hosts={hosts or ''} --host={'' if host < 0 else host} "
            f"are incomplete: pass all of --coordinator, --hosts and --host, or none."
        )
    options = {}
    if all(passed):
        _check_arguments(coordinator, hosts, host)
        if hosts == 1:
            return
        options = {"coordinator_address": coordinator, "num_processes": hosts, "process_id": host}
        options["cluster_detection_method"] = "deactivate"
    elif _cluster_size() == 1:
        return
    try:
        jax.distributed.initialize(
            **options, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except RuntimeError as error:
        reason = exits.one_line(error)
        problem = f"the other hosts were not found within {timeout} seconds ({reason})"
        if not all(passed):  # not a user error: a node is late
            raise TimeoutError(f"{problem}; run the same command again.") from error
        raise ValueError(
            f"{problem}; start the same command on each host, with the address of host 0."
        ) from error


def _check_arguments(coordinator: str, hosts: int, host: int) -> None:
    _, colon, port = coordinator.rpartition(":")
    if not colon or not port.isdecimal():
        raise ValueError(
            f"--coordinator={coordinator} has no port; use address:port, as 10.0.0.1:8476."
        )
    if hosts < 1 or not 0 <= host < hosts:
        raise ValueError(f"--host={host} is not one of --hosts={hosts}; number them from 0.")


def _cluster_size() -> int:
    """Return the number of processes of the environment's cluster; 1 without a cluster."""
    kinds = clusters.ClusterEnv._cluster_types
    present = (kind for kind in kinds if not kind.opt_in_only_method and kind.is_env_present())
    return next((kind.get_process_count() for kind in present), 1)


def host_index_and_count() -> Hosts:
    """Return (the index of this host from 0, the number of hosts)."""
    return jax.process_index(), jax.process_count()


def barrier(name: str) -> None:
    """Wait, for a day at most, until every host reaches the barrier of this name.

    Uses no device. Raises JaxRuntimeError if a host is lost.
    """
    if distributed.global_state.client is not None:
        distributed.global_state.client.wait_at_barrier(name, BARRIER_MS)


def wait_before_exit() -> None:
    """Wait before an exit with an error until the other hosts have met the same error.

    When host 0 exits, jax aborts hosts that are still starting, and hides their messages.
    """
    client = distributed.global_state.client
    if client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the other hosts have no error
            client.wait_at_barrier("exit with an error", EXIT_BARRIER_MS)
        if distributed.global_state.process_id == 0:
            time.sleep(1)  # until the others have exited


def host_rows(rows: Any) -> Any:
    """Return this host's rows of arrays that all hosts have: rows h, h + H, .. on host h of H."""
    host, count = host_index_and_count()
    return jax.tree.map(lambda x: x[host::count], rows)


def gather_rows(rows: Any) -> Any:
    """Gather the rows of all hosts as numpy, the inverse of host_rows; every host must call it."""
    if host_index_and_count()[1] == 1:
        return rows

    def gather(x):
        by_host = multihost_utils.process_allgather(x)
        return by_host.swapaxes(0, 1).reshape(-1, *x.shape[1:])

    return jax.tree.map(gather, rows)
