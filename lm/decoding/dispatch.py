"""The one door to all methods: a step function searched as the words say."""

from __future__ import annotations

from typing import Any

import jax

from lm.decoding import beam, stepwise
from lm.decoding.config import DecodingConfig


def search(
    step: stepwise.Step,
    cache: Any,
    start: jax.Array,
    take: stepwise.Take,
    how: DecodingConfig,
    *,
    length: int,
    eos: int,
    keys: jax.Array | None = None,
) -> stepwise.Hypotheses:
    """Answers of at most `length` tokens, eos counted: see Decoding.room; found as `how` says.

    start: int [B], the token before the first; below 0: the row is empty, and ended from the
    outset. Stops when every row has ended. keys: of jax.random [B], where tokens are drawn.
    """
    if how.method == "beam":
        return beam.beam(step, cache, start, take, how, length=length, eos=eos)
    return stepwise.walk(step, cache, start, take, how, length=length, eos=eos, keys=keys)
