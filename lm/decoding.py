"""Search over any step function; it knows no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Step = Callable[[Array, Any], tuple[Array, Any]]  # token int [B], cache -> logits [B, V], cache


def greedy(step: Step, cache: Any, start: Array, *, length: int, eos: int, pad: int = 0) -> Array:
    """The likeliest token at each step, from `start` int [B] -> int32 [B, length], pad after eos.

    Stops when every row has ended; the rest is pad.
    """
    tokens = jnp.full((start.shape[0], length), pad, jnp.int32)

    def unfinished(carry):
        i, _, done, _, _ = carry
        return (i < length) & ~jnp.all(done)

    def advance(carry):
        i, token, done, cache, tokens = carry
        logits, cache = step(token, cache)
        token = jnp.where(done, pad, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i))
        return i + 1, token, done | (token == eos), cache, tokens

    carry = (0, start.astype(jnp.int32), jnp.zeros(start.shape, bool), cache, tokens)
    return jax.lax.while_loop(unfinished, advance, carry)[-1]
