"""Search over any step function; it knows no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import choose

Array = jax.Array
Step = Callable[[Array, Any], tuple[Array, Any]]  # token int [B], cache -> logits [B, V], cache
Take = Callable[[Any, Array], Any]  # cache of some rows, their indices int [R] -> cache of R rows

PENALTIES = {  # length in tokens, alpha -> what a sum of log-probabilities is divided by
    "power": lambda length, alpha: length**alpha,  # transformers' length_penalty
    "google": lambda length, alpha: ((5 + length) / 6) ** alpha,  # Wu et al. 2016, T5X
}
STOPS = {"bound": False, "full": True}  # does a row end as soon as `width` answers have ended?


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


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """How wide to search, how to weigh length, when to stop; checked when built.

    width: answers a row. alpha: 0 favours short answers, above 1 long ones. penalty: see PENALTIES.
    stop: "bound", when the likeliest open answer, ended now, would be no better than the worst of
    the `width` found (transformers' early_stopping=False); "full", as soon as `width` are found.
    """

    width: int = 4
    alpha: float = 1.0
    penalty: str = "power"
    stop: str = "bound"

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"beam.width={self.width} is too small; use 1 (greedy) or more.")
        choose.choose(PENALTIES, self.penalty, "beam.penalty")
        choose.choose(STOPS, self.stop, "beam.stop")


class Hypotheses(NamedTuple):
    """The n best of each row, best first; a score of -inf marks an empty place."""

    ids: Array  # int32 [B, n, length]
    scores: Array  # float32 [B, n]


def best(candidates: Hypotheses, count: int) -> tuple[Hypotheses, Array]:
    """The `count` best, and where they stood: int32 [B, count]. The first of equals wins."""
    scores, places = jax.lax.top_k(candidates.scores, count)
    ids = jnp.take_along_axis(candidates.ids, places[..., None], axis=1)
    return Hypotheses(ids, scores), places


def continuations(live: Hypotheses, logs: Array, i: Array, count: int) -> tuple[Hypotheses, Array]:
    """The `count` likeliest ways to put a token at place `i`, and the beam each continues.

    logs: log-probabilities [B, n, V] of the token, by beam. The scores are sums, without penalty.
    """
    sums = (live.scores[..., None] + logs).reshape(len(logs), -1)
    scores, places = jax.lax.top_k(sums, count)
    parents, tokens = jnp.divmod(places, logs.shape[-1])
    ids = jnp.take_along_axis(live.ids, parents[..., None], axis=1)
    return Hypotheses(ids.at[:, :, i].set(tokens), scores), parents


def beam(
    step: Step,
    cache: Any,
    start: Array,
    take: Take,
    config: BeamConfig,
    *,
    length: int,
    eos: int,
    pad: int = 0,
) -> Hypotheses:
    """The `width` best answers met while the `width` likeliest beginnings are pursued, by row.

    An answer's score is its summed log-probability divided by a penalty of its length, eos counted.
    start: int [B]. cache: of the B rows; `take` widens it once and re-orders it at every step, so
    `step` sees B * width rows, and what is computed once a sequence (cross-attention) stays so.
    Returns ids [B, width, length] and scores [B, width], best first, pad after eos. What is
    still open after `length` tokens ends there. Where fewer than `width` answers have a
    probability above 0, the last places have the score -inf and nothing but pad.
    Source: the rules of transformers' `generate`; Wu et al. 2016, section 7, arXiv:1609.08144.
    """
    rows, width = start.shape[0], config.width
    penalties = PENALTIES[config.penalty](np.arange(1.0, length + 1), config.alpha)
    penalties = jnp.asarray(penalties, jnp.float32)
    first = width * jnp.arange(rows)[:, None]  # where a row's beams begin among all beams

    def unfinished(carry):
        i, *_, searching = carry
        return (i < length) & jnp.any(searching)

    def advance(carry):
        i, token, cache, live, ended, searching = carry
        logits, cache = step(token, cache)
        logs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(rows, width, -1)
        # Of the 2 * width best, at most `width` can be eos, one a beam: enough stay open.
        longer, parents = continuations(live, logs, i, 2 * width)
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
        if STOPS[config.stop]:
            searching &= ended.scores[:, -1] == -jnp.inf
        return i + 1, live.ids[:, :, i].reshape(-1), cache, live, ended, searching

    nothing = jnp.full((rows, width), -jnp.inf)
    blank = jnp.full((rows, width, length), pad, jnp.int32)
    # Of the equal beams at the start one counts; its children take the other places.
    live = Hypotheses(blank, nothing.at[:, 0].set(0.0))
    cache = take(cache, jnp.repeat(jnp.arange(rows), width))
    token = jnp.repeat(start.astype(jnp.int32), width)
    carry = (0, token, cache, live, Hypotheses(blank, nothing), jnp.ones(rows, bool))
    return jax.lax.while_loop(unfinished, advance, carry)[4]
