"""Comparing the copies of an array on different devices, bit by bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.parallel import sharding

UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes per element


def bit_sums(tree: Any) -> jax.Array:
    """A uint32 per leaf, [leaves]; it changes if one element does. At most 4 bytes per element."""

    def bit_sum(x):
        words = jax.lax.bitcast_convert_type(x, UINTS[x.dtype.itemsize])
        words = words.astype(jnp.uint32).ravel()
        index = jax.lax.iota(jnp.uint32, words.size)
        return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)  # odd factors lose no bit

    return jnp.stack([bit_sum(leaf) for leaf in jax.tree.leaves(tree)])


def first_difference(tree: Any, sums: np.ndarray, copied: list[tuple[int, ...]]) -> str | None:
    """The path of the first leaf whose copies differ, or None.

    sums: [device axes .., leaves]; copied: for each leaf the device axes along which it is copied.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums_by_leaf = np.moveaxis(sums, -1, 0)
    for (keys, _), axes, leaf_sums in zip(leaves, copied, sums_by_leaf, strict=True):
        if np.any(leaf_sums.max(axes) != leaf_sums.min(axes)):
            return sharding.path_of(keys)
    return None
