"""Laws of search, on chains written by hand and on random ones; no model is needed."""

from __future__ import annotations

import functools

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


V = 6


def random_chains(seed, rows, length, sharpness=2.0):
    """Log-probabilities [rows, time, token before the previous, previous, next]."""
    logits = np.random.default_rng(seed).normal(0, sharpness, (rows, length, V, V, V))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnames=("config", "length", "pad"))
def search(chains, config, length, pad=0):
    """Beams over random_chains; the cache is a clock, the row's chain and the token before."""

    def step(token, cache):
        time, row, before = cache
        logits = chains[row, time, before, token] + token[:, None]  # logits, not yet normalised
        return logits, (time + 1, row, token)

    def take(cache, rows):
        time, *moved = cache
        return time, *(leaf[rows] for leaf in moved)

    start = jnp.zeros(len(chains), jnp.int32)
    cache = (jnp.array(0), jnp.arange(len(chains)), start)
    return decoding.beam(step, cache, start, take, config, length=length, eos=EOS, pad=pad)


def unmoved(cache, rows):
    return cache


def log_probability(chain, ids):
    before, previous, total = 0, 0, 0.0
    for time, token in enumerate(ids):
        total += chain[time, before, previous, token]
        before, previous = previous, token
    return total


def penalty(config, length):
    return ((5 + length) / 6 if config.penalty == "google" else length) ** config.alpha


def padded(ids, length, pad=0):
    return [*ids, *[pad] * (length - len(ids))]


def every_answer(chain, config, length, ids=()):
    """All (score, ids) of a chain, in no order: those with eos, and those cut at the length."""
    if ids[-1:] == (EOS,) or len(ids) == length:
        return [(log_probability(chain, ids) / penalty(config, len(ids)), ids)]
    return [a for v in range(V) for a in every_answer(chain, config, length, (*ids, v))]


def beam_by_hand(chain, config, length):
    """Beam search in plain Python, with lists that grow and shrink: [(score, ids)], best first."""
    live, ended = [(0.0, ())], []
    for time in range(1, length + 1):
        longer = []
        for total, ids in live:
            before, previous = (0, 0, *ids)[-2:]
            for token, more in enumerate(chain[time - 1, before, previous]):
                longer.append((total + more, (*ids, token)))
        longer = sorted(longer, reverse=True)[: 2 * config.width]
        ends = [ids[-1] == EOS or time == length for _, ids in longer]
        for (total, ids), end in list(zip(longer, ends, strict=True))[: config.width]:
            ended += [(total / penalty(config, time), ids)] if end else []
        ended = sorted(ended, reverse=True)[: config.width]
        live = [one for one, end in zip(longer, ends, strict=True) if not end][: config.width]
        if not live:
            break
        hopeless = live[0][0] / penalty(config, time) <= ended[-1][0] if ended else False
        if len(ended) == config.width and (config.stop == "full" or hopeless):
            break
    return ended


ALPHAS = [(0.0, "power"), (0.6, "google"), (1.0, "power"), (2.0, "power")]


def test_a_beam_finds_the_best_path_that_greedy_misses():
    config = decoding.BeamConfig(width=2, alpha=0.0)
    ids, scores = decoding.beam(
        chain_step, None, jnp.array([0, 3]), unmoved, config, length=6, eos=EOS
    )
    np.testing.assert_array_equal(ids[:, 0], [[3, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(scores[:, 0], np.log([0.4, 1.0]), atol=1e-6)
    assert ids.dtype == jnp.int32 and scores.dtype == jnp.float32


@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize("stop", ["bound", "full"])
def test_one_beam_is_greedy(alpha, stop):
    chains = random_chains(0, rows=300, length=7)
    config = decoding.BeamConfig(1, alpha, stop=stop)
    ids, _ = search(chains, config, 7)
    table = jnp.asarray(chains)

    def step(token, cache):
        time, before = cache
        return table[jnp.arange(len(chains)), time, before, token], (time + 1, token)

    start = jnp.zeros(len(chains), jnp.int32)
    greedy = decoding.greedy(step, (jnp.array(0), start), start, length=7, eos=EOS)
    np.testing.assert_array_equal(ids[:, 0], greedy)


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("alpha, kind", ALPHAS)
def test_beams_enough_for_every_beginning_find_the_optimum(alpha, kind, length):
    chains = random_chains(length, rows=40, length=length)
    config = decoding.BeamConfig(V ** (length - 1), alpha, kind)
    ids, scores = search(chains, config, length)
    for chain, found, score in zip(chains, ids[:, 0], scores[:, 0], strict=True):
        optimum = max(every_answer(chain, config, length))
        assert found.tolist() == padded(optimum[1], length)
        np.testing.assert_allclose(score, optimum[0], rtol=1e-5)


@pytest.mark.parametrize("alpha, kind", ALPHAS)
def test_beams_enough_for_every_answer_rank_them_all(alpha, kind):
    chains = random_chains(5, rows=20, length=3)
    config = decoding.BeamConfig(200, alpha, kind)  # of which 1 + 5 + 5 * 5 * 6 are filled
    ids, scores = search(chains, config, 3, pad=9)
    for chain, found, score in zip(chains, ids, scores, strict=True):
        answers = sorted(every_answer(chain, config, 3), reverse=True)
        assert len(answers) == 156
        assert found[:156].tolist() == [padded(ids, 3, 9) for _, ids in answers]
        np.testing.assert_allclose(score[:156], [score for score, _ in answers], rtol=1e-5)
        assert (found[156:] == 9).all() and (score[156:] == -np.inf).all()


@pytest.mark.parametrize("alpha, kind", ALPHAS)
@pytest.mark.parametrize("stop", ["bound", "full"])
@pytest.mark.parametrize("width", [2, 5])
def test_beams_are_the_search_one_would_write_by_hand(width, stop, alpha, kind):
    chains = random_chains(width, rows=200, length=6)
    config = decoding.BeamConfig(width, alpha, kind, stop)
    ids, scores = search(chains, config, 6)
    for chain, found, score in zip(chains, ids, scores, strict=True):
        answers = beam_by_hand(chain, config, 6)
        assert found.tolist() == [padded(ids, 6) for _, ids in answers]
        np.testing.assert_allclose(score, [score for score, _ in answers], rtol=1e-5)


def test_a_score_is_the_sum_of_log_probabilities_over_the_penalty():
    chains = random_chains(8, rows=50, length=6)
    config = decoding.BeamConfig(4, 0.6)
    for chain, answers, scores in zip(chains, *search(chains, config, 6, pad=-1), strict=True):
        assert (np.diff(scores) <= 0).all()
        for row, score in zip(answers.tolist(), scores, strict=True):
            ids = row[: row.index(EOS) + 1] if EOS in row else row
            assert row == padded(ids, 6, -1)
            np.testing.assert_allclose(
                score, log_probability(chain, ids) / len(ids) ** 0.6, rtol=1e-5
            )


@pytest.mark.parametrize("stop", ["bound", "full"])
def test_the_beams_of_a_row_do_not_depend_on_its_neighbours(stop):
    chains = random_chains(3, rows=12, length=8, sharpness=3.0)
    config = decoding.BeamConfig(3, 1.0, stop=stop)
    together = search(chains, config, 8)
    lengths = np.argmax(np.asarray(together.ids) == EOS, -1).max(-1)
    assert len(set(lengths.tolist())) > 2  # they end at different times
    for row in range(len(chains)):
        alone = search(chains[row : row + 1], config, 8)
        np.testing.assert_array_equal(alone.ids[0], together.ids[row])
        np.testing.assert_array_equal(alone.scores[0], together.scores[row])


@pytest.mark.parametrize(
    "starts, alpha, stop, calls",
    [
        ([3], 1.0, "bound", 1),  # one answer has all the probability: no beam is left
        ([4], 1.0, "full", 2),  # 1 and 2 1 have ended
        ([4], 1.0, "bound", 3),  # 2 4 was likelier than 2 1, 2 4 2 is less likely than 2 3 1
        ([0], 0.0, "full", 3),  # 3 1 and 2 3 1 have ended
        ([3, 0], 0.0, "full", 3),
    ],
)
def test_a_beam_stops_with_the_last_row(starts, alpha, stop, calls):
    counted = []

    def step(token, cache):
        jax.debug.callback(lambda: counted.append(1))
        return chain_step(token, cache)

    config = decoding.BeamConfig(2, alpha, stop=stop)
    start = jnp.array(starts)
    jax.block_until_ready(decoding.beam(step, None, start, unmoved, config, length=50, eos=EOS))
    jax.effects_barrier()
    assert len(counted) == calls


def test_a_search_that_cannot_be_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="beam.width=0 is too small; use 1"):
        decoding.BeamConfig(width=0)
    with pytest.raises(ValueError, match="beam.penalty='gogle' is unknown; choose one of google"):
        decoding.BeamConfig(penalty="gogle")
    with pytest.raises(ValueError, match="beam.stop='early' is unknown; choose one of bound, full"):
        decoding.BeamConfig(stop="early")
