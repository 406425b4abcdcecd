"""One answer at a time: greedy, the likeliest token at each step; sample, a token drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.decoding import logits_processors
from lm.decoding.config import DecodingConfig

Array = jax.Array
Step = Callable[[Array, Any], tuple[Array, Any]]  # token int [B], cache -> logits [B, V], cache
Take = Callable[[Any, Array], Any]  # cache of some rows, their indices int [R] -> cache of R rows

PAD = 0


class Hypotheses(NamedTuple):
    """The answers of each row; of beams the best first, else as they were drawn."""

    ids: Array  # int32 [B, n, length], PAD after eos
    scores: Array  # float32 [B, n]; -inf marks an empty place


def process_logits(
    logits: Array, ids: Array, start: Array, i: Array, how: DecodingConfig, eos: int
) -> Array:
    """The logits [R, V] of place `i` by the rules of every method: repetition and min_length.

    ids: int [R, length], of which `i` are said; they follow on `start`, int [R], said too.
    """
    if how.repetition != 1.0:
        said = jnp.where(jnp.arange(ids.shape[1]) < i, ids, start[:, None])
        logits = logits_processors.repeated(logits, said, how.repetition)
    return logits_processors.unended(logits, eos, i < how.min_length) if how.min_length else logits


def warp_logits(logits: Array, how: DecodingConfig) -> Array:
    """The logits [R, V] that a sample is drawn by: temperature, then top_k, then top_p of that."""
    logits = logits / how.temperature
    if how.top_k:
        logits = logits_processors.top_k(logits, how.top_k)
    return logits_processors.top_p(logits, how.top_p) if how.top_p < 1.0 else logits


def sample(logits: Array, keys: Array) -> Array:
    """A token a row, by its own key, with the chance that a softmax gives it.

    float [R, V], keys [R] -> int32 [R]. The noise is Gumbel's, of which the largest sum is a draw.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return logits_processors.likeliest(logits + noise)


class DecodeState(NamedTuple):
    """Answers under way, a row each, R of them: B rows times `n_best` draws."""

    i: Array  # int32 [], tokens said
    token: Array  # int32 [R], the last of them
    done: Array  # bool [R]
    cache: Any
    ids: Array  # int32 [R, length]
    scores: Array  # float32 [R]
    start: Array  # int32 [R], the token before the first
    keys: Array | None  # of jax.random [R]


def begin(
    cache: Any,
    start: Array,
    take: Take,
    how: DecodingConfig,
    *,
    length: int,
    keys: Array | None = None,
) -> DecodeState:
    """Nothing said yet; all as in `walk`. Raises ValueError where a sample has no keys."""
    draws, rows = how.n_best, len(start)
    if how.method == "sample":
        if keys is None:
            raise ValueError("decoding 'sample' has no keys to draw with; give one a row.")
        number = jax.vmap(jax.random.fold_in, (None, 0))
        keys = jax.vmap(number, (0, None))(keys, jnp.arange(draws)).reshape(-1)
    if draws > 1:
        cache = take(cache, jnp.repeat(jnp.arange(rows), draws))
        start = jnp.repeat(start, draws)
    first = jnp.maximum(start, 0).astype(jnp.int32)
    ids = jnp.full((len(first), length), PAD, jnp.int32)
    zero = jnp.zeros([], jnp.int32)
    return DecodeState(zero, first, start < 0, cache, ids, jnp.zeros(len(first)), first, keys)


def advance(step: Step, state: DecodeState, how: DecodingConfig, *, eos: int) -> DecodeState:
    """One more token for each row that has not ended, PAD for the others."""
    i, done = state.i, state.done
    raw, cache = step(state.token, state.cache)
    raw = raw.astype(jnp.float32)
    logits = process_logits(raw, state.ids, state.start, i, how, eos)
    if how.method == "sample":
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, i)
        token = sample(warp_logits(logits, how), keys)
    else:
        token = logits_processors.likeliest(logits)
    chosen = jnp.take_along_axis(raw, token[:, None], axis=1)[:, 0]
    scores = state.scores + jnp.where(done, 0.0, chosen - jax.nn.logsumexp(raw, axis=-1))
    token = jnp.where(done, PAD, token)
    ids = jax.lax.dynamic_update_slice(state.ids, token[:, None], (0, i))
    return DecodeState(
        i + 1, token, done | (token == eos), cache, ids, scores, state.start, state.keys
    )


def walk(
    step: Step,
    cache: Any,
    start: Array,
    take: Take,
    how: DecodingConfig,
    *,
    length: int,
    eos: int,
    keys: Array | None = None,
) -> Hypotheses:
    """Answers token by token, each said for good: greedy, or drawn `n_best` times a row.

    keys: of jax.random [B], to draw with. A draw depends on its row's key, its number among the
    row's draws and its place in the answer, so on no other row. For the rest see `search`.
    A score is the sum of the log-probabilities that the model itself gives, before all rules.
    """
    unfinished = lambda state: (state.i < length) & ~jnp.all(state.done)
    further = lambda state: advance(step, state, how, eos=eos)
    state = begin(cache, start, take, how, length=length, keys=keys)
    state = jax.lax.while_loop(unfinished, further, state)
    split = lambda x: x.reshape(len(start), how.n_best, *x.shape[1:])
    return Hypotheses(split(state.ids), split(state.scores))
