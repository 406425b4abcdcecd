"""Logits to logits: repetition penalty, minimal length, top-k, top-p; as in transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm.decoding.config import DecodingConfig

Array = jax.Array

BLOCK = 128  # logits of a block of fast_top_k


def process(
    logits: Array, ids: Array, start: Array, i: Array, config: DecodingConfig, eos: int
) -> Array:
    """Apply the repetition penalty and min_length to the logits [R, V] of position `i`.

    ids: int [R, length], of which `i` are decoded. start: int [R], the token before them.
    """
    if config.repetition_penalty != 1.0:
        previous = jnp.where(jnp.arange(ids.shape[1]) < i, ids, start[:, None])
        logits = penalize_repetition(logits, previous, config.repetition_penalty)
    if config.min_length:
        is_eos = jnp.arange(logits.shape[-1]) == eos
        logits = jnp.where((i < config.min_length) & is_eos, -jnp.inf, logits)
    return logits


def warp(logits: Array, config: DecodingConfig) -> Array:
    """Apply temperature, then top_k, then top_p to the logits [R, V] of a sample."""
    logits = logits / config.temperature
    if config.top_k:
        logits = top_k(logits, config.top_k)
    return top_p(logits, config.top_p) if config.top_p < 1.0 else logits


def argmax(logits: Array) -> Array:
    """Compute jnp.argmax at a tenth of its cost on a CPU: float [B, V] -> int32 [B]."""
    return fast_top_k(logits, 1)[1][:, 0]


def fast_top_k(x: Array, count: int) -> tuple[Array, Array]:
    """Compute jax.lax.top_k at a twentieth of its cost on a CPU.

    The `count` largest values lie in the `count` blocks with the largest maxima.

    Args: x: [B, N]. Returns (values, indices) [B, count]; of equal values the first come first.
    """
    size = x.shape[-1]
    if size <= count * BLOCK:
        return jax.lax.top_k(x, count)
    blocks = jnp.pad(x, ((0, 0), (0, -size % BLOCK)), constant_values=-jnp.inf)
    blocks = blocks.reshape(len(x), -1, BLOCK)
    # Sorted, so that of equal values the first wins.
    top_blocks = jnp.sort(jax.lax.top_k(jnp.max(blocks, -1), count)[1])
    blocks = jnp.take_along_axis(blocks, top_blocks[..., None], axis=1)
    values, indices = jax.lax.top_k(blocks.reshape(len(x), -1), count)
    block, offset = jnp.divmod(indices, BLOCK)
    return values, jnp.take_along_axis(top_blocks, block, axis=1) * BLOCK + offset


def penalize_repetition(logits: Array, previous: Array, penalty: float) -> Array:
    """Divide the logits of previous tokens by `penalty`, or multiply them if negative.

    Args:
      logits: float [B, V].
      previous: int [B, T]; repeated tokens count once.

    Source: Keskar et al. 2019, section 4.1, arXiv:1909.05858.
    """
    rows = jnp.arange(len(logits))[:, None]
    old = jnp.take_along_axis(logits, previous, axis=1)
    return logits.at[rows, previous].set(jnp.where(old < 0, old * penalty, old / penalty))


def top_k(logits: Array, count: int) -> Array:
    """Set all logits below the `count`-th largest to -inf."""
    values, _ = fast_top_k(logits, min(count, logits.shape[-1]))
    # Not values[:, -1:], for which XLA sorts the whole vocabulary on a CPU, at 100 times the cost.
    return jnp.where(logits < jnp.min(values, -1, keepdims=True), -jnp.inf, logits)


def top_p(logits: Array, mass: float) -> Array:
    """Set all logits to -inf except the fewest largest whose probabilities sum to `mass`.

    Tokens of equal probability are treated alike. Other implementations sort the vocabulary; this
    one bisects the threshold over the bits of the probabilities, which are ordered as floats are.
    Source: Holtzman et al. 2020, section 3.1, arXiv:1904.09751.
    """
    probs = jax.nn.softmax(logits)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def bisect(_, bounds):  # tokens of `low` or more have the mass, those of `high` or more do not
        low, high = bounds
        middle = low + (high - low) // 2
        is_enough = jnp.sum(jnp.where(bits >= middle, probs, 0.0), -1, keepdims=True) >= mass
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    bounds = (jnp.zeros_like(bits[:, :1]), jnp.max(bits, -1, keepdims=True) + 1)
    low, _ = jax.lax.fori_loop(0, 31, bisect, bounds)
    return jnp.where(bits < low, -jnp.inf, logits)
