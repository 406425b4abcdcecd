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
    query: Array, key: Array, value: Array, mask: Array, bias: Array | None = None, drop=lambda w: w
) -> Array:
    """Sum of values, weighted by the softmax of query-key products plus bias.

    query [B, T, N, H]; key and value [B, S, K, H], each serving N/K query heads; mask bool
    [B, T, S]; bias [N, T, S]; drop is applied to the weights. Returns [B, T, N, H].
    A query that sees nothing (padding) gets the mean of all values; its loss weight is 0.
    No 1/sqrt(H) here: T5 folds it into the query's initialiser.
    """
    heads, groups = query.shape[2], key.shape[2]
    query = query.reshape(*query.shape[:2], groups, heads // groups, -1)
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias.reshape(groups, heads // groups, *bias.shape[1:])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(value.dtype))
    summed = jnp.einsum("bkgts,bskh->btkgh", weights, value)
    return summed.reshape(*summed.shape[:2], heads, -1)
