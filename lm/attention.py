"""Who sees whom, at what distance, and the weighted sum that follows."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

SMALL = 2**16  # scores of a row: fewer are not worth a loop


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


class Scores(NamedTuple):
    """How scores are made: times `scale`, then capped as by soft_cap.

    by_rows lets a CPU take long rows one after the other, in less time and memory.
    """

    scale: float = 1.0
    cap: float = 0.0
    by_rows: bool = True


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    bias: Array | None = None,
    keep: Array | None = None,
    how: Scores = Scores(),  # noqa: B008  (it cannot change)
) -> Array:
    """Sum of values, weighted by the softmax of scores: capped(scale * query . key + bias).

    query [B, T, N, H]; key and value [B, S, K, H], each serving N/K query heads; mask bool
    [B, T, S]; bias [N, T, S] or [B, N, T, S]; keep float [B, K, N/K, 1, S], what dropout multiplies
    the weights by. Returns [B, T, N, H].
    A query that sees nothing (padding) gets the mean of all values; its loss weight is 0.
    """
    length, heads, groups = *query.shape[1:3], key.shape[2]
    query = query.reshape(*query.shape[:2], groups, heads // groups, -1)
    if bias is not None:
        bias = bias.reshape(*bias.shape[:-3], groups, heads // groups, *bias.shape[-2:])
    alike = bias is None or bias.ndim == 4  # one bias for all rows
    one = functools.partial(_attend_row, scale=how.scale, cap=how.cap)
    at_once = jax.vmap(one, (0, 0, 0, 0, 0, None if alike else 0))
    seen = query, key, value, mask, keep, bias
    if not how.by_rows or heads * length * key.shape[1] < SMALL:
        return at_once(*seen).reshape(*query.shape[:2], heads, -1)
    in_turn = functools.partial(_in_turn, jax.checkpoint(one), alike)
    summed = jax.lax.platform_dependent(*seen, cpu=in_turn, default=at_once)
    return summed.reshape(*query.shape[:2], heads, -1)


def _in_turn(one, alike, *seen):
    # Row by row: a row's scores stay in a CPU's cache, and are computed again when going back.
    *rows, bias = seen
    if alike:
        return jax.lax.map(lambda row: one(*row, bias), rows)
    return jax.lax.map(lambda row: one(*row), seen)


def _attend_row(query, key, value, mask, keep, bias, *, scale, cap):
    # query [T, K, G, H], key and value [S, K, H], mask [T, S] -> [T, K, G, H]. The products have
    # one batch axis, K, in front: with any other order XLA copies the scores to transpose them.
    length, groups, shared, width = query.shape
    query = jnp.transpose(query, (1, 2, 0, 3)).reshape(groups, shared * length, width)
    key, value = jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1)
    scores = jnp.einsum("kth,ksh->kts", query, key, preferred_element_type=jnp.float32)
    weights = _weights(scores.reshape(groups, shared, length, -1), mask, bias, scale, cap)
    if keep is not None:
        weights *= keep
    weights = weights.astype(value.dtype).reshape(groups, shared * length, -1)
    summed = jnp.einsum("kts,ksh->kth", weights, value)
    return jnp.transpose(summed.reshape(groups, shared, length, -1), (2, 0, 1, 3))


def scores(
    query: Array,
    key: Array,
    mask: Array,
    bias: Array | None = None,
    how: Scores = Scores(),  # noqa: B008  (it cannot change)
) -> Array:
    """What `attend` takes the softmax of: float32 [B, N, T, S], least where nothing is seen.

    query, key, mask, bias: as of `attend`.
    """
    (rows, length, heads, width), groups = query.shape, key.shape[2]
    query = query.reshape(rows, length, groups, heads // groups, width)
    made = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    made = made.reshape(rows, heads, length, -1)
    return _masked(made, mask[:, None], bias, how.scale, how.cap)


def _masked(scores, mask, bias, scale, cap):
    if scale != 1:
        scores *= scale
    if bias is not None:
        scores += bias
    return jnp.where(mask, soft_cap(scores, cap), jnp.finfo(jnp.float32).min)


def _weights(scores, mask, bias, scale, cap):
    return jax.nn.softmax(_masked(scores, mask, bias, scale, cap), axis=-1)


def by_heads(x: Array) -> Array:
    """Values [B, S, K, H] as a cache has them: [B * K, S, H]."""
    rows, length, groups, width = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(rows * groups, length, width)


def by_units(x: Array) -> Array:
    """Keys [B, S, K, H] as a cache has them: [B * K, H, S], as their product with queries wants."""
    rows, length, groups, width = x.shape
    return jnp.transpose(x, (0, 2, 3, 1)).reshape(rows * groups, width, length)


def attend_by_heads(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    bias: Array | None = None,
    how: Scores = Scores(),  # noqa: B008  (it cannot change)
) -> Array:
    """`attend` of few queries to keys [B * K, H, S] and values [B * K, S, H], as a cache has them.

    query [B, T, N, H]; mask bool [B, T, S]; bias [N, T, S] or [B, N, T, S]; an axis of size 1 of
    mask or bias is one for all. Returns [B, T, N, H].
    """
    # One batch axis, B * K, for products: with two a CPU takes up to four times as long, and
    # joined here instead of in the cache XLA would write to it twice and copy it in between. Keys
    # that lie as values do would be turned in every step.
    (rows, length, heads, width), groups = query.shape, len(key) // len(query)
    query = jnp.swapaxes(query, 1, 2).reshape(rows * groups, -1, width)
    scores = jnp.einsum("xth,xhs->xts", query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, groups, heads // groups, length, -1)
    if bias is not None:
        bias = bias.reshape(*bias.shape[:-3], groups, heads // groups, *bias.shape[-2:])
    weights = _weights(scores, mask[:, None, None], bias, how.scale, how.cap)
    weights = weights.astype(value.dtype).reshape(*query.shape[:2], -1)
    summed = jnp.einsum("xts,xsh->xth", weights, value)
    return jnp.swapaxes(summed.reshape(rows, heads, length, width), 1, 2)
