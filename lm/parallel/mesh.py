"""One program over the mesh axes data, fsdp and tensor; XLA inserts the collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm.parallel import multihost, replicas, sharding
from lm.parallel.config import ParallelConfig
from lm.parallel.multihost import Hosts

BATCH_SPEC = PartitionSpec(("data", "fsdp"))


class _DonatingStep:
    """A jitted step(state, ...) that donates the state and returns it in the same layout."""

    def __init__(self, step: Callable):
        self._step, self._compiled = step, None

    def _jit(self, state: Any) -> Any:
        if self._compiled is None:
            layout = jax.tree.map(lambda x: x.sharding, state)
            options = {"donate_argnums": (0,), "out_shardings": (layout, None)}
            self._compiled = jax.jit(self._step, **options)
        return self._compiled

    def __call__(self, state: Any, *rest: Any) -> Any:
        return self._jit(state)(state, *rest)

    def lower(self, state: Any, *rest: Any) -> Any:
        """Lower the program for arguments or their shapes, like jax.jit(step).lower."""
        return self._jit(state).lower(state, *rest)


class Mesh:
    """A strategy with jax.jit over a mesh; arrays are global and sharded by sharding.RULES.

    shards: data x fsdp, the number of devices that have different rows of a batch.
    """

    def __init__(self, config: ParallelConfig, devices: Sequence, hosts: Hosts | None = None):
        devices, (_, count) = list(devices), hosts or multihost.host_index_and_count()
        inner = config.fsdp * config.tensor
        data = len(devices) // inner if config.data == -1 else config.data
        num_idle = len(devices) % inner if config.data == -1 else 0
        if data * inner > len(devices) or data == 0 or num_idle:
            raise ValueError(
                f"parallel.data x fsdp x tensor = {config.data} x {config.fsdp} x {config.tensor} "
                f"does not fit on {len(devices)} devices; make the product at most that, and with "
                f"data=-1 a divisor of it."
            )
        self.devices = devices[: data * inner]
        self.shards = data * config.fsdp
        self.mesh = jax.make_mesh(
            (data, config.fsdp, config.tensor),
            sharding.AXES,
            axis_types=(AxisType.Auto,) * 3,
            devices=self.devices,
        )
        owners = np.vectorize(lambda device: device.process_index)(self.mesh.devices)
        owners = owners.reshape(self.shards, config.tensor)
        shards_by_host = np.bincount(owners[:, 0], minlength=count)
        if np.any(owners != owners[:, :1]) or np.any(shards_by_host != self.shards // count):
            raise ValueError(
                f"parallel.data x fsdp x tensor = {data} x {config.fsdp} x {config.tensor} does "
                f"not give each of {count} hosts the same number of whole rows; let tensor "
                f"divide the devices of a host, and use the devices of all hosts."
            )
        self._batch = NamedSharding(self.mesh, BATCH_SPEC)
        self._sums = jax.jit(self._sums_by_device)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        self._replicate = jax.jit(lambda x: x, out_shardings=replicated)

    def _specs(self, state: Any) -> Any:
        return sharding.partition_specs(state, dict(self.mesh.shape))

    def shardings(self, state: Any) -> Any:
        """Return the NamedSharding of each leaf of a state or of parameters."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self._specs(state))

    def place_state(self, tree: Any) -> Any:
        """Shard a state or parameters, equal on all hosts, by sharding.RULES."""

        def put(x, sharding):
            if jax.process_count() == 1 or not getattr(x, "is_fully_addressable", True):
                return jax.device_put(x, sharding)
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(put, tree, self.shardings(tree))

    def init(self, make: Callable, *args: Any) -> Any:
        """Return the placed result of a pure make(*args); a device allocates only its shards."""
        placed = [self.place_state(arg) for arg in args]
        layout = self.shardings(jax.eval_shape(make, *placed))
        return jax.jit(make, out_shardings=layout)(*placed)

    def place_batch(self, tree: Any) -> Any:
        """Distribute this host's rows over data and fsdp."""
        put = lambda x: jax.make_array_from_process_local_data(self._batch, np.asarray(x))
        return jax.tree.map(put, tree)

    def shard_activations(self, x: jax.Array) -> jax.Array:
        """Shard activations [B, ...] by rows over data and fsdp only.

        Otherwise the compiler may shard them like parameters, and move activations instead of
        parameters between devices in every layer.
        """
        return jax.lax.with_sharding_constraint(x, self._batch)

    def compile(self, step: Callable, *, donate: bool = False) -> Callable:
        """Compile step(state, batch, ...) with jax.jit."""
        return _DonatingStep(step) if donate else jax.jit(step)

    def fetch(self, tree: Any) -> Any:
        """Return the tree: a global array is one logical copy."""
        return tree

    def fetch_numbers(self, tree: Any) -> Any:
        """Return a result that is equal on all devices, as numpy."""
        return jax.device_get(tree)

    def fetch_rows(self, tree: Any) -> Any:
        """Return this host's rows as numpy: the inverse of place_batch."""

        def gather(x):
            x = jax.device_put(x, self._batch)
            shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
            return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])

        return jax.tree.map(gather, tree)

    def abstract_state(self, tree: Any) -> Any:
        """Return shapes, dtypes and shardings of a state, to restore a checkpoint into."""
        shaped = lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s)
        return jax.tree.map(shaped, tree, self.shardings(tree))

    def global_shapes(self, state: Any, rows: Any) -> tuple[Any, Any]:
        """Return the shapes of a state and a batch as placed by all hosts."""
        split = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._batch)
        return self.abstract_state(state), jax.tree.map(split, rows)

    def find_disagreement(self, state: Any) -> str | None:
        """Return the path of a leaf whose copies on devices differ in a bit, or None."""
        replicated_axes = [
            tuple(i for i, axis in enumerate(sharding.AXES) if axis not in spec)
            for spec in jax.tree.leaves(self._specs(state))
        ]
        # Two programs: a single one would gather one copy of values that XLA assumes are equal.
        sums = np.asarray(self._replicate(self._sums(state)))
        return replicas.first_difference(state, sums, replicated_axes)

    def _sums_by_device(self, state: Any) -> jax.Array:
        sums = lambda tree: replicas.bit_sums(tree)[None, None, None]
        return jax.shard_map(
            sums,
            mesh=self.mesh,
            in_specs=(self._specs(state),),
            out_specs=PartitionSpec(*sharding.AXES),
            check_vma=False,
        )(state)
