"""Logits to logits: what may be said next, and how likely. As transformers' logits processors."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

PIECE = 128  # logits that are looked through as one


def likeliest(logits: Array) -> Array:
    """The token of the largest logit, the first of equals: float [B, V] -> int32 [B].

    As jnp.argmax, at a tenth of its cost on a CPU.
    """
    return largest(logits, 1)[1][:, 0]


def largest(x: Array, count: int) -> tuple[Array, Array]:
    """jax.lax.top_k at a twentieth of its cost on a CPU: float [B, N] -> [B, count], int alike.

    What is among the `count` largest lies in one of the `count` pieces with the largest maxima.
    """
    size = x.shape[-1]
    if size <= count * PIECE:
        return jax.lax.top_k(x, count)
    pieces = jnp.pad(x, ((0, 0), (0, -size % PIECE)), constant_values=-jnp.inf)
    pieces = pieces.reshape(len(x), -1, PIECE)
    chosen = jnp.sort(jax.lax.top_k(jnp.max(pieces, -1), count)[1])  # in order: equals stay so
    pieces = jnp.take_along_axis(pieces, chosen[..., None], axis=1)
    values, places = jax.lax.top_k(pieces.reshape(len(x), -1), count)
    piece, place = jnp.divmod(places, PIECE)
    return values, jnp.take_along_axis(chosen, piece, axis=1) * PIECE + place


def repeated(logits: Array, before: Array, penalty: float) -> Array:
    """Logits with those of the tokens said before divided by `penalty`, or multiplied where < 0.

    float [B, V], int [B, T] with any token any number of times -> float [B, V].
    Source: Keskar et al. 2019, section 4.1, arXiv:1909.05858.
    """
    rows = jnp.arange(len(logits))[:, None]
    old = jnp.take_along_axis(logits, before, axis=1)
    return logits.at[rows, before].set(jnp.where(old < 0, old * penalty, old / penalty))


def unended(logits: Array, eos: int, early: Array) -> Array:
    """Logits without eos where `early`, bool []."""
    return jnp.where(early & (jnp.arange(logits.shape[-1]) == eos), -jnp.inf, logits)


def top_k(logits: Array, count: int) -> Array:
    """Logits with -inf for all but the `count` largest and what equals the least of them."""
    values, _ = largest(logits, min(count, logits.shape[-1]))
    # Not values[:, -1:], for which XLA sorts the whole vocabulary on a CPU, at 100 times the cost.
    return jnp.where(logits < jnp.min(values, -1, keepdims=True), -jnp.inf, logits)


def top_p(logits: Array, share: float) -> Array:
    """Logits with -inf for all but the likeliest tokens that together have `share` of the chance.

    Equals stay or go together. The bound between them is found by halving, without sorting: chances
    order as their bits do. Source: Holtzman et al. 2020, section 3.1, arXiv:1904.09751.
    """
    chances = jax.nn.softmax(logits)
    bits = jax.lax.bitcast_convert_type(chances, jnp.int32)

    def halve(_, bounds):  # the tokens from `low` on are enough, those from `high` on are not
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits >= middle, chances, 0.0), -1, keepdims=True) >= share
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bounds = (jnp.zeros_like(bits[:, :1]), jnp.max(bits, -1, keepdims=True) + 1)
    low, _ = jax.lax.fori_loop(0, 31, halve, bounds)
    return jnp.where(bits < low, -jnp.inf, logits)
