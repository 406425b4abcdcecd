"""Rules that map the axes of a parameter to mesh axes, and the shapes of the shards."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from lm.parallel.config import ParallelConfig

Spec = tuple[str | None, ...]  # the mesh axis of each array axis; () for a replicated array

# Rules for parameters, by path: the first match wins, an uncovered parameter is an error.
RULES: tuple[tuple[str, Spec], ...] = (
    (r"embed/embedding$", ("tensor", "fsdp")),  # V D
    (r"(query|key|value)/kernel$", (None, "fsdp", "tensor", None)),  # L D N H
    (r"out/kernel$", (None, "tensor", None, "fsdp")),  # L N H D
    (r"(gate|up)/kernel$", (None, "fsdp", "tensor")),  # L D F
    (r"down/kernel$", (None, "tensor", "fsdp")),  # L F D
    (r"head$", ("fsdp", "tensor")),  # D V
    (r"(scale|bias)$", ()),
    # LoRA's factors are sharded like their kernel.
    (r"(query|key|value|gate|up)/kernel/a$", (None, "fsdp", None)),  # L D r
    (r"(query|key|value)/kernel/b$", (None, None, "tensor", None)),  # L r N H
    (r"(gate|up)/kernel/b$", (None, None, "tensor")),  # L r F
    (r"out/kernel/a$", (None, "tensor", None, None)),  # L N H r
    (r"down/kernel/a$", (None, "tensor", None)),  # L F r
    (r"(out|down)/kernel/b$", (None, None, "fsdp")),  # L r D
    (r"projections/\w+/layers/kernel$", (None, "fsdp", None)),  # L, D, D of the teacher
)
AXES: tuple[str, ...] = ("data", "fsdp", "tensor")


def path_of(keys: tuple) -> str:
    """Return the path of a leaf as text: encoder/layers/self_attention/query/kernel."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def spec_for_path(path: str) -> Spec:
    """Return the spec of the first matching rule. Raises ValueError if no rule matches."""
    for pattern, spec in RULES:
        if re.search(pattern, path):
            return spec
    raise ValueError(f"parameter {path} is covered by no sharding rule; add one to RULES.")


class ShardingRules:
    """RULES applied to a tree of parameters.

    sizes: {mesh axis: number of devices}. Raises ValueError if an array axis does not divide.
    """

    def __init__(self, params: Any, sizes: dict[str, int]):
        self.specs: dict[str, tuple[tuple[int, ...], Spec]] = {}  # by path: (shape, spec)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
            path, shape = path_of(keys), np.shape(leaf)
            spec = spec_for_path(path)
            for axis, size in zip(spec, shape, strict=bool(spec)):
                if axis and size % sizes[axis]:
                    raise ValueError(
                        f"{path} {shape}: axis of {size} does not divide over {axis}="
                        f"{sizes[axis]}; change parallel.{axis} or the model's sizes."
                    )
            self.specs[path] = (shape, spec)

    def parameter_of(self, path: str) -> str | None:
        """Return the parameter of an optimizer leaf: the path that is a suffix of the leaf's."""
        names = path.split("/")
        suffixes = ("/".join(names[start:]) for start in range(len(names)))
        return next((suffix for suffix in suffixes if suffix in self.specs), None)

    def spec(self, path: str, leaf: Any) -> Spec:
        """Return the spec of a leaf: its parameter's, without the axis that the leaf may lack."""
        parameter, shape = self.parameter_of(path), np.shape(leaf)
        if parameter is None:
            return ()
        full_shape, spec = self.specs[parameter]
        if shape == full_shape:
            return spec
        for axis in range(len(spec)):
            if shape == full_shape[:axis] + full_shape[axis + 1 :]:
                return spec[:axis] + spec[axis + 1 :]
        return ()


def partition_specs(tree: Any, sizes: dict[str, int]) -> Any:
    """Return a PartitionSpec for each leaf of a steps.State or of parameters.

    sizes: {mesh axis: number of devices}. A leaf of the optimizer is sharded like its parameter.
    Raises ValueError, naming the parameter, if no rule covers it or a size does not divide.
    """
    rules = ShardingRules(getattr(tree, "params", tree), sizes)
    spec = lambda keys, leaf: PartitionSpec(*rules.spec(path_of(keys), leaf))
    return jax.tree_util.tree_map_with_path(spec, tree)


def _shard_shape(leaf: Any, spec: Spec, sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the shape of a leaf's shard on one device; sizes: devices per mesh axis."""
    spec = spec or (None,) * len(leaf.shape)
    return tuple(
        size // (sizes[axis] if axis else 1) for size, axis in zip(leaf.shape, spec, strict=True)
    )


def sharding_table(config: ParallelConfig, shapes: Any) -> str:
    """Format a table of path, shape, mesh axes, and shape and MiB per device of each parameter.

    config: data=-1 counts as 1, so that no device is needed. shapes: a steps.State of shapes.
    "kept MiB" is the optimizer's state and the averaged weights. The last row is the total,
    including leaves that belong to no parameter.
    """
    sizes = dict(zip(AXES, (max(config.data, 1), config.fsdp, config.tensor), strict=True))
    is_mesh = config.strategy == "mesh"
    rules = ShardingRules(shapes.params, sizes if is_mesh else dict.fromkeys(AXES, 1))
    spec_of = lambda path, leaf: rules.spec(path, leaf) if is_mesh else ()
    mib = lambda size: f"{size / 2**20:.3f}"
    row = "{:<48} {:>20} {:>20} {:>20} {:>10} {:>10}".format
    factors = " x ".join(f"{axis} {n}" for axis, n in sizes.items() if is_mesh or axis == "data")
    lines = [f"{config.strategy}: {factors} = {math.prod(sizes.values())} devices"]
    lines.append(row("parameter", "shape", "axes", "per device", "MiB", "kept MiB"))

    def bytes_per_device(path: str, leaf: Any) -> int:
        shape = _shard_shape(leaf, spec_of(path, leaf), sizes)
        return math.prod(shape) * leaf.dtype.itemsize

    state_bytes = dict.fromkeys([*rules.specs, None], 0)
    for keys, leaf in jax.tree_util.tree_leaves_with_path((shapes.opt_state, shapes.average)):
        path = path_of(keys)
        state_bytes[rules.parameter_of(path)] += bytes_per_device(path, leaf)
    total = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes.params):
        path = path_of(keys)
        spec, size = spec_of(path, leaf), bytes_per_device(path, leaf)
        total += size
        axes = " ".join(axis or "-" for axis in spec) or "whole"
        shapes_of_leaf = (leaf.shape, _shard_shape(leaf, spec, sizes))
        full, local = (" ".join(map(str, shape)) for shape in shapes_of_leaf)
        lines.append(row(path, full, axes, local, mib(size), mib(state_bytes[path])))
    lines.append(row("total", "", "", "", mib(total), mib(sum(state_bytes.values()))))
    return "\n".join(lines)
