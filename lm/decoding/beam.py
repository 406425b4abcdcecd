"""Beam search."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import cpu_kernels
from lm.decoding import logits_processors, stepwise
from lm.decoding.config import LENGTH_PENALTIES, DecodingConfig
from lm.decoding.stepwise import PAD, Hypotheses

Array = jax.Array


def _best(hypotheses, count):
    """Return the `count` best hypotheses and their indices [B, count]; of equals the first."""
    scores, indices = jax.lax.top_k(hypotheses.scores, count)
    ids = jnp.take_along_axis(hypotheses.ids, indices[..., None], axis=1)
    return Hypotheses(ids, scores), indices


def _extend(live, logits, start, i, config, eos):
    """Extend live beams by a token.

    Args:
      live: B rows of n beams; scores are summed log-probabilities.
      logits: [B * n, V] of position `i`, before all processors.
      start: int [B * n], the token before the first.

    Returns the 2 * n best extensions of each row, and the index of the beam that each extends.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    if config.repetition_penalty != 1.0:  # the only processor for which the sign matters
        logits, log_z = logits - log_z, jnp.zeros_like(log_z)
    ids = live.ids.reshape(len(start), -1)
    logits = logits_processors.process(logits, ids, start, i, config, eos)

    (rows, beams), count = live.scores.shape, 2 * live.scores.shape[1]
    num_tokens = min(count, logits.shape[-1])
    # top_k of the logits: log_softmax is slow if a CPU fuses it with the product before it.
    values, tokens = cpu_kernels.fast_top_k(logits, num_tokens)
    sums = live.scores[..., None] + (values - log_z).reshape(rows, beams, num_tokens)
    scores, indices = jax.lax.top_k(sums.reshape(rows, -1), count)
    parents = indices // num_tokens
    tokens = jnp.take_along_axis(tokens.reshape(rows, -1), indices, axis=1)
    ids = jnp.take_along_axis(live.ids, parents[..., None], axis=1)
    return Hypotheses(ids.at[:, :, i].set(tokens), scores), parents


def beam_search(
    step: stepwise.StepFn,
    cache: Any,
    start: Array,
    gather: stepwise.GatherFn,
    config: DecodingConfig,
    *,
    length: int,
    eos: int,
) -> Hypotheses:
    """Return the num_return_sequences best hypotheses of each row; arguments as in `search`.

    A score is the summed log-probability after all processors, divided by the length penalty.
    `gather` expands the cache of B rows to B * num_beams once, and reorders it at each step within
    a row. Hypotheses that are open after `length` tokens end there. If fewer than
    num_return_sequences hypotheses have a probability above 0, the last slots have the score -inf
    and ids of PAD.
    Source: transformers' `generate`; Wu et al. 2016, section 7, arXiv:1609.08144.
    """
    rows, beams = start.shape[0], config.num_beams
    penalty = LENGTH_PENALTIES[config.length_penalty_kind]
    penalties = jnp.float32(penalty(np.arange(1.0, length + 1), config.length_penalty))
    first_beam = beams * jnp.arange(rows)[:, None]  # of each row, among all beams
    first_token = jnp.repeat(jnp.maximum(start, 0).astype(jnp.int32), beams)

    def unfinished(carry):
        i, *_, searching = carry
        return (i < length) & jnp.any(searching)

    def decode_token(carry):
        i, token, cache, live, ended, searching = carry
        logits, cache = step(token, cache)
        # Of the 2 * beams best, at most `beams` end in eos, one a beam: enough stay open.
        extended, parents = _extend(live, logits, first_token, i, config, eos)
        is_final = (extended.ids[:, :, i] == eos) | (i == length - 1)
        is_ranked = jnp.arange(2 * beams) < beams  # the others only replace those that end
        ends = is_final & is_ranked & searching[:, None]
        scores = jnp.where(ends, extended.scores / penalties[i], -jnp.inf)
        concatenate = lambda old, new: jnp.concatenate([old, new], axis=1)
        ended, _ = _best(jax.tree.map(concatenate, ended, extended._replace(scores=scores)), beams)

        scores = jnp.where(is_final, -jnp.inf, extended.scores)
        live, indices = _best(extended._replace(scores=scores), beams)
        parents = jnp.take_along_axis(parents, indices, axis=1)
        cache = gather(cache, (first_beam + parents).reshape(-1))
        searching &= live.scores[:, 0] / penalties[i] > ended.scores[:, -1]
        if config.early_stopping:
            searching &= ended.scores[:, -1] == -jnp.inf
        return i + 1, live.ids[:, :, i].reshape(-1), cache, live, ended, searching

    no_scores = jnp.full((rows, beams), -jnp.inf)
    no_ids = jnp.full((rows, beams, length), PAD, jnp.int32)
    # The beams are equal at the start, so all but one have the score -inf.
    live = Hypotheses(no_ids, no_scores.at[:, 0].set(0.0))
    cache = gather(cache, jnp.repeat(jnp.arange(rows), beams))
    carry = (0, first_token, cache, live, Hypotheses(no_ids, no_scores), start >= 0)
    ended = jax.lax.while_loop(unfinished, decode_token, carry)[4]
    count = config.num_return_sequences
    return Hypotheses(ended.ids[:, :count], ended.scores[:, :count])
