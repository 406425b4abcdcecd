"""Search by any method with any step function."""

from __future__ import annotations

from typing import Any

import jax

from lm.decoding import beam, stepwise
from lm.decoding.config import DecodingConfig


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
) -> stepwise.Hypotheses:
    """Decode until every row has ended.

    Args:
      step: (token int [B], cache) -> (logits [B, V], cache).
      cache: of the B rows.
      start: int [B], the token before the first; below 0: an empty row, which ends at once.
      gather: (cache, row indices int [R]) -> cache of R rows.
      config: the method and its options.
      length: the most tokens of an answer with eos; see DecodingConfig.max_tokens.
      eos: the id that ends an answer.
      keys: of jax.random [B], for sampling.
    """
    if config.method == "beam":
        return beam.beam_search(step, cache, start, gather, config, length=length, eos=eos)
    options = {"length": length, "eos": eos, "keys": keys}
    return stepwise.stepwise_search(step, cache, start, gather, config, **options)
