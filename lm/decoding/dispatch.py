"""Search by any method with any step function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.decoding import beam, stepwise
from lm.decoding.config import DecodingConfig
from lm.decoding.stepwise import Hypotheses


def search(
    step: stepwise.StepFn,
    cache: Any,
    start: jax.Array,
    gather: stepwise.GatherFn,
    config: DecodingConfig,
    *,
    length: int,
    eos: int,
    keys: jax.Array | None = None,
) -> Hypotheses:
    """Decode until every row has ended.

    The score of a greedy answer or a sample is the sum of the model's log-probabilities, before all
    processors; for beams see beam.beam_search.

    Args:
      step: (token int [B], cache) -> (logits [B, V], cache).
      cache: of the B rows.
      start: int [B], the token before the first; below 0: an empty row, which ends at once.
      gather: (cache, row indices int [R]) -> cache of R rows.
      config: the method and its options.
      length: the most tokens of an answer with eos; see DecodingConfig.max_tokens.
      eos: the id that ends an answer.
      keys: of jax.random [B], for sampling. A sample depends only on its row's key, its number
        among the row's samples and the position.
    """
    if config.method == "beam":
        return beam.beam_search(step, cache, start, gather, config, length=length, eos=eos)
    state = jax.lax.while_loop(
        lambda state: (state.i < length) & ~jnp.all(state.done),
        lambda state: stepwise.decode_token(step, state, config, eos=eos),
        stepwise.init_state(cache, start, gather, config, length=length, keys=keys),
    )
    by_row = lambda x: x.reshape(len(start), config.num_return_sequences, *x.shape[1:])
    return Hypotheses(by_row(state.ids), by_row(state.scores))
