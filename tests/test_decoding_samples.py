"""Laws of sampling: exact frequencies, transformers' processors, independence of the batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from lm import batch, cpu_kernels, decoding, parallel, steps, transformer
from lm.decoding import logits_processors

V, EOS, ROWS, DRAWS, LENGTH = 8, 1, 4000, 5, 3
# Log-probabilities by previous token, from 0; eos is impossible.
LOGITS = np.random.default_rng(0).normal(0, 1.2, (V, V)).astype(np.float32)
LOGITS[:, EOS] = -np.inf


def table_step(token, cache):
    return jnp.asarray(LOGITS)[token], cache


def no_gather(cache, rows):
    return cache


@functools.cache
def samples(words, seed=0):
    """Sample ids int [ROWS, DRAWS, LENGTH] and scores from the Markov chain LOGITS."""
    config = decoding.parse(f"sample num_return_sequences={DRAWS} {words}")
    keys = jax.random.split(jax.random.key(seed), ROWS)
    search = functools.partial(
        decoding.search, table_step, None, jnp.zeros(ROWS, jnp.int32), no_gather, config
    )
    hypotheses = jax.jit(functools.partial(search, length=LENGTH, eos=EOS))(keys=keys)
    return jax.tree.map(np.asarray, hypotheses)


def probabilities(temperature=1.0, top_k=V, top_p=1.0):
    """Compute the exact probabilities [previous, next] in plain Python."""
    table = np.zeros((V, V))
    for row, logits in zip(table, LOGITS.astype(float), strict=True):
        share = scipy.special.softmax(logits / temperature)
        order = sorted(range(V), key=lambda v: -share[v])[:top_k]
        share /= share[order].sum()
        mass = 0.0
        for v in order:
            if mass < top_p:
                row[v] = share[v]
            mass += share[v]
        row /= row.sum()
    return table


def check_frequencies(tokens, expected):
    """Check that impossible tokens never occur and the others pass a chi-square test."""
    count = np.bincount(np.ravel(tokens), minlength=expected.size).reshape(expected.shape)
    possible = expected > 0
    assert not count[~possible].any() and possible.sum() > 1
    assert scipy.stats.chisquare(count[possible], count.sum() * expected[possible]).pvalue > 1e-3


SAMPLES = {
    "": {},
    "temperature=0.5": {"temperature": 0.5},
    "temperature=3": {"temperature": 3.0},
    "top_k=3": {"top_k": 3},
    "top_p=0.7": {"top_p": 0.7},
    "temperature=2 top_k=4 top_p=0.8": {"temperature": 2.0, "top_k": 4, "top_p": 0.8},
}


@pytest.mark.parametrize("words", SAMPLES)
def test_frequencies_of_first_tokens_are_the_probabilities(words):
    check_frequencies(samples(words).ids[:, :, 0], probabilities(**SAMPLES[words])[0])


@pytest.mark.parametrize("words", SAMPLES)
def test_frequencies_of_later_tokens_are_those_of_the_chain(words):
    table = probabilities(**SAMPLES[words])
    first, second, third = np.moveaxis(samples(words).ids, -1, 0)
    check_frequencies(third, table[0] @ table @ table)
    check_frequencies(first * V + second, table[0][:, None] * table)


def test_samples_of_a_row_and_of_neighbouring_rows_are_independent():
    first, share = samples("").ids[:, :, 0], probabilities()[0]
    for x, y in ((first[:, 3], first[:, 4]), (first[::2], first[1::2])):
        check_frequencies(x * V + y, np.outer(share, share))


def test_a_score_is_the_log_probability_before_all_processors():
    ids, scores = samples("temperature=2 top_k=4 top_p=0.8")
    logs = LOGITS - scipy.special.logsumexp(LOGITS, axis=-1, keepdims=True)
    before = np.pad(ids, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    np.testing.assert_allclose(scores, logs[before, ids].sum(-1), rtol=1e-5)


@pytest.mark.parametrize("words", ["top_k=1", "top_p=0.000001", "temperature=0.001"])
def test_in_the_limit_sampling_is_greedy(words):
    greedy = decoding.search(
        table_step,
        None,
        jnp.arange(V),
        no_gather,
        decoding.DecodingConfig(),
        length=LENGTH,
        eos=EOS,
    )
    config, keys = decoding.parse(f"sample {words}"), jax.random.split(jax.random.key(0), V)
    actual = decoding.search(
        table_step, None, jnp.arange(V), no_gather, config, length=LENGTH, eos=EOS, keys=keys
    )
    np.testing.assert_array_equal(actual.ids, greedy.ids)
    np.testing.assert_array_equal(actual.scores, greedy.scores)


def test_a_sample_without_keys_is_refused():
    config = decoding.parse("sample")
    with pytest.raises(ValueError, match="'sample' requires keys; pass one for each row"):
        decoding.search(table_step, None, jnp.array([0]), no_gather, config, length=2, eos=EOS)


def random_logits(kind):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (64, 50)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits / 2) * 2  # few values, each repeated
    if kind == "impossible":
        logits[rng.random(logits.shape) < 0.5] = -np.inf
        logits[:8, 1:] = -np.inf  # a single possible token
        logits[:8, 0] = 0.0
    return logits


@pytest.mark.parametrize("kind", ["plain", "ties", "impossible"])
@pytest.mark.parametrize("count", [1, 2, 7, 49, 50, 1000])
def test_top_k_equals_transformers(kind, count):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    logits = random_logits(kind)
    expected_logits = transformers.TopKLogitsWarper(count)(None, torch.tensor(logits))
    np.testing.assert_array_equal(
        logits_processors.top_k(jnp.asarray(logits), count), expected_logits
    )


@pytest.mark.parametrize("kind", ["plain", "ties", "impossible"])
@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers_except_for_ties(kind, share):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    logits = random_logits(kind)
    expected_logits = transformers.TopPLogitsWarper(share)(None, torch.tensor(logits)).numpy()
    if kind == "ties":  # transformers splits ties in the order of an unstable sort
        least = np.where(expected_logits > -np.inf, expected_logits, np.inf).min(-1, keepdims=True)
        expected_logits = np.where(logits >= least, logits, -np.inf)
    np.testing.assert_array_equal(cpu_kernels.top_p(jnp.asarray(logits), share), expected_logits)


def test_top_p_separates_nearly_equal_probabilities():
    logits = 1e-5 * np.random.default_rng(2).permuted(np.tile(np.arange(50.0), (8, 1)), axis=1)
    is_finite = cpu_kernels.top_p(jnp.asarray(logits, jnp.float32), 0.51) > -np.inf
    np.testing.assert_array_equal(
        is_finite, logits > 23.5e-5
    )  # 26 of 50 tokens, probability 0.02 each


@pytest.mark.parametrize("kind", ["plain", "impossible"])
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_the_repetition_penalty_equals_transformers(kind, penalty):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    logits, previous = random_logits(kind), np.random.default_rng(2).integers(0, 50, (64, 9))
    expected_logits = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected_logits = expected_logits(torch.tensor(previous), torch.tensor(logits))
    actual = logits_processors.penalize_repetition(jnp.asarray(logits), previous, penalty)
    np.testing.assert_allclose(actual, expected_logits, rtol=1e-6)


@pytest.mark.parametrize("words", [
    "repetition_penalty=1.3 min_length=3",
    "temperature=0.6 top_k=20 top_p=0.9 repetition_penalty=1.2 min_length=4",
    "temperature=1.7 top_p=0.6 repetition_penalty=0.8",
])  # fmt: skip
@pytest.mark.parametrize("count", [0, 3, 5])
def test_all_processors_together_equal_those_of_generate(words, count):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config, logits = decoding.parse(f"sample {words}"), random_logits("plain")
    rng = np.random.default_rng(3)
    ids, start = rng.integers(0, 50, (64, 6)).astype(np.int32), rng.integers(0, 50, 64)
    processors = [
        transformers.RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
        transformers.MinLengthLogitsProcessor(
            config.min_length + 1, EOS
        ),  # transformers counts the start token
        transformers.TemperatureLogitsWarper(config.temperature),
        *([transformers.TopKLogitsWarper(config.top_k)] if config.top_k else []),
        transformers.TopPLogitsWarper(config.top_p),
    ]
    before = torch.tensor(np.concatenate([start[:, None], ids[:, :count]], axis=1))
    expected_logits = transformers.LogitsProcessorList(processors)(before, torch.tensor(logits))
    actual = logits_processors.process(
        jnp.asarray(logits), ids, jnp.asarray(start), jnp.array(count), config, EOS
    )
    actual = jax.nn.softmax(logits_processors.warp(actual, config))
    np.testing.assert_allclose(actual, expected_logits.softmax(-1), atol=1e-6)
    assert (np.asarray(actual)[:, EOS] > 0).any() == (count >= config.min_length)


@pytest.mark.parametrize("kind", ["plain", "ties", "impossible"])
def test_argmax_is_the_first_of_the_largest(kind):
    logits = random_logits(kind)
    np.testing.assert_array_equal(cpu_kernels.argmax(jnp.asarray(logits)), logits.argmax(-1))
    of_nan = cpu_kernels.argmax(jnp.full((2, 5), jnp.nan))
    assert ((of_nan >= 0) & (of_nan < 5)).all()


CONFIG = transformer.ModelConfig(
    vocab_size=24,
    d_model=16,
    d_ff=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
NUM_INPUTS = 16


@pytest.fixture(scope="module")
def params():
    return steps.init_params(transformer.Transformer(CONFIG), 0)


def make_batch(order, width=7):
    """Return rows `order` of NUM_INPUTS inputs as a batch, and addresses; -1: an empty row."""
    rng, order = np.random.default_rng(4), np.array(order)
    mask = (np.arange(7) < rng.integers(1, 8, (NUM_INPUTS, 1))).astype(np.int32)
    inputs = rng.integers(2, 24, (NUM_INPUTS, 7)).astype(np.int32) * mask
    pick = lambda x: np.pad(x[order] * (order >= 0)[:, None], ((0, 0), (0, width - 7)))
    blank = np.zeros((len(order), 1), np.int32)
    examples = batch.Batch(pick(inputs), pick(mask), blank, blank)
    return examples, np.stack([np.full_like(order, 5), order], 1).astype(np.int32)


@functools.cache
def compiled(words, layout):
    """Return (strategy, compiled decode_step)."""
    devices = jax.devices()[: 8 if layout else 1]
    strategy = parallel.make_strategy(LAYOUTS[layout], devices)
    model = transformer.Transformer(CONFIG, strategy.shard_activations)
    options = dict(model=model, length=6, eos=EOS, config=decoding.parse(words))
    return strategy, strategy.compile(functools.partial(steps.decode_step, **options))


LAYOUTS = {
    "": parallel.ParallelConfig(),
    "pmap": parallel.ParallelConfig(),
    "mesh": parallel.ParallelConfig(strategy="mesh", fsdp=2, tensor=2),
}


def answer(
    params, examples, addresses, words="sample temperature=2 num_return_sequences=2", layout=""
):
    strategy, step = compiled(words, layout)
    placed = strategy.place_batch((examples, addresses))
    return strategy.fetch_rows(step(strategy.place_state(params), *placed))


@pytest.fixture(scope="module")
def expected(params):
    hypotheses = answer(params, *make_batch(range(NUM_INPUTS)))
    assert len(np.unique(hypotheses.ids.reshape(-1, 6), axis=0)) > 1.8 * NUM_INPUTS
    return hypotheses


def assert_equal(actual, expected):
    np.testing.assert_array_equal(actual.ids, expected.ids)
    np.testing.assert_allclose(actual.scores, expected.scores, rtol=1e-5)


@pytest.mark.parametrize("order, width", [(range(NUM_INPUTS)[::-1], 7), ([-1, 3, -1, 9, 0], 20)])
def test_the_samples_of_a_row_do_not_depend_on_the_batch(order, width, params, expected):
    actual, order = answer(params, *make_batch(order, width)), np.array(order)
    rows = order >= 0
    assert_equal(decoding.Hypotheses(*(x[rows] for x in actual)),
          decoding.Hypotheses(*(x[order[rows]] for x in expected)))  # fmt: skip
    assert not actual.ids[~rows].any() and not actual.scores[~rows].any()


@pytest.mark.parametrize("layout", ["pmap", "mesh"])
def test_the_samples_of_a_row_do_not_depend_on_the_devices(layout, params, expected):
    assert_equal(answer(params, *make_batch(range(NUM_INPUTS)), layout=layout), expected)


def test_more_samples_and_longer_answers_start_with_the_same_tokens(params, expected):
    longer = answer(
        params,
        *make_batch(range(NUM_INPUTS)),
        "sample temperature=2 num_return_sequences=3 max_length=9",
    )
    assert longer.ids.shape == (NUM_INPUTS, 3, 9)
    np.testing.assert_array_equal(longer.ids[:, :2, :6], expected.ids)


@pytest.mark.parametrize("column", [0, 1])
def test_other_seeds_and_row_numbers_give_other_samples(column, params, expected):
    examples, addresses = make_batch(range(NUM_INPUTS))
    addresses[:, column] += 100
    actual = answer(params, examples, addresses)
    assert (actual.ids != expected.ids).any(-1).mean() > 0.8
