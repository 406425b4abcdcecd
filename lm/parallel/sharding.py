"""Which axes of a mesh cut which axes of a parameter, and what that leaves on each device."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

# Rules for parameters, by path: the first match wins, an uncovered parameter is an error.
RULES = (
    (r"embed/embedding$", ("tensor", "fsdp")),  # V D
    (r"(query|key|value)/kernel$", (None, "fsdp", "tensor", None)),  # L D N H
    (r"out/kernel$", (None, "tensor", None, "fsdp")),  # L N H D
    (r"(gate|up)/kernel$", (None, "fsdp", "tensor")),  # L D F
    (r"down/kernel$", (None, "tensor", "fsdp")),  # L F D
    (r"head$", ("fsdp", "tensor")),  # D V
    (r"(scale|bias)$", ()),
    (
        r"(query|key|value|gate|up)/kernel/a$",
        (None, "fsdp", None),
    ),  # L D r; LoRA's, as their kernel
    (r"(query|key|value)/kernel/b$", (None, None, "tensor", None)),  # L r N H
    (r"(gate|up)/kernel/b$", (None, None, "tensor")),  # L r F
    (r"out/kernel/a$", (None, "tensor", None, None)),  # L N H r
    (r"down/kernel/a$", (None, "tensor", None)),  # L F r
    (r"(out|down)/kernel/b$", (None, None, "fsdp")),  # L r D
    (r"projections/\w+/layers/kernel$", (None, "fsdp", None)),  # L D, and the teacher's D
)
AXES = ("data", "fsdp", "tensor")


def path_of(keys) -> str:
    """A parameter's path as text: encoder/layers/self_attention/query/kernel."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def spec_for_path(path: str) -> tuple[str | None, ...]:
    """A mesh axis, or None, for each axis of the parameter; () where it is whole everywhere."""
    for pattern, spec in RULES:
        if re.search(pattern, path):
            return spec
    raise ValueError(f"parameter {path} is covered by no sharding rule; add one to RULES.")


class ShardingRules:
    """The rules applied to a tree of parameters. Raises ValueError where a size does not divide."""

    def __init__(self, params: Any, sizes: dict[str, int]):
        self.specs = {}
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

    def owner(self, path: str) -> str | None:
        """The parameter that a leaf of an optimizer's state is about: its path ends with it."""
        names = path.split("/")
        ends = ("/".join(names[start:]) for start in range(len(names)))
        return next((end for end in ends if end in self.specs), None)

    def spec(self, path: str, leaf) -> tuple[str | None, ...]:
        """Where a leaf lies: as its parameter, also where one of its axes is summed away."""
        owner, shape = self.owner(path), np.shape(leaf)
        if owner is None:
            return ()
        whole, spec = self.specs[owner]
        if shape == whole:
            return spec
        for gone in range(len(spec)):
            if shape == whole[:gone] + whole[gone + 1 :]:
                return spec[:gone] + spec[gone + 1 :]
        return ()


def partition_specs(tree: Any, sizes: dict[str, int]) -> Any:
    """A PartitionSpec for each leaf of a steps.State, or of parameters alone.

    sizes: devices along each of AXES. What the optimizer keeps of a parameter lies like it.
    Raises ValueError, naming the parameter, where no rule covers it or a size does not divide.
    """
    ruled = ShardingRules(getattr(tree, "params", tree), sizes)
    of = lambda keys, leaf: PartitionSpec(*ruled.spec(path_of(keys), leaf))
    return jax.tree_util.tree_map_with_path(of, tree)


def shape_per_device(leaf, spec: tuple, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of the part of a leaf that one device holds."""
    spec = spec or (None,) * len(leaf.shape)
    return tuple(
        size // (sizes[axis] if axis else 1) for size, axis in zip(leaf.shape, spec, strict=True)
    )


def sharding_table(config, shapes) -> str:
    """The layout as text: of each parameter its path, shape, axes, and what a device holds of it.

    config: a ParallelConfig; data=-1 counts as 1, so that no device is needed. shapes: steps.State
    of shapes. MiB are per device; "kept" is the optimizer's state and the running average. The
    last row is the total, with what belongs to no parameter.
    """
    sizes = dict(zip(AXES, (max(config.data, 1), config.fsdp, config.tensor), strict=True))
    mesh = config.strategy == "mesh"
    ruled = ShardingRules(shapes.params, sizes if mesh else dict.fromkeys(AXES, 1))
    row = "{:<48} {:>20} {:>20} {:>20} {:>10} {:>10}".format
    over = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if mesh or axis == "data")
    said = [f"{config.strategy}: {over} = {math.prod(sizes.values())} devices"]
    said.append(row("parameter", "shape", "axes", "per device", "MiB", "kept MiB"))

    def bytes_of(path: str, leaf) -> int:
        held = shape_per_device(leaf, ruled.spec(path, leaf) if mesh else (), sizes)
        return math.prod(held) * leaf.dtype.itemsize

    kept = dict.fromkeys([*ruled.specs, None], 0)
    for keys, leaf in jax.tree_util.tree_leaves_with_path((shapes.opt_state, shapes.average)):
        kept[ruled.owner(path_of(keys))] += bytes_of(path_of(keys), leaf)
    total = 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes.params):
        path, spec = path_of(keys), ruled.spec(path_of(keys), leaf) if mesh else ()
        held, own = shape_per_device(leaf, spec, sizes), bytes_of(path, leaf)
        total += own
        axes = " ".join(axis or "-" for axis in spec) or "whole"
        shown = (" ".join(map(str, shape)) for shape in (leaf.shape, held))
        shape, held = shown
        said.append(row(path, shape, axes, held, f"{own / 2**20:.3f}", f"{kept[path] / 2**20:.3f}"))
    sums = (f"{size / 2**20:.3f}" for size in (total, sum(kept.values())))
    return "\n".join([*said, row("total", "", "", "", *sums)])
