"""One logical program over axes data, fsdp and tensor; XLA inserts the collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm.parallel import multihost, replicas, sharding
from lm.parallel.config import ParallelConfig

ROWS = PartitionSpec(("data", "fsdp"))


class Mesh:
    """jax.jit over the devices of all hosts; arrays are global, laid out by rules.RULES.

    shards: parts that a batch is cut into, data x fsdp.
    """

    def __init__(self, config: ParallelConfig, devices, hosts: tuple[int, int] | None = None):
        devices, (_, count) = list(devices), hosts or multihost.host_index_and_count()
        rest = config.fsdp * config.tensor
        data = len(devices) // rest if config.data == -1 else config.data
        idle = len(devices) % rest if config.data == -1 else 0
        if data * rest > len(devices) or data == 0 or idle:
            raise ValueError(
                f"parallel.data x fsdp x tensor = {config.data} x {config.fsdp} x {config.tensor} "
                f"does not fit on {len(devices)} devices; make the product at most that, and with "
                f"data=-1 a divisor of it."
            )
        self.devices = devices[: data * rest]
        self.shards = data * config.fsdp
        self.mesh = jax.make_mesh(
            (data, config.fsdp, config.tensor),
            sharding.AXES,
            axis_types=(AxisType.Auto,) * 3,
            devices=self.devices,
        )
        owners = np.vectorize(lambda device: device.process_index)(self.mesh.devices)
        owners = owners.reshape(self.shards, config.tensor)
        dealt = np.bincount(owners[:, 0], minlength=count)
        if np.any(owners != owners[:, :1]) or np.any(dealt != self.shards // count):
            raise ValueError(
                f"parallel.data x fsdp x tensor = {data} x {config.fsdp} x {config.tensor} does "
                f"not give each of {count} hosts whole rows of the batch, and as many; let tensor "
                f"divide the devices of a host, and use those of all hosts."
            )
        self._rows, self._whole = (NamedSharding(self.mesh, s) for s in (ROWS, PartitionSpec()))
        self._sums = jax.jit(self._sums_by_device)
        self._replicate = jax.jit(lambda x: x, out_shardings=self._whole)

    def shardings(self, state: Any) -> Any:
        """A sharding a leaf: parameters by RULES, what the optimizer keeps of one like it."""
        placed = lambda spec: NamedSharding(self.mesh, spec)
        return jax.tree.map(placed, sharding.partition_specs(state, dict(self.mesh.shape)))

    def place_state(self, tree: Any) -> Any:
        """State or parameters, equal on all hosts, laid out by RULES."""

        def place(x, sharding):
            if jax.process_count() == 1 or not getattr(x, "is_fully_addressable", True):
                return jax.device_put(x, sharding)
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

        return jax.tree.map(place, tree, self.shardings(tree))

    def init(self, make: Callable, *args) -> Any:
        """The placed state of a pure make(*args), of which no device ever holds more than its part.

        args: trees of parameters, or None.
        """
        placed = [self.place_state(arg) for arg in args]
        layout = self.shardings(jax.eval_shape(make, *placed))
        return jax.jit(make, out_shardings=layout)(*placed)

    def place_batch(self, tree: Any) -> Any:
        """This host's rows, dealt over data and fsdp."""
        place = lambda x: jax.make_array_from_process_local_data(self._rows, np.asarray(x))
        return jax.tree.map(place, tree)

    def shard_activations(self, x: jax.Array) -> jax.Array:
        """Activations inside a program, [B, ...]: rows over data and fsdp, all else whole.

        Untold, the compiler may cut them as it finds parameters cut, and move them between devices
        in every layer instead of the parameters.
        """
        return jax.lax.with_sharding_constraint(x, self._rows)

    def compile(self, step: Callable, *, donate: bool = False) -> Callable:
        """step(state, batch, ...) as one program; with donate, state is used up.

        As what jax.pmap gives, it has a method lower of the same arguments, or their shapes.
        """
        if not donate:
            return jax.jit(step)
        compiled = {}

        def program(state):
            if "step" not in compiled:
                layout = jax.tree.map(lambda x: x.sharding, state)
                options = {"donate_argnums": (0,), "out_shardings": (layout, None)}
                compiled["step"] = jax.jit(step, **options)
            return compiled["step"]

        def run(state, *rest):
            return program(state)(state, *rest)

        run.lower = lambda state, *rest: program(state).lower(state, *rest)
        return run

    def fetch(self, tree: Any) -> Any:
        """The global arrays themselves: already one logical copy."""
        return tree

    def fetch_numbers(self, tree: Any) -> Any:
        """What `fetch` gives of a result that is equal on all devices, as numpy."""
        return jax.device_get(tree)

    def fetch_rows(self, tree: Any) -> Any:
        """A batch, or any result that has its rows, as numpy, this host's: undoes place_batch."""

        def gather(x):
            x = jax.device_put(x, self._rows)
            parts = {part.index[0].start or 0: part.data for part in x.addressable_shards}
            return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

        return jax.tree.map(gather, tree)

    def abstract_state(self, tree: Any) -> Any:
        """Shapes, dtypes and shardings of the state, to restore into."""
        shaped = lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s)
        return jax.tree.map(shaped, tree, self.shardings(tree))

    def global_shapes(self, state: Any, rows: Any) -> tuple[Any, Any]:
        """Shapes of what all hosts together place of a state and of a batch, given as shapes."""
        deal = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._rows)
        return self.abstract_state(state), jax.tree.map(deal, rows)

    def find_disagreement(self, state: Any) -> str | None:
        """The path of a leaf whose copies on all hosts' devices differ in a bit, else None."""
        cut = jax.tree.leaves(sharding.partition_specs(state, dict(self.mesh.shape)))
        copied = [
            tuple(i for i, axis in enumerate(sharding.AXES) if axis not in spec) for spec in cut
        ]
        # Two programs: one that gathered what it knows to be copies would not look at them all.
        sums = np.asarray(self._replicate(self._sums(state)))
        return replicas.first_difference(state, sums, copied)

    def _sums_by_device(self, state: Any) -> jax.Array:
        sums = lambda tree: replicas.bit_sums(tree)[None, None, None]
        return jax.shard_map(
            sums,
            mesh=self.mesh,
            in_specs=(sharding.partition_specs(state, dict(self.mesh.shape)),),
            out_specs=PartitionSpec(*sharding.AXES),
            check_vma=False,
        )(state)
