"""Decode one token by greedy search or sampling; the types of all methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import cpu_kernels
from lm.decoding import logits_processors
from lm.decoding.config import DecodingConfig

Array = jax.Array
StepFn = Callable[[Array, Any], tuple[Array, Any]]  # token int [B], cache -> logits [B, V], cache
GatherFn = Callable[[Any, Array], Any]  # cache of some rows, row indices int [R] -> cache of R rows

PAD = 0


class Hypotheses(NamedTuple):
    """The answers of each row; beams are sorted, best first."""

    ids: Array  # int32 [B, n, length], PAD after eos
    scores: Array  # float32 [B, n]; -inf marks an empty slot


class DecodeState(NamedTuple):
    """Unfinished answers, R = B * num_return_sequences rows."""

    i: Array  # int32 [], the number of tokens so far
    token: Array  # int32 [R], the last token
    done: Array  # bool [R]
    cache: Any
    ids: Array  # int32 [R, length]
    scores: Array  # float32 [R]
    start: Array  # int32 [R], the token before the first
    keys: Array | None  # of jax.random [R]


def init_state(
    cache: Any,
    start: Array,
    gather: GatherFn,
    config: DecodingConfig,
    *,
    length: int,
    keys: Array | None = None,
) -> DecodeState:
    """Return the state before the first token; arguments as in `search`.

    Raises ValueError for sampling without keys.
    """
    count, rows = config.num_return_sequences, len(start)
    if config.method == "sample":
        if keys is None:
            raise ValueError("decoding 'sample' requires keys; pass one for each row.")
        fold_in = jax.vmap(jax.random.fold_in, (None, 0))
        keys = jax.vmap(fold_in, (0, None))(keys, jnp.arange(count)).reshape(-1)
    if count > 1:
        cache = gather(cache, jnp.repeat(jnp.arange(rows), count))
        start = jnp.repeat(start, count)
    first = jnp.maximum(start, 0).astype(jnp.int32)
    ids = jnp.full((len(first), length), PAD, jnp.int32)
    zero = jnp.zeros([], jnp.int32)
    return DecodeState(zero, first, start < 0, cache, ids, jnp.zeros(len(first)), first, keys)


def decode_token(
    step: StepFn, state: DecodeState, config: DecodingConfig, *, eos: int
) -> DecodeState:
    """Decode one more token of each unfinished row, PAD for the others."""
    i, done = state.i, state.done
    model_logits, cache = step(state.token, state.cache)
    model_logits = model_logits.astype(jnp.float32)
    logits = logits_processors.process(model_logits, state.ids, state.start, i, config, eos)
    if config.method == "sample":
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, i)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        logits = logits_processors.warp(logits, config) + noise
    token = cpu_kernels.argmax(logits)
    token_logit = jnp.take_along_axis(model_logits, token[:, None], axis=1)[:, 0]
    log_prob = token_logit - jax.nn.logsumexp(model_logits, axis=-1)
    scores = state.scores + jnp.where(done, 0.0, log_prob)
    token = jnp.where(done, PAD, token)
    ids = jax.lax.dynamic_update_slice(state.ids, token[:, None], (0, i))
    done = done | (token == eos)
    return DecodeState(i + 1, token, done, cache, ids, scores, state.start, state.keys)
