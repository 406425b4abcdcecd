"""Where state and batches lie, and how a step is compiled: replicated (pmap) or sharded (mesh).

Both strategies have the same four functions: place_state, place_batch, compile, fetch.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm import choose

# Rules for parameters, by path: the first match wins, an uncovered parameter is an error.
RULES = (
    (r"embed/embedding$", ("tensor", "fsdp")),  # V D
    (r"(query|key|value)/kernel$", (None, "fsdp", "tensor", None)),  # L D N H
    (r"out/kernel$", (None, "tensor", None, "fsdp")),  # L N H D
    (r"(gate|up)/kernel$", (None, "fsdp", "tensor")),  # L D F
    (r"down/kernel$", (None, "tensor", "fsdp")),  # L F D
    (r"head$", ("fsdp", "tensor")),  # D V
    (r"(scale|bias)$", ()),
)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The strategy, the mesh's sizes (data=-1: all remaining devices), and micro-batches a step."""

    strategy: str = "pmap"
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    micro_batches: int = 1
    reduction: str = "fast"
    shards: int = 8

    def __post_init__(self):
        choose.choose(STRATEGIES, self.strategy, "parallel.strategy")
        for field in ("fsdp", "tensor", "micro_batches"):
            if getattr(self, field) < 1:
                raise ValueError(f"parallel.{field}={getattr(self, field)} is too small; use 1.")
        if self.data < 1 and self.data != -1:
            raise ValueError(f"parallel.data={self.data} is no size; use 1 or more, or -1 for all.")
        if self.strategy == "pmap" and (self.fsdp, self.tensor) != (1, 1):
            raise ValueError(
                f"parallel.fsdp={self.fsdp} and parallel.tensor={self.tensor} shard parameters, "
                f"which pmap replicates; use parallel.strategy='mesh'."
            )


def path_of(keys) -> str:
    """A parameter's path as text: encoder/layers/self_attention/query/kernel."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def check_batch(batch_size: int, shards: int, micro_batches: int) -> None:
    """Raise ValueError unless a batch divides over data shards and micro-batches."""
    if batch_size % (shards * micro_batches):
        raise ValueError(
            f"data.batch_size={batch_size} does not divide over {shards} devices x "
            f"parallel.micro_batches={micro_batches}; use a multiple of {shards * micro_batches}."
        )


class Pmap:
    """Replicated data parallelism: every device holds the state and takes its rows of the batch."""

    axis = "devices"

    def __init__(self, config: ParallelConfig, devices):
        self.devices = list(devices)
        self.shards = len(self.devices) if config.data == -1 else config.data
        if self.shards > len(self.devices):
            raise ValueError(
                f"parallel.data={config.data} is more than the {len(self.devices)} devices here; "
                f"use at most that, or -1 for all."
            )
        self.devices = self.devices[: self.shards]
        mesh = jax.sharding.Mesh(np.array(self.devices), (self.axis,))
        self._sharding = NamedSharding(mesh, PartitionSpec(self.axis))

    def place_state(self, tree: Any) -> Any:
        """A copy of every leaf on every device: [...] -> [devices, ...]."""
        copies = lambda x: np.broadcast_to(np.asarray(x)[None], (self.shards, *np.shape(x)))
        return jax.tree.map(lambda x: jax.device_put(copies(x), self._sharding), tree)

    def place_batch(self, tree: Any) -> Any:
        """Rows dealt in order: [B, ...] -> [devices, B/devices, ...]."""
        deal = lambda x: np.asarray(x).reshape(self.shards, -1, *np.shape(x)[1:])
        return jax.tree.map(lambda x: jax.device_put(deal(x), self._sharding), tree)

    def compile(self, step: Callable, *, donate: bool = False) -> Callable:
        """step(state, batch, ...) as one program on all devices; with donate, state is used up."""
        step = functools.partial(step, axis=self.axis)
        donated = (0,) if donate else ()
        return jax.pmap(step, self.axis, devices=self.devices, donate_argnums=donated)

    def fetch(self, tree: Any) -> Any:
        """The state, or any result that is equal on all devices, as one copy on the first."""
        return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)

    def fetch_rows(self, tree: Any) -> Any:
        """A batch, or any result that has its rows, as numpy: the inverse of place_batch."""
        gather = lambda x: np.asarray(x).reshape(-1, *x.shape[2:])
        return jax.tree.map(gather, tree)

    def abstract(self, tree: Any) -> Any:
        """Shapes and dtypes of `fetch(state)`, to restore into."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


class Mesh:
    """One logical program over axes data, fsdp and tensor; XLA inserts the collectives."""

    def __init__(self, config: ParallelConfig, devices):
        devices = list(devices)
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
            ("data", "fsdp", "tensor"),
            axis_types=(AxisType.Auto,) * 3,
            devices=self.devices,
        )

    def shardings(self, state: Any) -> Any:
        """A sharding a leaf: parameters by RULES, what the optimizer keeps of one like it."""
        params = {}

        def rule(keys, leaf):
            path = path_of(keys)
            spec = _spec(path)
            for axis, size in zip(spec, np.shape(leaf), strict=bool(spec)):
                if axis and size % self.mesh.shape[axis]:
                    raise ValueError(
                        f"{path} {np.shape(leaf)}: axis of {size} does not divide over {axis}="
                        f"{self.mesh.shape[axis]}; change parallel.{axis} or the model's sizes."
                    )
            params[path] = (np.shape(leaf), spec)
            return NamedSharding(self.mesh, PartitionSpec(*spec))

        def like(keys, leaf):
            names = path_of(keys).split("/")
            paths = ("/".join(names[i:]) for i in range(len(names)))
            shape, spec = next((params[path] for path in paths if path in params), ((), ()))
            spec = spec if shape == np.shape(leaf) else ()
            return NamedSharding(self.mesh, PartitionSpec(*spec))

        if not hasattr(state, "opt_state"):
            return jax.tree_util.tree_map_with_path(rule, state)
        ruled = jax.tree_util.tree_map_with_path(rule, state.params)
        kept = jax.tree_util.tree_map_with_path(like, state.opt_state)
        whole = NamedSharding(self.mesh, PartitionSpec())
        average = None if state.average is None else ruled
        return type(state)(whole, ruled, kept, whole, average)

    def place_state(self, tree: Any) -> Any:
        """State or parameters, laid out by RULES."""
        return jax.tree.map(jax.device_put, tree, self.shardings(tree))

    def place_batch(self, tree: Any) -> Any:
        """Rows dealt over data and fsdp."""
        sharding = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)

    def compile(self, step: Callable, *, donate: bool = False) -> Callable:
        """step(state, batch, ...) as one program; with donate, state is used up."""
        compiled = {}

        def run(state, *rest):
            if "step" not in compiled:
                layout = jax.tree.map(lambda x: x.sharding, state)
                options = {"donate_argnums": (0,), "out_shardings": (layout, None)}
                compiled["step"] = jax.jit(step, **(options if donate else {}))
            return compiled["step"](state, *rest)

        return run

    def fetch(self, tree: Any) -> Any:
        """The global arrays themselves: already one logical copy."""
        return tree

    def fetch_rows(self, tree: Any) -> Any:
        """A batch, or any result that has its rows, as numpy: the inverse of place_batch."""
        return jax.tree.map(np.asarray, tree)

    def abstract(self, tree: Any) -> Any:
        """Shapes, dtypes and shardings of the state, to restore into."""
        shaped = lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s)
        return jax.tree.map(shaped, tree, self.shardings(tree))


def _spec(path: str) -> tuple:
    for pattern, spec in RULES:
        if re.search(pattern, path):
            return spec
    raise ValueError(f"parameter {path} is covered by no sharding rule; add one to RULES.")


STRATEGIES = {"pmap": Pmap, "mesh": Mesh}


def make_strategy(config: ParallelConfig, devices=None) -> Pmap | Mesh:
    """The strategy over these devices (all local ones by default).

    Raises ValueError where the devices do not suffice, or several processes share the work.
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes share this run, but one host's devices are all that "
            f"is used yet; start it on one host."
        )
    return STRATEGIES[config.strategy](config, devices or jax.local_devices())
