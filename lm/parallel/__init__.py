"""Where state and batches lie, and how a step is compiled: replicated (pmap) or sharded (mesh).

Both strategies have the same methods: place_state, place_batch, shard_activations, compile, fetch,
fetch_numbers, fetch_rows, init, abstract_state, global_shapes, find_disagreement. Several hosts run the same program;
each hands over its own rows of a batch.
"""

from __future__ import annotations

import dataclasses

import jax

from lm.parallel.config import ParallelConfig, check_batch_size
from lm.parallel.mesh import Mesh
from lm.parallel.multihost import (
    barrier,
    gather_rows,
    host_index_and_count,
    host_rows,
    initialize,
    wait_before_exit,
)
from lm.parallel.pmap import Pmap
from lm.parallel.sharding import RULES, path_of, sharding_table


def make_strategy(config: ParallelConfig, devices=None, hosts=None) -> Pmap | Mesh:
    """The strategy over these devices (by default all, those of the other hosts among them).

    hosts: (this host's number, their number) of devices that are not here; by default as `hosts`.
    Raises ValueError where the devices do not suffice or the hosts cannot share them evenly.
    """
    strategy = {"pmap": Pmap, "mesh": Mesh}[config.strategy]
    return strategy(config, devices or jax.devices(), hosts)


def reading_strategy(config: ParallelConfig) -> Pmap | Mesh:
    """The strategy to read a run with on all devices here: its own where it fits, else pmap."""
    if len(jax.devices()) % (config.fsdp * config.tensor):
        return make_strategy(ParallelConfig())
    return make_strategy(dataclasses.replace(config, data=-1, reduction="fast"))
