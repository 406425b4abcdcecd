"""Several beginnings at once: the likeliest answers met while the likeliest are pursued."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.decoding import logits_processors, stepwise
from lm.decoding.config import PENALTIES, STOPS, DecodingConfig
from lm.decoding.stepwise import PAD, Hypotheses

Array = jax.Array


def best(candidates: Hypotheses, count: int) -> tuple[Hypotheses, Array]:
    """The `count` best, and where they stood: int32 [B, count]. The first of equals wins."""
    scores, places = jax.lax.top_k(candidates.scores, count)
    ids = jnp.take_along_axis(candidates.ids, places[..., None], axis=1)
    return Hypotheses(ids, scores), places


def process_beam_logits(
    raw: Array, ids: Array, start: Array, i: Array, how: DecodingConfig, eos: int
) -> tuple:
    """Logits [R, V] by the rules, and what they are more than log-probabilities: [R, 1].

    The rest as of walk.ruled, whose rules are taken here as of log-probabilities.
    """
    raw = raw.astype(jnp.float32)
    total = jax.nn.logsumexp(raw, axis=-1, keepdims=True)
    if how.repetition != 1.0:  # the one rule for which their sign counts
        raw, total = raw - total, jnp.zeros_like(total)
    return stepwise.process_logits(raw, ids, start, i, how, eos), total


def continuations(
    live: Hypotheses, logits: Array, total: Array, i: Array, count: int
) -> tuple[Hypotheses, Array]:
    """The `count` likeliest ways to put a token at place `i`, and the beam each continues.

    logits [B * n, V] of the token, by beam; less `total` [B * n, 1] they are log-probabilities. The
    scores are sums, without penalty.
    """
    (rows, width), most = live.scores.shape, min(count, logits.shape[-1])
    # Of the logits themselves: log_softmax is slow where a CPU fuses it with the product before it.
    each, tokens = logits_processors.largest(logits, most)
    sums = live.scores[..., None] + (each - total).reshape(rows, width, most)
    scores, places = jax.lax.top_k(sums.reshape(rows, -1), count)
    parents, tokens = places // most, jnp.take_along_axis(tokens.reshape(rows, -1), places, axis=1)
    ids = jnp.take_along_axis(live.ids, parents[..., None], axis=1)
    return Hypotheses(ids.at[:, :, i].set(tokens), scores), parents


def beam(
    step: stepwise.Step,
    cache: Any,
    start: Array,
    take: stepwise.Take,
    how: DecodingConfig,
    *,
    length: int,
    eos: int,
) -> Hypotheses:
    """The `n_best` answers met while the `width` likeliest beginnings are pursued, by row.

    A score is the summed log-probability, as the rules leave it, divided by a penalty of the
    answer's length, eos counted. cache: of the B rows; `take` widens it once and re-orders it at
    every step, within a row, so `step` sees B * width rows. For the rest see `search`.
    What is still open after `length` tokens ends there. Where fewer than n_best answers have a
    probability above 0, the last places have the score -inf and nothing but PAD.
    Source: the rules of transformers' `generate`; Wu et al. 2016, section 7, arXiv:1609.08144.
    """
    rows, width = start.shape[0], how.width
    penalties = PENALTIES[how.penalty](np.arange(1.0, length + 1), how.alpha)
    penalties = jnp.asarray(penalties, jnp.float32)
    first = width * jnp.arange(rows)[:, None]  # where a row's beams begin among all beams
    opening = jnp.repeat(jnp.maximum(start, 0).astype(jnp.int32), width)

    def unfinished(carry):
        i, *_, searching = carry
        return (i < length) & jnp.any(searching)

    def advance(carry):
        i, token, cache, live, ended, searching = carry
        raw, cache = step(token, cache)
        said = live.ids.reshape(len(token), length)
        # Of the 2 * width best, at most `width` can be eos, one a beam: enough stay open.
        longer, parents = continuations(
            live, *process_beam_logits(raw, said, opening, i, how, eos), i, 2 * width
        )
        final = (longer.ids[:, :, i] == eos) | (i == length - 1)
        ranked = jnp.arange(2 * width) < width  # the others only stand in for those that end
        end = final & ranked & searching[:, None]
        found = longer._replace(scores=jnp.where(end, longer.scores / penalties[i], -jnp.inf))
        beside = lambda old, new: jnp.concatenate([old, new], axis=1)
        ended, _ = best(jax.tree.map(beside, ended, found), width)

        still = longer._replace(scores=jnp.where(final, -jnp.inf, longer.scores))
        live, places = best(still, width)
        parents = jnp.take_along_axis(parents, places, axis=1)
        cache = take(cache, (first + parents).reshape(-1))
        searching &= live.scores[:, 0] / penalties[i] > ended.scores[:, -1]
        if STOPS[how.stop]:
            searching &= ended.scores[:, -1] == -jnp.inf
        return i + 1, live.ids[:, :, i].reshape(-1), cache, live, ended, searching

    nothing = jnp.full((rows, width), -jnp.inf)
    blank = jnp.full((rows, width, length), PAD, jnp.int32)
    # Of the equal beams at the start one counts; its children take the other places.
    live = Hypotheses(blank, nothing.at[:, 0].set(0.0))
    cache = take(cache, jnp.repeat(jnp.arange(rows), width))
    carry = (0, opening, cache, live, Hypotheses(blank, nothing), start >= 0)
    ended = jax.lax.while_loop(unfinished, advance, carry)[4]
    return Hypotheses(ended.ids[:, : how.n_best], ended.scores[:, : how.n_best])
