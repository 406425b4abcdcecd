"""Laws of search on hand-written and random Markov chains, without a model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import decoding

EOS = 1
# Next-token probabilities by previous token, from 0. Greedy: 0 2 4 1; the most probable: 0 3 1.
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


def no_gather(cache, rows):
    return cache


def search_chain(step, cache, start, length, words="greedy"):
    """Search with a step that ignores the rows of the cache."""
    config, start = decoding.parse(words), jnp.asarray(start)
    return decoding.search(step, cache, start, no_gather, config, length=length, eos=EOS)


def greedy(step, cache, start, length, words="greedy"):
    """Return the ids of greedy answers, int [B, length]."""
    return search_chain(step, cache, start, length, words).ids[:, 0]


def greedy_in_python(table, start, length, repetition=1.0, min_length=0):
    """Search greedily in plain Python over logits [time, previous, next]: (padded ids, score).

    The processors change the chosen token, not its score.
    """
    answer, score, previous = [], 0.0, {start}
    for time in range(length):
        logits = table[time, [start, *answer][-1]]
        processed = logits.copy()
        for token in previous:
            processed[token] *= repetition if logits[token] < 0 else 1 / repetition
        processed[EOS] = -np.inf if time < min_length else processed[EOS]
        answer.append(int(np.argmax(processed)))
        previous.add(answer[-1])
        score += logits[answer[-1]] - np.log(np.exp(logits).sum())
        if answer[-1] == EOS:
            break
    return padded(answer, length), score


def test_greedy_follows_the_most_probable_next_tokens():
    answers = greedy(chain_step, None, [0, 2, 3, 4], 6)
    expected = [[2, 4, 1, 0, 0, 0], [4, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(answers, expected)
    assert answers.dtype == jnp.int32


PROCESSORS = [  # repetition_penalty, min_length
    (1.0, 0),
    (1.5, 0),
    (0.7, 3),
    (3.0, 9),
]


@pytest.mark.parametrize("repetition, min_length", PROCESSORS)
@pytest.mark.parametrize("length", [1, 9])
def test_greedy_equals_a_loop_in_plain_python(length, repetition, min_length):
    table = np.random.default_rng(length).normal(size=(9, 40, 40))
    table[..., EOS] += 1.0
    step = lambda token, time: (jnp.asarray(table)[time, token], time + 1)  # the cache is the time
    min_length = min(min_length, length)
    words = f"greedy repetition_penalty={repetition} min_length={min_length}"
    ids, scores = search_chain(step, jnp.array(0), np.arange(40), length, words)
    expected = [
        greedy_in_python(table, start, length, repetition, min_length) for start in range(40)
    ]
    assert ids[:, 0].tolist() == [answer for answer, _ in expected]
    np.testing.assert_allclose(scores[:, 0], [score for _, score in expected], rtol=1e-5)


def test_a_greedy_row_does_not_depend_on_other_rows():
    together = greedy(chain_step, None, [0, 3, 4], 5)
    for row, start in zip(together, (0, 3, 4), strict=True):
        np.testing.assert_array_equal(greedy(chain_step, None, [start], 5)[0], row)


def counting(step):
    """Return (the same step, a list that grows with each call)."""
    calls = []

    def counted(token, cache):
        jax.debug.callback(lambda: calls.append(1))
        return step(token, cache)

    return counted, calls


@pytest.mark.parametrize(
    "starts, calls", [([3], 1), ([3, 4], 1), ([4, 2], 2), ([3, 0], 3), ([3, -1], 1), ([-1], 0)]
)
def test_search_ends_with_the_longest_answer(starts, calls):
    step, counted = counting(chain_step)
    jax.block_until_ready(search_chain(step, None, starts, 50))
    jax.effects_barrier()
    assert len(counted) == calls


@pytest.mark.parametrize(
    "words, score", [("greedy", 0.0), ("beam num_beams=3 num_return_sequences=3", -np.inf)]
)
def test_an_empty_row_has_an_empty_answer(words, score):
    ids, scores = search_chain(chain_step, None, [-1, 0, -1], 5, words)
    assert not ids[::2].any() and ids[1, 0].any()
    assert (scores[::2] == score).all()


def test_search_ends_at_the_length_if_no_row_ends():
    forever = lambda token, cache: (jnp.tile(jnp.array([0.0, 0.0, 1.0]), (2, 1)), cache)
    np.testing.assert_array_equal(greedy(forever, None, [0, 0], 4), np.full((2, 4), 2))


def test_a_tie_goes_to_the_first_token():
    equal = lambda token, cache: (jnp.zeros((1, 5)).at[:, 3:].set(1.0), cache)
    assert greedy(equal, None, [0], 1) == 3


@pytest.mark.parametrize(
    "words", ["greedy min_length=3", "sample temperature=2 num_return_sequences=3"]
)
def test_decode_token_repeated_equals_search(words):
    config, start = decoding.parse(words), jnp.array([0, 2, 4, -1])
    keys = jax.random.split(jax.random.key(0), 4)
    at_once = decoding.search(
        chain_step, None, start, no_gather, config, length=6, eos=EOS, keys=keys
    )
    state = decoding.init_state(None, start, no_gather, config, length=6, keys=keys)
    advance = jax.jit(functools.partial(decoding.decode_token, chain_step, config=config, eos=EOS))
    while state.i < 6 and not state.done.all():
        before, state = state, advance(state)
        np.testing.assert_array_equal(state.ids[:, before.i], state.token)
    np.testing.assert_array_equal(state.ids, at_once.ids.reshape(-1, 6))
    np.testing.assert_array_equal(state.scores, at_once.scores.reshape(-1))


V = 6


def random_chains(seed, rows, length, sharpness=2.0):
    """Return log-probabilities [rows, time, token before the previous, previous, next]."""
    logits = np.random.default_rng(seed).normal(0, sharpness, (rows, length, V, V, V))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnames=("config", "length"))
def compiled_search(chains, config, length):
    def step(token, cache):
        time, row, before = cache
        logits = chains[row, time, before, token] + token[:, None]  # unnormalized
        return logits, (time + 1, row, token)

    def gather(cache, rows):
        time, *arrays = cache
        return time, *(array[rows] for array in arrays)

    start = jnp.zeros(len(chains), jnp.int32)
    cache = (jnp.array(0), jnp.arange(len(chains)), start)
    keys = jax.random.split(jax.random.key(0), len(chains))
    return decoding.search(step, cache, start, gather, config, length=length, eos=EOS, keys=keys)


def search(chains, words, length):
    """Search over random_chains; the cache is the time, the row's chain and the token before."""
    return compiled_search(chains, decoding.parse(words), length)


def next_logs(chain, config, ids):
    """Return processed log-probabilities [V] of the token after `ids`."""
    logs = chain[len(ids), *(0, 0, *ids)[-2:]].copy()
    logs[sorted({0, *ids})] *= config.repetition_penalty  # log-probabilities are negative
    logs[EOS] = -np.inf if len(ids) < config.min_length else logs[EOS]
    return logs


def log_probability(chain, config, ids):
    return sum(next_logs(chain, config, ids[:time])[token] for time, token in enumerate(ids))


def penalty(config, length):
    return (
        (5 + length) / 6 if config.length_penalty_kind == "google" else length
    ) ** config.length_penalty


def padded(ids, length):
    return [*ids, *[0] * (length - len(ids))]


def all_answers(chain, config, length, ids=(), total=0.0):
    """List all (score, ids) of a chain, unordered, ended by eos or by the length."""
    if ids[-1:] == (EOS,) or len(ids) == length:
        return [(total / penalty(config, len(ids)), ids)]
    logs = next_logs(chain, config, ids)
    extensions = [all_answers(chain, config, length, (*ids, v), total + logs[v]) for v in range(V)]
    return [answer for answers in extensions for answer in answers if answer[0] > -np.inf]


def beam_in_python(chain, config, length):
    """Search by beams in plain Python, with lists: [(score, ids)], best first."""
    live, ended = [(0.0, ())], []
    for time in range(1, length + 1):
        longer = []
        for total, ids in live:
            logs = next_logs(chain, config, ids)
            longer += [(total + logs[v], (*ids, v)) for v in range(V) if logs[v] > -np.inf]
        longer = sorted(longer, reverse=True)[: 2 * config.num_beams]
        ends = [ids[-1] == EOS or time == length for _, ids in longer]
        for (total, ids), end in list(zip(longer, ends, strict=True))[: config.num_beams]:
            ended += [(total / penalty(config, time), ids)] if end else []
        ended = sorted(ended, reverse=True)[: config.num_beams]
        live = [beam for beam, end in zip(longer, ends, strict=True) if not end][: config.num_beams]
        if not live:
            break
        hopeless = live[0][0] / penalty(config, time) <= ended[-1][0] if ended else False
        if len(ended) == config.num_beams and (config.early_stopping or hopeless):
            break
    return ended


LENGTH_PENALTIES = [
    "length_penalty=0",
    "length_penalty=0.6",
    "length_penalty=1 length_penalty_kind=power",
    "length_penalty=2 length_penalty_kind=power",
]
PROCESSED = [
    "repetition_penalty=1.4",
    "min_length=2",
    "repetition_penalty=0.5 min_length=3 length_penalty=0 length_penalty_kind=power",
]


def test_a_beam_finds_a_better_answer_than_greedy():
    ids, scores = search_chain(chain_step, None, [0, 3], 6, "beam num_beams=2 length_penalty=0")
    np.testing.assert_array_equal(ids[:, 0], [[3, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(scores[:, 0], np.log([0.4, 1.0]), atol=1e-6)
    assert ids.dtype == jnp.int32 and scores.dtype == jnp.float32


@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize("stop", [False, True])
def test_one_beam_equals_greedy(alpha, stop):
    chains = random_chains(0, rows=300, length=7)
    ids, _ = search(chains, f"beam num_beams=1 length_penalty={alpha} early_stopping={stop}", 7)
    expected = search(chains, "greedy", 7)
    np.testing.assert_array_equal(ids, expected.ids)


def test_samples_of_a_row_use_the_cache_of_the_row():
    chains = random_chains(1, rows=20, length=5)
    expected = search(chains, "greedy", 5)
    samples = search(chains, "sample top_k=1 num_return_sequences=3", 5)
    np.testing.assert_array_equal(samples.ids, np.repeat(expected.ids, 3, axis=1))
    np.testing.assert_array_equal(samples.scores, np.repeat(expected.scores, 3, axis=1))


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize(
    "words", ["length_penalty=0.6", "length_penalty=2 length_penalty_kind=power", *PROCESSED]
)
def test_as_many_beams_as_prefixes_find_the_optimum(words, length):
    chains = random_chains(length, rows=10, length=length)
    words = f"beam num_beams={V ** (length - 1)} {words}"
    ids, scores = search(chains, words, length)
    assert ids.shape == (10, 1, length)
    for chain, first, score in zip(chains, ids[:, 0], scores[:, 0], strict=True):
        optimum = max(all_answers(chain, decoding.parse(words), length))
        assert first.tolist() == padded(optimum[1], length)
        np.testing.assert_allclose(score, optimum[0], rtol=1e-5)


@pytest.mark.parametrize(
    "words", ["length_penalty=0.6", "length_penalty=2 length_penalty_kind=power"]
)
def test_as_many_beams_as_answers_rank_all_answers(words):
    chains = random_chains(5, rows=10, length=3)
    # There are 1 + 5 + 5 * 5 * 6 answers.
    words = f"beam num_beams=200 num_return_sequences=200 {words}"
    ids, scores = search(chains, words, 3)
    for chain, actual, score in zip(chains, ids, scores, strict=True):
        answers = sorted(all_answers(chain, decoding.parse(words), 3), reverse=True)
        assert len(answers) == 156
        assert actual[:156].tolist() == [padded(ids, 3) for _, ids in answers]
        np.testing.assert_allclose(score[:156], [score for score, _ in answers], rtol=1e-5)
        assert not actual[156:].any() and (score[156:] == -np.inf).all()


@pytest.mark.parametrize("words", LENGTH_PENALTIES + PROCESSED)
@pytest.mark.parametrize("width, stop", [(2, False), (5, True)])
def test_beams_equal_a_search_in_plain_python(width, stop, words):
    chains = random_chains(width, rows=100, length=6)
    words = f"beam num_beams={width} num_return_sequences={width} early_stopping={stop} {words}"
    ids, scores = search(chains, words, 6)
    for chain, actual, score in zip(chains, ids, scores, strict=True):
        answers = beam_in_python(chain, decoding.parse(words), 6)
        assert actual.tolist() == [padded(ids, 6) for _, ids in answers]
        np.testing.assert_allclose(score, [score for score, _ in answers], rtol=1e-5)


def test_fewer_returned_answers_are_the_first_of_more():
    chains = random_chains(6, rows=50, length=6)
    expected = search(chains, "beam num_beams=5 num_return_sequences=5", 6)
    for count in (1, 3):
        actual = search(chains, f"beam num_beams=5 num_return_sequences={count}", 6)
        np.testing.assert_array_equal(actual.ids, expected.ids[:, :count])
        np.testing.assert_array_equal(actual.scores, expected.scores[:, :count])


def test_a_beam_score_is_the_sum_of_log_probabilities_over_the_penalty():
    chains = random_chains(8, rows=50, length=6)
    words = "beam num_beams=4 num_return_sequences=4 length_penalty_kind=power"
    for chain, answers, scores in zip(chains, *search(chains, words, 6), strict=True):
        assert (np.diff(scores) <= 0).all()
        for row, score in zip(answers.tolist(), scores, strict=True):
            ids = row[: row.index(EOS) + 1] if EOS in row else row
            assert row == padded(ids, 6)
            total = log_probability(chain, decoding.parse(words), ids)
            np.testing.assert_allclose(score, total / len(ids) ** 0.6, rtol=1e-5)


@pytest.mark.parametrize("stop", [False, True])
def test_the_beams_of_a_row_do_not_depend_on_other_rows(stop):
    chains = random_chains(3, rows=12, length=8, sharpness=3.0)
    words = "beam num_beams=3 num_return_sequences=3 length_penalty=1 "
    words += f"length_penalty_kind=power early_stopping={stop}"
    together = search(chains, words, 8)
    lengths = np.argmax(np.asarray(together.ids) == EOS, -1).max(-1)
    assert len(set(lengths.tolist())) > 2  # rows end at different times
    for row in range(len(chains)):
        alone = search(chains[row : row + 1], words, 8)
        np.testing.assert_array_equal(alone.ids[0], together.ids[row])
        np.testing.assert_array_equal(alone.scores[0], together.scores[row])


@pytest.mark.slow
@pytest.mark.parametrize(
    "starts, words, calls",
    [
        ([3], "length_penalty=1", 1),  # one answer has all the probability
        ([4], "length_penalty=1 early_stopping=True", 2),  # 1 and 2 1 have ended
        ([4], "length_penalty=1", 3),  # 2 4 beat 2 1; 2 4 2 is worse than 2 3 1
        ([0], "length_penalty=0 early_stopping=True", 3),  # 3 1 and 2 3 1 have ended
        ([3, 0], "length_penalty=0 early_stopping=True", 3),
        ([3, -1], "length_penalty=1", 1),
    ],
)
def test_beam_search_ends_with_the_last_row(starts, words, calls):
    step, counted = counting(chain_step)
    words = f"beam num_beams=2 length_penalty_kind=power {words}"
    jax.block_until_ready(search_chain(step, None, starts, 50, words))
    jax.effects_barrier()
    assert len(counted) == calls
