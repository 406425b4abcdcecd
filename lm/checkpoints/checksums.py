"""Integer checksums of arrays, equal on devices and on the host, for any sharding."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FACTOR = np.uint32(2654435761)
UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes per element


def leaf_checksum(x: jax.Array) -> jax.Array:
    """Return a uint32 checksum that changes with any single element of at most 4 bytes."""
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, UINTS[x.dtype.itemsize])
    words, index, stride = words.astype(jnp.uint32), jnp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        position = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index, stride = index + position * jnp.uint32(stride), stride * words.shape[axis] % 2**32
    total = (words ^ (words >> 15)) * ((index * FACTOR) | jnp.uint32(1))
    for axis in reversed(range(words.ndim)):  # much faster than all axes at once
        total = jnp.sum(total, axis=axis, dtype=jnp.uint32)
    return total


def host_checksum(x: Any, chunk: int = 2**20) -> int:
    """Return leaf_checksum of an array on the host, computed in chunks to save memory."""
    flat, total = np.asarray(x).reshape(-1), 0
    words = flat.view(f"u{flat.dtype.itemsize}")
    for start in range(0, words.size, chunk):
        block = words[start : start + chunk].astype(np.uint32)
        index = np.arange(start, start + block.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum((block ^ (block >> 15)) * (index * FACTOR | 1), dtype=np.uint32))
    return total % 2**32


@jax.jit
def tree_checksums(tree: Any) -> Any:
    """Return leaf_checksum of every leaf."""
    return jax.tree.map(leaf_checksum, tree)


def aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialized float32 array that jax.device_put on CPU does not copy."""
    size = 4 * math.prod(shape)
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(np.float32).reshape(shape)
