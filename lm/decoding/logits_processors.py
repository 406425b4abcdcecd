"""Logits to logits: repetition penalty, minimal length, top-k, top-p; as in transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lm import cpu_kernels
from lm.decoding.config import DecodingConfig

Array = jax.Array


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
    return cpu_kernels.top_p(logits, config.top_p) if config.top_p < 1.0 else logits


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
    values, _ = cpu_kernels.fast_top_k(logits, min(count, logits.shape[-1]))
    # Not values[:, -1:], for which XLA sorts the whole vocabulary on a CPU, at 100 times the cost.
    return jnp.where(logits < jnp.min(values, -1, keepdims=True), -jnp.inf, logits)
