"""Laws of attention: exact buckets, exact sums, and no influence of masked keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import attention, cpu_kernels
from tests.models import exact_bucket  # noqa: F401

# buckets, limit: T5's, and others that a config may choose.
BINS = [(32, 128), (32, 256), (64, 512), (16, 32), (8, 20), (32, 1000), (128, 1000), (4, 5)]
both_ways = pytest.mark.parametrize("bidirectional", [True, False])


def as_float64(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def reference(query, key, value, mask, bias):
    """Attention by loops over queries and heads, in float64."""
    query, key, value, bias = as_float64(query, key, value, bias)
    (rows, length, heads, _), groups = query.shape, key.shape[2]
    out = np.zeros(query.shape)
    for b in range(rows):
        for t in range(length):
            for n in range(heads):
                visible, g = np.flatnonzero(mask[b, t]), n // (heads // groups)
                scores = key[b, visible, g] @ query[b, t, n] + bias[n, t, visible]
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ value[b, visible, g] / weights.sum()
    return out


def problem(groups, heads=4, rows=2, queries=5, keys=7, width=3, seed=0):
    """Random query, key, value, mask (each query has a visible key) and bias."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask = rng.random((rows, queries, keys)) < 0.5
    mask[:, :, 2] = True
    key, value = draw(rows, keys, groups, width), draw(rows, keys, groups, width)
    return draw(rows, queries, heads, width), key, value, mask, draw(heads, queries, keys)


# Distances, segments, buckets. ---------------------------------------------------------------


def test_distance_counts_from_the_query_to_the_key():
    for start in (0, 3):
        expected = [[s - (t + start) for s in range(6)] for t in range(4)]
        np.testing.assert_array_equal(attention.distance(4, 6, start), expected)


def test_the_mask_is_true_within_a_segment_and_false_for_padding():
    rng = np.random.default_rng(0)
    queries, keys = rng.integers(0, 3, (4, 9)), rng.integers(0, 3, (4, 8))
    mask = attention.same_segment(jnp.asarray(queries), jnp.asarray(keys))
    for b, t, s in np.ndindex(mask.shape):
        assert mask[b, t, s] == (queries[b, t] == keys[b, s] != 0)


@both_ways
@pytest.mark.parametrize("buckets, limit", BINS)
def test_buckets_are_those_of_exact_arithmetic(bidirectional, buckets, limit):
    distances = np.arange(-1200, 1201)
    expected = [exact_bucket(int(d), bidirectional, buckets, limit) for d in distances]
    actual = attention.relative_bucket(
        jnp.asarray(distances), bidirectional=bidirectional, buckets=buckets, limit=limit
    )
    np.testing.assert_array_equal(actual, expected)


@both_ways
def test_buckets_are_the_same_compiled_and_not(bidirectional):
    bucket = lambda d: attention.relative_bucket(
        d, bidirectional=bidirectional, buckets=32, limit=128
    )
    distances = jnp.arange(-1200, 1201)
    np.testing.assert_array_equal(jax.jit(bucket)(distances), bucket(distances))


# The weighted sum. ---------------------------------------------------------------------------


@pytest.fixture(params=["einsum", "cpu at once", "cpu row by row"])
def attend(request, monkeypatch):
    """Every implementation of attention."""
    monkeypatch.setattr(cpu_kernels, "MIN_ROW_SCORES", 0 if "row" in request.param else 2**30)
    return attention.attend if request.param == "einsum" else cpu_kernels.attend


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attend_is_the_softmax_sum_in_float64(groups, attend):
    args = problem(groups)
    np.testing.assert_allclose(attend(*args), reference(*args), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_query_is_multi_head_with_repeated_keys(groups, attend):
    query, key, value, mask, bias = problem(groups)
    repeat = lambda x: jnp.repeat(x, 4 // groups, axis=2)
    repeated = attend(query, repeat(key), repeat(value), mask, bias)
    grouped = attend(query, key, value, mask, bias)
    np.testing.assert_allclose(grouped, repeated, rtol=1e-6, atol=1e-6)


def test_masked_keys_have_no_influence_to_the_bit(attend):
    query, key, value, mask, bias = problem(2)
    hidden = np.arange(key.shape[1]) % 2 == 1
    mask = jnp.asarray(mask & ~hidden)
    spoil = lambda x: jnp.where(hidden[:, None, None], 1e4, x)
    expected = attend(query, key, value, mask, bias)
    actual = attend(query, spoil(key), spoil(value), mask, jnp.where(hidden, 1e6, bias))
    np.testing.assert_array_equal(actual, expected)


def test_masked_keys_have_no_influence_even_if_all_scores_are_very_low(attend):
    query, key, value, mask, bias = problem(4)
    actual = attend(query, key, value, mask, jnp.full_like(bias, -1e30))
    weights = mask / mask.sum(-1, keepdims=True)  # all scores equal -1e30 in float32
    np.testing.assert_allclose(actual, np.einsum("bts,bsnh->btnh", weights, value), atol=1e-6)


def test_no_bias_is_a_bias_of_zero_and_a_constant_bias_changes_nothing(attend):
    query, key, value, mask, bias = problem(2)
    expected = attend(query, key, value, mask)
    for constant in (0.0, 3.0):
        biased = attend(query, key, value, mask, jnp.full_like(bias, constant))
        np.testing.assert_allclose(biased, expected, rtol=1e-5, atol=1e-6)


def test_the_order_of_keys_does_not_matter(attend):
    query, key, value, mask, bias = problem(4)
    order = np.random.default_rng(1).permutation(key.shape[1])
    mixed = attend(query, key[:, order], value[:, order], mask[:, :, order], bias[:, :, order])
    straight = attend(query, key, value, mask, bias)
    np.testing.assert_allclose(mixed, straight, rtol=1e-5, atol=1e-6)


def test_a_query_without_visible_keys_gets_the_mean_of_all_values(attend):
    query, key, value, mask, bias = problem(4)
    output = attend(query, key, value, np.zeros_like(mask), bias)
    expected = np.broadcast_to(np.mean(value, axis=1, keepdims=True), output.shape)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_reaches_the_bias_and_is_that_of_finite_differences(attend):
    query, key, value, mask, bias = problem(2)
    target = np.random.default_rng(2).normal(size=query.shape)
    loss = lambda bias: jnp.sum(attend(query, key, value, mask, bias) * target)
    grad = np.asarray(jax.grad(loss)(bias))
    exact = lambda bias: np.sum(reference(query, key, value, mask, bias) * target)
    (wide,) = as_float64(bias)
    for index in [(0, 0, 2), (1, 4, 2), (3, 2, 5), (2, 3, 0)]:
        nudge = np.zeros(wide.shape)
        nudge[index] = 1e-5
        slope = (exact(wide + nudge) - exact(wide - nudge)) / 2e-5
        np.testing.assert_allclose(grad[index], slope, rtol=1e-4, atol=1e-5)
    assert (grad[np.broadcast_to(~mask.any(0), grad.shape)] == 0).all()


def test_the_softmax_is_taken_in_float32_of_bfloat16_scores(attend):
    wide = problem(2, queries=6, keys=9, width=8)
    query, key, value = (x.astype(jnp.bfloat16) for x in (4 * wide[0], *wide[1:3]))
    actual = attend(query, key, value, *wide[3:])
    assert actual.dtype == jnp.bfloat16
    # Weights and result are rounded to 8 bits of mantissa once each; scores are not.
    expected = reference(query, key, value, *wide[3:])
    bound = 2**-8 * 2 * np.abs(np.asarray(value, np.float64)).max()
    assert np.abs(np.asarray(actual, np.float64) - expected).max() < bound


def test_dropout_multiplies_weights_that_sum_to_one(attend):
    query, key, value, mask, bias = problem(2)
    (rows, sources, groups, _), heads = key.shape, query.shape[2]
    keep = np.random.default_rng(1).uniform(size=(rows, groups, heads // groups, 1, sources))
    eye = jnp.broadcast_to(jnp.eye(sources)[:, None], (rows, sources, groups, sources))
    weights = attend(query, key, eye, mask, bias)  # [B, T, N, S]
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    actual = attend(query, key, value, mask, bias, jnp.asarray(keep, jnp.float32))
    dropped = weights * keep.reshape(rows, 1, heads, sources)
    wide = np.repeat(value, heads // groups, axis=2)
    np.testing.assert_allclose(actual, np.einsum("btns,bsnh->btnh", dropped, wide), atol=1e-6)


@pytest.mark.parametrize("bias_of", ["no bias", "all rows", "each row"])
def test_every_implementation_computes_the_same_sums_and_gradients(bias_of, monkeypatch):
    query, key, value, mask, bias = problem(2)
    bias = {"no bias": None, "all rows": bias, "each row": jnp.stack([bias, bias[::-1]])}[bias_of]
    target = np.random.default_rng(2).normal(size=query.shape)

    def loss_and_gradients(attend):
        loss = lambda *args: jnp.sum(attend(*args[:3], mask, *args[3:]) * target)
        return jax.value_and_grad(loss, (0, 1, 2, 3))(query, key, value, bias)

    expected = loss_and_gradients(attention.attend)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for min_row_scores in (2**30, 0):
        monkeypatch.setattr(cpu_kernels, "MIN_ROW_SCORES", min_row_scores)
        jax.tree.map(close, loss_and_gradients(cpu_kernels.attend), expected)


def test_only_a_cpu_loops_over_rows_and_it_stores_less_than_half_of_the_scores():
    query, key, value, mask, bias = problem(2, rows=16, queries=128, keys=128)
    loss = lambda *args: jnp.sum(cpu_kernels.attend(*args, mask, bias) ** 2)
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, value)
    temporary_bytes = traced.lower().compile().memory_analysis().temp_size_in_bytes
    score_bytes = mask.size * query.shape[2] * 4
    assert temporary_bytes < score_bytes / 2
    assert "while" in traced.lower().as_text()
    assert "while" not in traced.lower(lowering_platforms=("tpu",)).as_text()


# Positions. ----------------------------------------------------------------------------------


def test_positions_count_from_the_start_of_each_segment():
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 2, 3, 3], [1, 2, 1, 1, 1, 1, 1]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(attention.positions(jnp.asarray(segments)), expected)


@pytest.mark.parametrize("width", [2, 6, 16])
def test_sinusoids_are_the_papers_with_the_sines_first(width):
    positions = np.array([[0, 1, 2, 700], [3, 0, 1, 9]])
    actual = attention.sinusoids(jnp.asarray(positions), width)
    for i in range(width // 2):
        angle = positions / 10_000 ** (2 * i / width)
        np.testing.assert_allclose(actual[..., i], np.sin(angle), atol=1e-4)
        np.testing.assert_allclose(actual[..., width // 2 + i], np.cos(angle), atol=1e-4)


def rotated(x, positions, base=100.0):
    positions = jnp.broadcast_to(jnp.asarray(positions), x.shape[:2])
    return np.asarray(attention.rotate(jnp.asarray(x), positions, base))


def test_rotation_is_the_product_with_a_complex_number_of_norm_one():
    x = np.random.default_rng(3).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([0, 1, 2, 40, 7])
    for i in range(4):
        number = (x[..., i] + 1j * x[..., 4 + i]) * np.exp(
            1j * positions[:, None] * 100.0 ** (-i / 4)
        )
        actual = rotated(x, positions)
        np.testing.assert_allclose(actual[..., i] + 1j * actual[..., 4 + i], number, atol=2e-5)
    norm = lambda x: np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(norm(rotated(x, positions)), norm(x), rtol=1e-5)


def test_position_zero_is_not_rotated_and_dtype_is_kept():
    x = np.random.default_rng(4).normal(size=(1, 3, 2, 6)).astype(np.float32)
    np.testing.assert_array_equal(rotated(x, 0), x)
    actual = attention.rotate(jnp.asarray(x, jnp.bfloat16), jnp.ones((1, 3), int), 10.0)
    assert actual.dtype == jnp.bfloat16


@pytest.mark.parametrize("shift", [1, 7, 1000])
def test_rotated_scores_depend_on_distance_alone(shift):
    query, key = np.random.default_rng(5).normal(size=(2, 1, 6, 2, 8)).astype(np.float32)

    def scores(start):
        positions = start + np.arange(6)
        return np.einsum("btnh,bsnh->bnts", rotated(query, positions), rotated(key, positions))

    np.testing.assert_allclose(scores(shift), scores(0), atol=1e-3)
    assert np.abs(scores(0) - np.einsum("btnh,bsnh->bnts", query, key)).max() > 0.1


# Caps and scales. ----------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_soft_cap_is_bounded_monotone_odd_and_the_identity_near_zero(cap):
    x = jnp.linspace(-6 * cap, 6 * cap, 1001)
    capped = np.asarray(attention.soft_cap(x, cap))
    assert (np.abs(capped) < cap).all() and np.abs(capped).max() > 0.99 * cap
    assert (np.diff(capped) > 0).all()
    np.testing.assert_allclose(capped, -capped[::-1], atol=1e-6 * cap)
    near = cap * jnp.linspace(-0.01, 0.01, 21)  # tanh x = x - x^3 / 3 + ..
    np.testing.assert_allclose(attention.soft_cap(near, cap), near, rtol=1e-4 / 3 + 1e-6)


def test_a_cap_of_zero_changes_nothing():
    x = jnp.linspace(-900.0, 900.0, 7)
    np.testing.assert_array_equal(attention.soft_cap(x, 0.0), x)


def test_scores_are_scaled_then_biased_then_capped(attend):
    query, key, value, mask, bias = problem(2)
    actual = attend(query, key, value, mask, bias, config=attention.ScoreConfig(0.3, 0.7))
    repeat = lambda x: np.repeat(np.asarray(x, np.float64), 2, axis=2)
    scores = 0.3 * np.einsum("btnh,bsnh->bnts", query, repeat(key)) + np.asarray(bias)
    weights = np.exp(0.7 * np.tanh(scores / 0.7)) * mask[:, None]
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bnts,bsnh->btnh", weights, repeat(value))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_bias_may_differ_from_row_to_row(attend):
    query, key, value, mask, bias = problem(2)
    rows = jnp.stack([bias, bias[::-1]])
    actual = attend(query, key, value, mask, rows)
    for row in range(2):
        rows_slice = slice(row, row + 1)
        alone = attend(
            query[rows_slice], key[rows_slice], value[rows_slice], mask[rows_slice], rows[row]
        )
        np.testing.assert_allclose(actual[rows_slice], alone, rtol=1e-6, atol=1e-6)
