"""Comparing the copies of an array on different devices, bit by bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import checkpoints
from lm.parallel import sharding


def bit_sums(tree: Any) -> jax.Array:
    """Return a checksum per leaf, uint32 [leaves]; each changes if any single element does."""
    return jnp.stack([checkpoints.leaf_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def first_difference(
    tree: Any, sums: np.ndarray, replicated_axes: list[tuple[int, ...]]
) -> str | None:
    """Return the path of the first leaf whose copies differ, or None.

    sums: bit_sums of every device, [device axes .., leaves]. replicated_axes: for each leaf, the
    device axes along which it is replicated.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums_by_leaf = np.moveaxis(sums, -1, 0)
    for (keys, _), axes, leaf_sums in zip(leaves, replicated_axes, sums_by_leaf, strict=True):
        if np.any(leaf_sums.max(axes) != leaf_sums.min(axes)):
            return sharding.path_of(keys)
    return None
