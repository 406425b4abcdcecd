"""Several hosts as one: how they find each other, and wait for each other."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import jax
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from lm import exits

HEARTBEAT = 30  # seconds without a sign of life after which a host counts as lost
PATIENCE = 300  # seconds to wait for the other hosts at the start
DAY = 24 * 60 * 60 * 1000  # milliseconds
FAREWELL = 20_000  # milliseconds in which the others may come to the same end


def initialize(coordinator: str = "", hosts: int = 0, host: int = -1, *, patience=PATIENCE) -> None:
    """Join the other hosts, before any device is used; a machine by itself does nothing.

    coordinator: address:port of host 0, the same on all; hosts: their number; host: this one's,
    from 0. With none of them, what the environment says (TPU pods, SLURM, Open MPI); patience in
    seconds. Raises ValueError for half-given words, and where the others of given words are not
    found; TimeoutError where those of the environment are not, which may only be late.
    """
    given = (bool(coordinator), hosts != 0, host != -1)
    if any(given) and not all(given):
        raise ValueError(
            f"--coordinator={coordinator} --hosts={hosts or ''} --host={'' if host < 0 else host} "
            f"say only in part who runs this; give all three, or none."
        )
    if all(given):
        _check(coordinator, hosts, host)
        if hosts == 1:
            return
        found = {"coordinator_address": coordinator, "num_processes": hosts, "process_id": host}
        found["cluster_detection_method"] = "deactivate"
    elif _clustered() > 1:
        found = {}
    else:
        return
    try:
        jax.distributed.initialize(
            **found, initialization_timeout=patience, heartbeat_timeout_seconds=HEARTBEAT
        )
    except RuntimeError as error:
        reason = exits.one_line(error)
        missed = f"the other hosts were not found within {patience} seconds ({reason})"
        if not all(given):  # nobody's mistake: a pod or a node is late
            raise TimeoutError(f"{missed}; run the same command again.") from error
        raise ValueError(
            f"{missed}; start the same command on each, with the address of host 0."
        ) from error


def _check(coordinator: str, hosts: int, host: int) -> None:
    _, colon, port = coordinator.rpartition(":")
    if not colon or not port.isdecimal():
        raise ValueError(
            f"--coordinator={coordinator} has no port; use address:port, as 10.0.0.1:8476."
        )
    if hosts < 1 or not 0 <= host < hosts:
        raise ValueError(f"--host={host} is none of --hosts={hosts}; number them from 0.")


def _clustered() -> int:
    """How many processes the environment speaks of; 1 where it says nothing."""
    known = clusters.ClusterEnv._cluster_types
    ours = (kind for kind in known if not kind.opt_in_only_method and kind.is_env_present())
    return next((kind.get_process_count() for kind in ours), 1)


def host_index_and_count() -> tuple[int, int]:
    """(this host's number from 0, the number of hosts)."""
    return jax.process_index(), jax.process_count()


def barrier(name: str) -> None:
    """Wait until every host has come to the meeting of this name, a day at most; no device takes
    part. Raises JaxRuntimeError where a host is lost.
    """
    if distributed.global_state.client is not None:
        distributed.global_state.client.wait_at_barrier(name, DAY)


def wait_before_exit() -> None:
    """Before this host ends with a mistake: wait a little for the others to see it as well.

    A host that is still starting when host 0 is gone is aborted by jax, and says that instead.
    """
    client = distributed.global_state.client
    if client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others have made no mistake
            client.wait_at_barrier("a mistake", FAREWELL)
        if distributed.global_state.process_id == 0:
            time.sleep(1)  # the others are gone by then


def host_rows(rows: Any) -> Any:
    """This host's rows of arrays that all hosts have: of H hosts, host h has rows h, h + H, .."""
    host, count = host_index_and_count()
    return jax.tree.map(lambda x: x[host::count], rows)


def gather_rows(own: Any) -> Any:
    """The rows of all hosts on every host, as numpy: undoes own_rows. Every host must call this."""
    if host_index_and_count()[1] == 1:
        return own

    def gathered(x):
        by_host = multihost_utils.process_allgather(x)
        return by_host.swapaxes(0, 1).reshape(-1, *x.shape[1:])

    return jax.tree.map(gathered, own)
