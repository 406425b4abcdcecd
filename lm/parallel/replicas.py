"""Whether the copies of an array on different devices are still the same bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.parallel import sharding

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def bit_sums(tree: Any) -> jax.Array:
    """A uint32 for each leaf, [leaves]; it differs where one element does. Up to 4 bytes each."""

    def of(x):
        words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32).ravel()
        places = jax.lax.iota(jnp.uint32, words.size)
        return jnp.sum(words * (2 * places + 1), dtype=jnp.uint32)  # odd: no bit is lost

    return jnp.stack([of(leaf) for leaf in jax.tree.leaves(tree)])


def first_difference(tree: Any, sums: np.ndarray, copied: list[tuple[int, ...]]) -> str | None:
    """The path of the first leaf whose copies differ.

    sums: [device axes .., leaves]; copied: for each leaf the device axes along which it is copied.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (keys, _), axes, own in zip(leaves, copied, np.moveaxis(sums, -1, 0), strict=True):
        if np.any(own.max(axes) != own.min(axes)):
            return sharding.path_of(keys)
    return None
