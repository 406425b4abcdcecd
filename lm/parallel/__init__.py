"""Strategies that place state and batches on devices and compile steps: pmap and mesh.

strategy   Strategy: the interface of both
pmap       Pmap: the state is replicated, the batch is split by rows
mesh       Mesh: one program over the axes data, fsdp and tensor
sharding   rules that shard parameters by path
replicas   comparing the copies of an array on different devices
multihost  joining hosts, barriers, exchanging rows
config     ParallelConfig
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from lm.parallel.config import ParallelConfig, check_batch_size
from lm.parallel.mesh import Mesh
from lm.parallel.multihost import (
    Hosts,
    barrier,
    gather_rows,
    host_index_and_count,
    host_rows,
    initialize,
    wait_before_exit,
)
from lm.parallel.pmap import Pmap
from lm.parallel.sharding import RULES, path_of, sharding_table
from lm.parallel.strategy import Strategy


def make_strategy(
    config: ParallelConfig, devices: Sequence | None = None, hosts: Hosts | None = None
) -> Strategy:
    """Return the strategy for these devices, by default those of all hosts.

    hosts: (index, count) of hosts, for devices that are not attached (preflight).
    Raises ValueError if there are too few devices or hosts cannot share them evenly.
    """
    strategy = {"pmap": Pmap, "mesh": Mesh}[config.strategy]
    return strategy(config, devices or jax.devices(), hosts)


def reading_strategy(config: ParallelConfig) -> Strategy:
    """Return the strategy to read a run: the run's if it fits the attached devices, else pmap."""
    if len(jax.devices()) % (config.fsdp * config.tensor):
        return make_strategy(ParallelConfig())
    return make_strategy(dataclasses.replace(config, data=-1, deterministic_reduction=False))
