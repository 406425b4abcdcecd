"""Who sees whom, at what distance, and the weighted sum that follows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def distance(queries: int, keys: int, start: int | Array = 0) -> Array:
    """Key index minus query index: int [T, S]; `start` is the index of the first query."""
    return jnp.arange(keys)[None, :] - (start + jnp.arange(queries))[:, None]


def same_segment(queries: Array, keys: Array) -> Array:
    """[B, T], [B, S] -> bool [B, T, S]: both belong to one example; padding (0) is never seen."""
    return (queries[:, :, None] == keys[:, None, :]) & (keys[:, None, :] > 0)


def positions(segment_ids: Array) -> Array:
    """The place of each token in its own segment, from 0: int [B, T] -> int [B, T]."""
    index = jnp.arange(segment_ids.shape[1])
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    starts = jnp.where((segment_ids != before) | (index == 0), index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def sinusoids(positions: Array, width: int) -> Array:
    """Sines, then cosines, of geometrically slower frequencies: float32 [..., width].

    Source: Vaswani et al. 2017, section 3.5, arXiv:1706.03762.
    """
    angles = positions[..., None] * 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotate(x: Array, positions: Array, base: float) -> Array:
    """Turn pairs (i, i + H/2) of x [B, T, N, H] by position x frequency: rotary positions.

    positions: int [B, T]. base: the slowest pair turns by about 1/base radians a token.
    Products of rotated queries and keys depend on their distance alone.
    Source: Su et al. 2021, section 3.2, arXiv:2104.09864.
    """
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    low, high = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(x.dtype)


def soft_cap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap): the identity near 0, never beyond cap; cap=0 leaves x as it is.

    Source: Gemma Team 2024, section 2, arXiv:2408.00118.
    """
    return cap * jnp.tanh(x / cap) if cap else x


def relative_bucket(distance: Array, *, bidirectional: bool, buckets: int, limit: int) -> Array:
    """Bin key-minus-query distances as T5 does: one bin each when near, log-wide bins when far.

    distance: int [...], in tokens. limit: at or beyond this, the last bin. Returns int [...] in
    [0, buckets). Bidirectional: half the buckets for each sign; else keys ahead fall in bin 0.
    Source: Raffel et al. 2020, section 2.1, arXiv:1910.10683.
    """
    base = 0
    if bidirectional:
        buckets //= 2
        base = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / jnp.log(limit / exact)
    far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return base + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    bias: Array | None = None,
    *,
    scale: float = 1.0,
    cap: float = 0.0,
    drop=lambda w: w,
) -> Array:
    """Sum of values, weighted by the softmax of scores: capped(scale * query . key + bias).

    query [B, T, N, H]; key and value [B, S, K, H], each serving N/K query heads; mask bool
    [B, T, S]; bias [N, T, S] or [B, N, T, S]; cap is soft_cap's; drop is applied to the weights.
    Returns [B, T, N, H].
    A query that sees nothing (padding) gets the mean of all values; its loss weight is 0.
    """
    heads, groups = query.shape[2], key.shape[2]
    query = query.reshape(*query.shape[:2], groups, heads // groups, -1)
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    if scale != 1:
        scores *= scale
    if bias is not None:
        scores += bias.reshape(*bias.shape[:-3], groups, heads // groups, *bias.shape[-2:])
    scores = soft_cap(scores, cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(value.dtype))
    summed = jnp.einsum("bkgts,bskh->btkgh", weights, value)
    return summed.reshape(*summed.shape[:2], heads, -1)
