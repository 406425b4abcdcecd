"""Replicated data parallelism: every device holds the state and takes its rows of the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm import steps
from lm.parallel import multihost, replicas
from lm.parallel.config import ParallelConfig


class Pmap:
    """jax.pmap over the devices of all hosts; arrays are this host's, [its devices, ...].

    Rows are dealt like cards: of D devices in all, that with number i takes rows i, i + D, .. of
    the batch, on however many hosts they are. shards: D.
    """

    name = "devices"

    def __init__(self, config: ParallelConfig, devices, hosts: tuple[int, int] | None = None):
        host, count = hosts or multihost.host_index_and_count()
        by_host = [[d for d in devices if d.process_index == h] for h in range(count)]
        self.shards = sum(map(len, by_host)) if config.data == -1 else config.data
        if self.shards > sum(map(len, by_host)):
            raise ValueError(
                f"parallel.data={config.data} is more than the {len(devices)} devices here; "
                f"use at most that, or -1 for all."
            )
        each = self.shards // count
        if self.shards % count or min(map(len, by_host)) < each:
            raise ValueError(
                f"{self.shards} devices are not as many on each of {count} hosts, which have "
                f"{', '.join(str(len(own)) for own in by_host)}; set parallel.data to a multiple "
                f"of {count} that they have."
            )
        if config.fixed_shards % self.shards:
            raise ValueError(
                f"parallel.reduction_shards={config.reduction_shards} do not divide over {self.shards} devices; use "
                f"a power of 2 of them by parallel.data, or more shards."
            )
        self.devices = [device for own in by_host for device in own[:each]]
        # Host h has rows h, h + hosts, ..; of these its first device takes the first, and so on.
        self.axis = steps.Axis(
            self.name, tuple(place * count + h for h in range(count) for place in range(each))
        )
        here = jax.sharding.Mesh(np.array(by_host[host][:each]), (self.name,))
        self._held, self._sharding = each, NamedSharding(here, PartitionSpec(self.name))
        self._sums = self.compile(_gathered_sums)

    def place_state(self, tree: Any) -> Any:
        """A copy of every leaf on every device: [...] -> [devices, ...]; equal on all hosts."""
        copies = lambda x: np.broadcast_to(np.asarray(x)[None], (self._held, *np.shape(x)))
        return jax.tree.map(lambda x: jax.device_put(copies(x), self._sharding), tree)

    def init(self, make: Callable, *args) -> Any:
        """The placed state of a pure make(*args); args: trees as `fetch` gives them."""
        return self.place_state(jax.jit(make)(*args))

    def place_batch(self, tree: Any) -> Any:
        """This host's rows, dealt one by one: [B, ...] -> [devices, B/devices, ...]."""
        deal = lambda x: np.asarray(x).reshape(-1, self._held, *np.shape(x)[1:]).swapaxes(0, 1)
        return jax.tree.map(lambda x: jax.device_put(deal(x), self._sharding), tree)

    def shard_activations(self, x: jax.Array) -> jax.Array:
        """Activations inside a program, as they are: they have this device's rows alone."""
        return x

    def compile(self, step: Callable, *, donate: bool = False) -> Callable:
        """step(state, batch, ...) as one program on all devices; with donate, state is used up."""
        step = functools.partial(step, axis=self.axis)
        donated = (0,) if donate else ()
        return jax.pmap(step, self.name, devices=self.devices, donate_argnums=donated)

    def fetch(self, tree: Any) -> Any:
        """The state, or any result that is equal on all devices, as one copy on the first."""
        return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)

    def fetch_numbers(self, tree: Any) -> Any:
        """What `fetch` gives, as numpy: nothing runs on a device for it."""
        whole = jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), tree))
        return jax.tree.map(lambda x: x[0], whole)

    def fetch_rows(self, tree: Any) -> Any:
        """A batch, or any result that has its rows, as numpy: the inverse of place_batch."""
        gather = lambda x: np.asarray(x).swapaxes(0, 1).reshape(-1, *x.shape[2:])
        return jax.tree.map(gather, tree)

    def abstract_state(self, tree: Any) -> Any:
        """Shapes and dtypes of `fetch(state)`, to restore into."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)

    def global_shapes(self, state: Any, rows: Any) -> tuple[Any, Any]:
        """Shapes of what all hosts together place of a state and of a batch, given as shapes."""
        count = self.shards
        stack = lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype)
        deal = lambda x: jax.ShapeDtypeStruct((count, len(x) // count, *x.shape[1:]), x.dtype)
        return jax.tree.map(stack, state), jax.tree.map(deal, rows)

    def find_disagreement(self, state: Any) -> str | None:
        """The path of a leaf whose copies on all hosts' devices differ in a bit, else None."""
        sums = np.asarray(self.fetch(self._sums(state)))
        return replicas.first_difference(state, sums, [(0,)] * sums.shape[-1])


def _gathered_sums(tree: Any, *, axis: steps.Axis) -> jax.Array:
    return jax.lax.all_gather(replicas.bit_sums(tree), axis.name)
