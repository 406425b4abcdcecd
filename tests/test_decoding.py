"""Laws of search, on chains written by hand and on random ones; no model is needed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import decoding

EOS = 1
# Next-token probabilities by previous token; 0 starts. Greedy goes 0 2 4 1; the likeliest is 0 3 1.
CHAIN = np.array(
    [
        [0.00, 0.00, 0.60, 0.40, 0.00],
        [0.00, 1.00, 0.00, 0.00, 0.00],
        [0.00, 0.30, 0.00, 0.30, 0.40],
        [0.00, 1.00, 0.00, 0.00, 0.00],
        [0.00, 0.70, 0.30, 0.00, 0.00],
    ]
)


def chain_step(token, cache):
    return jnp.log(jnp.asarray(CHAIN))[token], cache


def by_hand(table, start, length):
    """Greedy in plain Python over logits [time, previous, next]: a list padded to `length`."""
    answer, token = [], start
    for time in range(length):
        token = int(np.argmax(table[time, token]))
        answer.append(token)
        if token == EOS:
            break
    return answer + [0] * (length - len(answer))


def test_greedy_walks_the_chain_by_its_likeliest_next_token():
    starts = jnp.array([0, 2, 3, 4])
    answers = decoding.greedy(chain_step, None, starts, length=6, eos=EOS)
    expected = [[2, 4, 1, 0, 0, 0], [4, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(answers, expected)
    assert answers.dtype == jnp.int32


@pytest.mark.parametrize("length", [1, 9])
def test_greedy_is_the_loop_one_would_write_by_hand(length):
    rng = np.random.default_rng(length)
    table = rng.normal(size=(9, 7, 7))
    table[..., EOS] -= 1.0
    step = lambda token, time: (jnp.asarray(table)[time, token], time + 1)  # the cache is a clock
    starts = np.arange(7)
    answers = decoding.greedy(step, jnp.array(0), jnp.asarray(starts), length=length, eos=EOS)
    np.testing.assert_array_equal(answers, [by_hand(table, s, length) for s in starts])


def test_a_row_does_not_depend_on_its_neighbours():
    together = decoding.greedy(chain_step, None, jnp.array([0, 3, 4]), length=5, eos=EOS)
    for row, start in zip(together, (0, 3, 4), strict=True):
        alone = decoding.greedy(chain_step, None, jnp.array([start]), length=5, eos=EOS)
        np.testing.assert_array_equal(alone[0], row)


def test_every_tail_after_eos_is_the_pad_one_asks_for():
    answers = decoding.greedy(chain_step, None, jnp.array([0, 3]), length=5, eos=EOS, pad=9)
    np.testing.assert_array_equal(answers, [[2, 4, 1, 9, 9], [1, 9, 9, 9, 9]])


@pytest.mark.parametrize("starts, calls", [([3], 1), ([3, 4], 1), ([4, 2], 2), ([3, 0], 3)])
def test_search_stops_with_the_longest_answer(starts, calls):
    counted = []

    def step(token, cache):
        jax.debug.callback(lambda: counted.append(1))
        return chain_step(token, cache)

    decoding.greedy(step, None, jnp.array(starts), length=50, eos=EOS).block_until_ready()
    jax.effects_barrier()
    assert len(counted) == calls


def test_search_stops_at_the_length_where_no_row_ends():
    forever = lambda token, cache: (jnp.tile(jnp.array([0.0, 0.0, 1.0]), (2, 1)), cache)
    answers = decoding.greedy(forever, None, jnp.array([0, 0]), length=4, eos=EOS)
    np.testing.assert_array_equal(answers, np.full((2, 4), 2))


def test_a_tie_goes_to_the_first_token():
    equal = lambda token, cache: (jnp.zeros((1, 5)).at[:, 3:].set(1.0), cache)
    assert decoding.greedy(equal, None, jnp.array([0]), length=1, eos=EOS) == 3
