"""Laws of sampling: frequencies are chances, filters are transformers', a row draws for itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from lm import batch, decoding, parallel, steps, transformer
from lm.decoding import logits_processors

V, EOS, ROWS, DRAWS, LENGTH = 8, 1, 4000, 5, 3
# Log-probabilities by previous token; the start is 0. Nothing leads to eos.
LOGITS = np.random.default_rng(0).normal(0, 1.2, (V, V)).astype(np.float32)
LOGITS[:, EOS] = -np.inf


def table_step(token, cache):
    return jnp.asarray(LOGITS)[token], cache


def unmoved(cache, rows):
    return cache


@functools.cache
def sampled(words, seed=0):
    """ids int [ROWS, DRAWS, LENGTH] and scores of the Markov chain LOGITS."""
    how = decoding.parse(f"sample num_return_sequences={DRAWS} {words}")
    keys = jax.random.split(jax.random.key(seed), ROWS)
    search = functools.partial(
        decoding.search, table_step, None, jnp.zeros(ROWS, jnp.int32), unmoved, how
    )
    found = jax.jit(functools.partial(search, length=LENGTH, eos=EOS))(keys=keys)
    return jax.tree.map(np.asarray, found)


def chances(temperature=1.0, top_k=V, top_p=1.0):
    """The exact chances [previous, next], in plain Python."""
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


def check_frequencies(seen, expected):
    """What has no chance is never seen, and the rest passes a chi-square test."""
    count = np.bincount(np.ravel(seen), minlength=expected.size).reshape(expected.shape)
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
def test_frequencies_are_the_chances(words):
    check_frequencies(sampled(words).ids[:, :, 0], chances(**SAMPLES[words])[0])


@pytest.mark.parametrize("words", SAMPLES)
def test_later_tokens_walk_the_chain(words):
    table = chances(**SAMPLES[words])
    first, second, third = np.moveaxis(sampled(words).ids, -1, 0)
    check_frequencies(third, table[0] @ table @ table)
    check_frequencies(first * V + second, table[0][:, None] * table)


def test_draws_of_a_row_and_of_its_neighbour_are_independent():
    first, share = sampled("").ids[:, :, 0], chances()[0]
    for one, other in ((first[:, 3], first[:, 4]), (first[::2], first[1::2])):
        check_frequencies(one * V + other, np.outer(share, share))


def test_a_score_is_the_log_probability_of_the_model_itself():
    ids, scores = sampled("temperature=2 top_k=4 top_p=0.8")
    logs = LOGITS - scipy.special.logsumexp(LOGITS, axis=-1, keepdims=True)
    before = np.pad(ids, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    np.testing.assert_allclose(scores, logs[before, ids].sum(-1), rtol=1e-5)


@pytest.mark.parametrize("words", ["top_k=1", "top_p=0.000001", "temperature=0.001"])
def test_in_the_limit_a_sample_is_greedy(words):
    greedy = decoding.search(
        table_step,
        None,
        jnp.arange(V),
        unmoved,
        decoding.DecodingConfig(),
        length=LENGTH,
        eos=EOS,
    )
    how, keys = decoding.parse(f"sample {words}"), jax.random.split(jax.random.key(0), V)
    drawn = decoding.search(
        table_step, None, jnp.arange(V), unmoved, how, length=LENGTH, eos=EOS, keys=keys
    )
    np.testing.assert_array_equal(drawn.ids, greedy.ids)
    np.testing.assert_array_equal(drawn.scores, greedy.scores)


def test_a_sample_without_keys_is_refused():
    how = decoding.parse("sample")
    with pytest.raises(ValueError, match="'sample' requires keys; pass one for each row"):
        decoding.search(table_step, None, jnp.array([0]), unmoved, how, length=2, eos=EOS)


def made_logits(kind):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (64, 50)).astype(np.float32)
    if kind == "equals":
        logits = np.round(logits / 2) * 2  # few values, each many times
    if kind == "barred":
        logits[rng.random(logits.shape) < 0.5] = -np.inf
        logits[:8, 1:] = -np.inf  # one token is left
        logits[:8, 0] = 0.0
    return logits


@pytest.mark.parametrize("kind", ["plain", "equals", "barred"])
@pytest.mark.parametrize("count", [1, 2, 7, 49, 50, 1000])
def test_top_k_is_transformers(kind, count):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    logits = made_logits(kind)
    theirs = transformers.TopKLogitsWarper(count)(None, torch.tensor(logits))
    np.testing.assert_array_equal(logits_processors.top_k(jnp.asarray(logits), count), theirs)


@pytest.mark.parametrize("kind", ["plain", "equals", "barred"])
@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_transformers_but_that_equals_stay_together(kind, share):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    logits = made_logits(kind)
    theirs = transformers.TopPLogitsWarper(share)(None, torch.tensor(logits)).numpy()
    if (
        kind == "equals"
    ):  # theirs cuts through them as its sort, which need not be stable, left them
        least = np.where(theirs > -np.inf, theirs, np.inf).min(-1, keepdims=True)
        theirs = np.where(logits >= least, logits, -np.inf)
    np.testing.assert_array_equal(logits_processors.top_p(jnp.asarray(logits), share), theirs)


def test_top_p_tells_apart_what_is_nearly_equal():
    logits = 1e-5 * np.random.default_rng(2).permuted(np.tile(np.arange(50.0), (8, 1)), axis=1)
    kept = logits_processors.top_p(jnp.asarray(logits, jnp.float32), 0.51) > -np.inf
    np.testing.assert_array_equal(kept, logits > 23.5e-5)  # 26 of 50, each with a chance of 0.02


@pytest.mark.parametrize("kind", ["plain", "barred"])
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_the_repetition_penalty_is_transformers(kind, penalty):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    logits, said = made_logits(kind), np.random.default_rng(2).integers(0, 50, (64, 9))
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    theirs = theirs(torch.tensor(said), torch.tensor(logits))
    ours = logits_processors.penalize_repetition(jnp.asarray(logits), said, penalty)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("words", [
    "repetition_penalty=1.3 min_length=3",
    "temperature=0.6 top_k=20 top_p=0.9 repetition_penalty=1.2 min_length=4",
    "temperature=1.7 top_p=0.6 repetition_penalty=0.8",
])  # fmt: skip
@pytest.mark.parametrize("said", [0, 3, 5])
def test_all_rules_together_are_the_processors_of_generate_in_its_order(words, said):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    how, logits = decoding.parse(f"sample {words}"), made_logits("plain")
    rng = np.random.default_rng(3)
    ids, start = rng.integers(0, 50, (64, 6)).astype(np.int32), rng.integers(0, 50, 64)
    processors = [
        transformers.RepetitionPenaltyLogitsProcessor(how.repetition_penalty),
        transformers.MinLengthLogitsProcessor(how.min_length + 1, EOS),  # theirs counts the start
        transformers.TemperatureLogitsWarper(how.temperature),
        *([transformers.TopKLogitsWarper(how.top_k)] if how.top_k else []),
        transformers.TopPLogitsWarper(how.top_p),
    ]
    before = torch.tensor(np.concatenate([start[:, None], ids[:, :said]], axis=1))
    theirs = transformers.LogitsProcessorList(processors)(before, torch.tensor(logits))
    ours = logits_processors.process(
        jnp.asarray(logits), ids, jnp.asarray(start), jnp.array(said), how, EOS
    )
    ours = jax.nn.softmax(logits_processors.warp(ours, how))
    np.testing.assert_allclose(ours, theirs.softmax(-1), atol=1e-6)
    assert (np.asarray(ours)[:, EOS] > 0).any() == (said >= how.min_length)


@pytest.mark.parametrize("kind", ["plain", "equals", "barred"])
def test_the_likeliest_is_the_first_of_the_largest(kind):
    logits = made_logits(kind)
    np.testing.assert_array_equal(logits_processors.argmax(jnp.asarray(logits)), logits.argmax(-1))
    broken = logits_processors.argmax(jnp.full((2, 5), jnp.nan))
    assert ((broken >= 0) & (broken < 5)).all()  # a token all the same


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
MANY = 16


@pytest.fixture(scope="module")
def params():
    return steps.init_params(transformer.Transformer(CONFIG), 0)


def asked(order, width=7):
    """Rows `order` of one ragged set as a batch `width` wide, and their addresses; -1: no row."""
    rng, order = np.random.default_rng(4), np.array(order)
    mask = (np.arange(7) < rng.integers(1, 8, (MANY, 1))).astype(np.int32)
    inputs = rng.integers(2, 24, (MANY, 7)).astype(np.int32) * mask
    pick = lambda x: np.pad(x[order] * (order >= 0)[:, None], ((0, 0), (0, width - 7)))
    blank = np.zeros((len(order), 1), np.int32)
    examples = batch.Batch(pick(inputs), pick(mask), blank, blank)
    return examples, np.stack([np.full_like(order, 5), order], 1).astype(np.int32)


@functools.cache
def compiled(words, layout):
    """(strategy, decode_step of these words over it)."""
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
def whole(params):
    found = answer(params, *asked(range(MANY)))
    assert len(np.unique(found.ids.reshape(-1, 6), axis=0)) > 1.8 * MANY  # hardly two alike
    return found


def equal(found, expected):
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


@pytest.mark.parametrize("order, width", [(range(MANY)[::-1], 7), ([-1, 3, -1, 9, 0], 20)])
def test_what_a_row_draws_does_not_depend_on_the_batch_it_is_in(order, width, params, whole):
    found, order = answer(params, *asked(order, width)), np.array(order)
    rows = order >= 0
    equal(decoding.Hypotheses(*(x[rows] for x in found)),
          decoding.Hypotheses(*(x[order[rows]] for x in whole)))  # fmt: skip
    assert not found.ids[~rows].any() and not found.scores[~rows].any()


@pytest.mark.parametrize("layout", ["pmap", "mesh"])
def test_what_a_row_draws_does_not_depend_on_the_devices(layout, params, whole):
    equal(answer(params, *asked(range(MANY)), layout=layout), whole)


def test_more_draws_and_longer_answers_begin_with_the_same(params, whole):
    more = answer(
        params, *asked(range(MANY)), "sample temperature=2 num_return_sequences=3 max_length=9"
    )
    assert more.ids.shape == (MANY, 3, 9)
    np.testing.assert_array_equal(more.ids[:, :2, :6], whole.ids)


@pytest.mark.parametrize("column", [0, 1])
def test_another_seed_and_another_number_are_another_address(column, params, whole):
    examples, addresses = asked(range(MANY))
    addresses[:, column] += 100
    other = answer(params, examples, addresses)
    assert (other.ids != whole.ids).any(-1).mean() > 0.8
