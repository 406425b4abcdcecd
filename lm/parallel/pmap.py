"""Data parallelism with pmap: the state is replicated, the batch is split by rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm import steps
from lm.parallel import multihost, replicas
from lm.parallel.config import ParallelConfig
from lm.parallel.multihost import Hosts


class Pmap:
    """A strategy with jax.pmap; placed arrays are local, [local devices, ...].

    Of D devices on all hosts, device i gets rows i, i + D, .. of the batch. shards: D.
    """

    axis_name = "devices"

    def __init__(self, config: ParallelConfig, devices: Sequence, hosts: Hosts | None = None):
        host, count = hosts or multihost.host_index_and_count()
        by_host = [[d for d in devices if d.process_index == h] for h in range(count)]
        self.shards = sum(map(len, by_host)) if config.data == -1 else config.data
        if self.shards > sum(map(len, by_host)):
            raise ValueError(
                f"parallel.data={config.data} is more than the {len(devices)} devices; use at most "
                f"that, or -1 for all."
            )
        per_host = self.shards // count
        if self.shards % count or min(map(len, by_host)) < per_host:
            raise ValueError(
                f"{self.shards} devices cannot be shared evenly by {count} hosts with "
                f"{', '.join(str(len(local)) for local in by_host)} devices; set parallel.data to "
                f"a multiple of {count} that fits."
            )
        if config.fixed_shards % self.shards:
            raise ValueError(
                f"parallel.reduction_shards={config.reduction_shards} do not divide over "
                f"{self.shards} devices; set parallel.data to a power of 2, or use more shards."
            )
        self.devices = [device for local in by_host for device in local[:per_host]]
        # Host h has rows h, h + count, ..; its first device gets the first of them, and so on.
        self.axis = steps.Axis(
            self.axis_name, tuple(i * count + h for h in range(count) for i in range(per_host))
        )
        local_mesh = jax.sharding.Mesh(np.array(by_host[host][:per_host]), (self.axis_name,))
        self._num_local = per_host
        self._sharding = NamedSharding(local_mesh, PartitionSpec(self.axis_name))
        self._sums = self.compile(_gathered_sums)

    def place_state(self, tree: Any) -> Any:
        """Copy every leaf to every device: [...] -> [devices, ...]."""
        copies = lambda x: np.broadcast_to(np.asarray(x)[None], (self._num_local, *np.shape(x)))
        return jax.tree.map(lambda x: jax.device_put(copies(x), self._sharding), tree)

    def init(self, make: Callable, *args: Any) -> Any:
        """Return the placed result of a pure make(*args)."""
        return self.place_state(jax.jit(make)(*args))

    def place_batch(self, tree: Any) -> Any:
        """Distribute this host's rows: [B, ...] -> [devices, B/devices, ...]."""
        split = lambda x: x.reshape(-1, self._num_local, *x.shape[1:]).swapaxes(0, 1)
        return jax.tree.map(lambda x: jax.device_put(split(np.asarray(x)), self._sharding), tree)

    def shard_activations(self, x: jax.Array) -> jax.Array:
        """Return x unchanged: inside the program it has only this device's rows."""
        return x

    def compile(self, step: Callable, *, donate: bool = False) -> Callable:
        """Compile step(state, batch, ..., axis=) with jax.pmap."""
        step = functools.partial(step, axis=self.axis)
        donated = (0,) if donate else ()
        return jax.pmap(step, self.axis_name, devices=self.devices, donate_argnums=donated)

    def fetch(self, tree: Any) -> Any:
        """Return the copy on the first device."""
        return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)

    def fetch_numbers(self, tree: Any) -> Any:
        """Return the copy on the first device as numpy, without running a program."""
        first = jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), tree))
        return jax.tree.map(lambda x: x[0], first)

    def fetch_rows(self, tree: Any) -> Any:
        """Return this host's rows as numpy: the inverse of place_batch."""
        gather = lambda x: np.asarray(x).swapaxes(0, 1).reshape(-1, *x.shape[2:])
        return jax.tree.map(gather, tree)

    def abstract_state(self, tree: Any) -> Any:
        """Return shapes and dtypes of `fetch(state)`, to restore a checkpoint into."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)

    def global_shapes(self, state: Any, rows: Any) -> tuple[Any, Any]:
        """Return the shapes of a state and a batch as placed by all hosts."""
        count = self.shards
        copy = lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype)
        split = lambda x: jax.ShapeDtypeStruct((count, len(x) // count, *x.shape[1:]), x.dtype)
        return jax.tree.map(copy, state), jax.tree.map(split, rows)

    def find_disagreement(self, state: Any) -> str | None:
        """Return the path of a leaf whose copies on devices differ in a bit, or None."""
        sums = np.asarray(self.fetch(self._sums(state)))
        return replicas.first_difference(state, sums, [(0,)] * sums.shape[-1])


def _gathered_sums(tree: Any, *, axis: steps.Axis) -> jax.Array:
    return jax.lax.all_gather(replicas.bit_sums(tree), axis.name)
