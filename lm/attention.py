"""Attention: segment masks, positions, relative buckets, and the softmax-weighted sum."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


def distance(queries: int, keys: int, start: int | Array = 0) -> Array:
    """Key index minus query index: int [T, S]; `start` is the index of the first query."""
    return jnp.arange(keys)[None, :] - (start + jnp.arange(queries))[:, None]


def same_segment(queries: Array, keys: Array) -> Array:
    """Mask of pairs in one segment, not 0 (padding): int [B, T], [B, S] -> bool [B, T, S]."""
    return (queries[:, :, None] == keys[:, None, :]) & (keys[:, None, :] > 0)


def positions(segment_ids: Array) -> Array:
    """Position of each token in its segment, from 0: int [B, T] -> int [B, T]."""
    index = jnp.arange(segment_ids.shape[1])
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    starts = jnp.where((segment_ids != before) | (index == 0), index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def sinusoids(positions: Array, width: int) -> Array:
    """Sinusoidal position embeddings, sines first, then cosines: int [...] -> float32 [..., width].

    Source: Vaswani et al. 2017, section 3.5, arXiv:1706.03762.
    """
    angles = positions[..., None] * 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotate(x: Array, positions: Array, base: float) -> Array:
    """Apply rotary position embeddings to x [B, T, N, H]: rotate the pairs (i, i + H/2).

    positions: int [B, T]. base: the slowest pair rotates by about 1/base radians per token.
    Products of rotated queries and keys depend on their distance only.
    Source: Su et al. 2021, section 3.2, arXiv:2104.09864.
    """
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    low, high = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x.dtype)


def soft_cap(x: Array, cap: float) -> Array:
    """Return cap * tanh(x / cap), bounded by cap; cap=0 returns x unchanged.

    Source: Gemma Team 2024, section 2, arXiv:2408.00118.
    """
    return cap * jnp.tanh(x / cap) if cap else x


def relative_bucket(distance: Array, *, bidirectional: bool, buckets: int, limit: int) -> Array:
    """Bin key-minus-query distances as T5 does: one bin each when near, log-wide bins when far.

    distance: int [...], in tokens. limit: distances from here on share the last bin. Returns
    int [...] in [0, buckets). Bidirectional: half the buckets for each sign; else keys after the
    query share bin 0.
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


class ScoreConfig(NamedTuple):
    """Attention scores are multiplied by `scale` and soft-capped at `cap` (0: uncapped)."""

    scale: float = 1.0
    cap: float = 0.0


def masked_scores(scores: Array, mask: Array, bias: Array | None, config: ScoreConfig) -> Array:
    """Scale products of queries and keys, add the bias, cap, and set masked scores to the minimum.

    scores float32 [..., T, S]; mask and bias broadcast to it.
    """
    if config.scale != 1:
        scores *= config.scale
    if bias is not None:
        scores += bias
    return jnp.where(mask, soft_cap(scores, config.cap), jnp.finfo(jnp.float32).min)


def scores(
    query: Array,
    key: Array,
    mask: Array,
    bias: Array | None = None,
    config: ScoreConfig = ScoreConfig(),  # noqa: B008  (immutable)
) -> Array:
    """Return the softmax's argument in `attend`: float32 [B, N, T, S]. Args: as for `attend`."""
    (rows, length, heads, width), groups = query.shape, key.shape[2]
    query = query.reshape(rows, length, groups, heads // groups, width)
    products = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    products = products.reshape(rows, heads, length, -1)
    return masked_scores(products, mask[:, None], bias, config)


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    bias: Array | None = None,
    keep: Array | None = None,
    config: ScoreConfig = ScoreConfig(),  # noqa: B008  (immutable)
) -> Array:
    """Return softmax(cap(scale * query . key + bias)) . value for every query and head.

    A query whose keys are all masked (padding) gets the mean of all values.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H]; each of the K heads serves N/K query heads.
      mask: bool [B, T, S], True where a query may attend to a key.
      bias: [N, T, S] or [B, N, T, S].
      keep: float [B, K, N/K, 1, S], dropout's factor for the weights.

    Returns: [B, T, N, H].
    """
    rows, length, heads, _ = query.shape
    weights = jax.nn.softmax(scores(query, key, mask, bias, config), axis=-1)
    weights = weights.reshape(rows, key.shape[2], -1, length, key.shape[1])
    if keep is not None:
        weights *= keep
    outputs = jnp.einsum("bkgts,bskh->btkgh", weights.astype(value.dtype), value)
    return outputs.reshape(rows, length, heads, -1)


def to_cache(key: Array, value: Array) -> tuple[Array, Array]:
    """Keys and values [B, S, K, H] in the layout of a cache: [B * K, H, S] and [B * K, S, H]."""
    rows, length, groups, width = key.shape
    key = jnp.transpose(key, (0, 2, 3, 1)).reshape(rows * groups, width, length)
    return key, jnp.swapaxes(value, 1, 2).reshape(rows * groups, length, width)


def from_cache(key: Array, value: Array, rows: int) -> tuple[Array, Array]:
    """Keys and values of `rows` rows in the layout of a cache as [B, S, K, H]: undo `to_cache`."""
    key = key.reshape(rows, -1, *key.shape[1:])
    value = value.reshape(rows, -1, *value.shape[1:])
    return jnp.transpose(key, (0, 3, 1, 2)), jnp.swapaxes(value, 1, 2)


def attend_to_cache(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    bias: Array | None = None,
    config: ScoreConfig = ScoreConfig(),  # noqa: B008  (immutable)
) -> Array:
    """Run `attend` for few queries on keys and values in the layout of `to_cache`.

    query [B, T, N, H]; mask bool [B, T, S]; bias [N, T, S] or [B, N, T, S]; mask and bias may have
    axes of size 1, which broadcast. Returns [B, T, N, H].
    """
    # The products have one batch axis, B * K: with two, a CPU takes up to four times as long.
    # The cache stores the axes joined because XLA would copy it on joining them in every step,
    # and keys with S last because XLA would transpose them in every step.
    (rows, length, heads, width), groups = query.shape, len(key) // len(query)
    query = jnp.swapaxes(query, 1, 2).reshape(rows * groups, -1, width)
    products = jnp.einsum("xth,xhs->xts", query, key, preferred_element_type=jnp.float32)
    products = products.reshape(rows, groups, heads // groups, length, -1)
    if bias is not None:
        bias = bias.reshape(*bias.shape[:-3], groups, heads // groups, *bias.shape[-2:])
    weights = jax.nn.softmax(masked_scores(products, mask[:, None, None], bias, config), axis=-1)
    weights = weights.astype(value.dtype).reshape(*query.shape[:2], -1)
    outputs = jnp.einsum("xts,xsh->xth", weights, value)
    return jnp.swapaxes(outputs.reshape(rows, heads, length, width), 1, 2)
