"""Integer checksums of arrays' bits, the same for any sharding, on devices and on the host."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FACTOR = np.uint32(2654435761)
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def leaf_checksum(x: jax.Array) -> jax.Array:
    """A uint32 checksum of an array's bits, the same for any sharding; leaves of up to 4 bytes."""
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize])
    words, index, stride = words.astype(jnp.uint32), jnp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index, stride = index + place * jnp.uint32(stride), stride * words.shape[axis] % 2**32
    parts = (words ^ (words >> 15)) * ((index * FACTOR) | jnp.uint32(1))
    for axis in reversed(range(words.ndim)):  # much faster than all at once
        parts = jnp.sum(parts, axis=axis, dtype=jnp.uint32)
    return parts


def host_checksum(x, chunk: int = 2**20) -> int:
    """leaf_sum of an array on this host, taken in parts: it needs next to no memory."""
    flat, total = np.asarray(x).reshape(-1), 0
    words = flat.view(f"u{flat.dtype.itemsize}")
    for start in range(0, words.size, chunk):
        part = words[start : start + chunk].astype(np.uint32)
        index = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum((part ^ (part >> 15)) * (index * FACTOR | 1), dtype=np.uint32))
    return total % 2**32


@jax.jit
def tree_checksums(tree: Any) -> Any:
    """leaf_sum of every leaf."""
    return jax.tree.map(leaf_checksum, tree)


def aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """An unset float32 array that jax.device_put takes over on CPU without copying it."""
    size = 4 * math.prod(shape)
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(np.float32).reshape(shape)
