"""Laws of a block's modules: norms and products in float64, T5's dropout, relative bias."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lm import attention, cpu_kernels, layers, transformer

SHAPE = (2, 5, 16)


def draw(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def config_of(**fields):
    sizes = dict(vocab_size=64, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, head_dim=8)
    return transformer.ModelConfig.from_flat(sizes | fields)


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# Norm. ---------------------------------------------------------------------------------------


def norm(x, scale, dtype="float32"):
    return layers.RMSNorm(dtype).apply({"params": {"scale": scale}}, x)


def exact_norm(x, scale):
    x, scale = as_float64((x, scale))
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def test_norm_is_x_over_its_rms_times_the_scale():
    x, scale = draw(*SHAPE), draw(16, seed=1)
    np.testing.assert_allclose(norm(x, scale), exact_norm(x, scale), rtol=2e-6)


@pytest.mark.parametrize("factor", [2.0**10, 2.0**40, -1.0])
def test_norm_is_invariant_to_the_scale_of_its_input(factor):
    x, scale = draw(*SHAPE, scale=100.0), draw(16, seed=1)
    actual = norm(factor * x, scale)
    np.testing.assert_allclose(actual, np.sign(factor) * norm(x, scale), rtol=1e-5)


def test_norm_of_zero_is_zero_with_a_finite_gradient():
    grad = jax.grad(lambda x: norm(x, jnp.ones(16)).sum())(jnp.zeros(SHAPE))
    assert np.isfinite(grad).all() and not norm(jnp.zeros(SHAPE), jnp.ones(16)).any()


def test_norm_of_bfloat16_is_bfloat16_with_statistics_in_float32():
    x, scale = draw(4, 4096, seed=2).astype(jnp.bfloat16), draw(4096, seed=3)
    actual = norm(x, scale, "bfloat16")
    assert actual.dtype == jnp.bfloat16
    # One rounding at the end (half a unit of 8 bits); sums in bfloat16 would be off by far more.
    np.testing.assert_allclose(as_float64(actual), exact_norm(x, scale), rtol=2**-8)


def test_the_initial_scale_of_a_norm_is_one():
    params = layers.RMSNorm("float32").init(jax.random.key(0), draw(*SHAPE))["params"]
    np.testing.assert_array_equal(params["scale"], np.ones(16))


# Dropout. ------------------------------------------------------------------------------------


def dropped(rate, x, deterministic=False, seed=0):
    rngs = {"dropout": jax.random.key(seed)}
    return layers.Dropout(rate).apply({}, x, deterministic, rngs=rngs)


def test_dropout_drops_the_same_units_at_all_positions_and_keeps_the_mean():
    ones = dropped(0.25, jnp.ones((64, 3, 256)))
    assert (ones == ones[:, :1]).all()
    assert set(np.unique(ones)) == {0.0, np.float32(1 / 0.75)}
    assert np.mean(ones) == pytest.approx(1, abs=5 * np.sqrt(0.25 / 0.75 / (64 * 256)))


def test_rows_drop_different_units():
    ones = np.asarray(dropped(0.5, jnp.ones((8, 1, 64))))
    assert len({row.tobytes() for row in ones}) == 8


@pytest.mark.parametrize("rate, deterministic", [(0.0, False), (0.0, True), (0.9, True)])
def test_dropout_is_the_identity_at_rate_zero_and_in_evaluation(rate, deterministic):
    x = draw(*SHAPE)
    np.testing.assert_array_equal(dropped(rate, x, deterministic), x)


# Bias by distance. ---------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_bias_is_its_buckets_entry_and_the_gradient_counts_its_uses(bidirectional):
    module = layers.RelativeBias(4, bidirectional, buckets=8, limit=20)
    distance, table = attention.distance(6, 7), draw(8, 4)
    apply = lambda table: module.apply({"params": {"relative_bias": table}}, distance)
    bias, counts = apply(table), jax.grad(lambda table: apply(table).sum())(table)
    bucket = np.asarray(
        attention.relative_bucket(distance, bidirectional=bidirectional, buckets=8, limit=20)
    )
    np.testing.assert_array_equal(bias, np.moveaxis(np.asarray(table)[bucket], -1, 0))
    uses = np.bincount(bucket.ravel(), minlength=8)
    np.testing.assert_array_equal(counts, np.repeat(uses[:, None], 4, axis=1))


# Products. -----------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": (lambda x: np.maximum(x, 0), False),
    "gelu": (lambda x: x * scipy.special.ndtr(x), False),
    "geglu": (lambda x: x * scipy.special.ndtr(x), True),
    "swiglu": (lambda x: x * scipy.special.expit(x), True),
}


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_feed_forward_equals_its_formula(name):
    activation, gated = ACTIVATIONS[name]
    module, x = layers.FeedForward(config_of(activation=name)), draw(*SHAPE)
    params = module.init(jax.random.key(0), x, True)["params"]
    actual = module.apply({"params": params}, x, True)
    wide, p = as_float64(x), {name: leaf["kernel"] for name, leaf in as_float64(params).items()}
    hidden = (
        activation(wide @ p["gate"]) * (wide @ p["up"]) if gated else activation(wide @ p["up"])
    )
    # The tanh form of GELU lies within 5e-4 of the exact one.
    np.testing.assert_allclose(actual, hidden @ p["down"], atol=2e-3 if "ge" in name else 1e-5)


def test_dense_general_2d_equals_the_product_over_several_axes():
    x, kernel = draw(2, 5, 4, 6), draw(4, 6, 3, 7)
    dimensions = ((2, 3), (0, 1)), ((), ())
    actual = cpu_kernels.dense_general_2d(x, kernel, dimensions)
    exact = np.einsum("btnh,nhkw->btkw", *as_float64((x, kernel)))
    np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5)
    for features, axis in ((8, -1), ((2, 4), -1), (8, (-2, -1))):
        dense = layers.dense(features, axis, 1.0, None, "float32")
        reference = dense.clone(dot_general=None)
        start = dense.init(jax.random.key(0), x)
        jax.tree.map(np.testing.assert_array_equal, start, reference.init(jax.random.key(0), x))
        expected = reference.apply(start, x)
        np.testing.assert_allclose(dense.apply(start, x), expected, rtol=1e-5, atol=1e-6)


def test_the_backward_pass_of_products_transposes_no_activations():
    module, x = layers.FeedForward(config_of(d_model=64, d_ff=96)), draw(4, 32, 64)
    start = module.init(jax.random.key(0), x, True)
    loss = lambda start, x: jnp.sum(module.apply(start, x, True) ** 2)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(start, x).compile().as_text()
    assert "f32[96,64]" in compiled  # that is how shapes are written: the gradient of `down`
    for width in (64, 96):
        assert f"= f32[{width},{4 * 32}]" not in compiled


def test_gelu_is_the_tanh_form_of_t5():
    x = np.linspace(-4, 4, 101)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(layers.ACTIVATIONS["geglu"][0](jnp.asarray(x)), tanh, atol=2e-6)


def attention_of(config, x, source, mask):
    """The module applied to x and the keys and values of source, and its parameters."""
    module = layers.Attention(config)

    def whole(module, x, source):
        return module(x, module.keys_values(source), mask, None, True)

    params = module.init(jax.random.key(0), x, source, method=whole)["params"]
    return module.apply({"params": params}, x, source, method=whole), params


def test_attention_equals_its_formula_without_division_by_a_root():
    x, source = draw(*SHAPE), draw(2, 7, 16, seed=1)
    mask = np.random.default_rng(2).random((2, 5, 7)) < 0.7
    mask[:, :, 0] = True
    actual, params = attention_of(config_of(), x, source, mask)
    p = {name: leaf["kernel"] for name, leaf in as_float64(params).items()}
    x, source = as_float64((x, source))
    heads = lambda x, kernel: np.einsum("bsd,dkh->bskh", x, kernel)
    repeat = lambda x: np.repeat(x, 2, axis=2)  # two heads share keys and values
    key, value = repeat(heads(source, p["key"])), repeat(heads(source, p["value"]))
    scores = np.einsum("btnh,bsnh->bnts", heads(x, p["query"]), key)
    weights = scipy.special.softmax(np.where(mask[:, None], scores, -np.inf), axis=-1)
    summed = np.einsum("bnts,bsnh->btnh", weights, value)
    expected = np.einsum("btnh,nhd->btd", summed, p["out"])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_no_projection_has_a_bias_so_zero_stays_zero():
    zero, source, mask = jnp.zeros(SHAPE), jnp.zeros((2, 7, 16)), np.ones((2, 5, 7), bool)
    out, params = attention_of(config_of(), zero, source, mask)
    assert not out.any()
    assert {key for leaf in params.values() for key in leaf} == {"kernel"}


# Other norms. --------------------------------------------------------------------------------


def test_gemmas_norm_multiplies_by_one_plus_a_scale_that_starts_at_zero():
    x, scale = draw(*SHAPE), draw(16, seed=1)
    module = layers.NORMS["rms_offset"]("float32", "norm")
    actual = module.apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(actual, exact_norm(x, 1 + np.asarray(scale)), rtol=1e-5, atol=1e-6)
    start = module.init(jax.random.key(0), x)["params"]
    np.testing.assert_array_equal(start["scale"], np.zeros(16))
    np.testing.assert_allclose(module.apply({"params": start}, x), norm(x, jnp.ones(16)), rtol=1e-6)


def test_layer_norm_is_that_of_flax():
    x, params = 3 + draw(*SHAPE), {"scale": draw(16, seed=1), "bias": draw(16, seed=2)}
    actual = layers.NORMS["layer"]("float32", name="norm").apply({"params": params}, x)
    expected = nn.LayerNorm(epsilon=1e-6).apply({"params": params}, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6)
    start = layers.NORMS["layer"]("float32", name="norm").init(jax.random.key(0), x)["params"]
    np.testing.assert_array_equal(start["scale"], np.ones(16))
    np.testing.assert_array_equal(start["bias"], np.zeros(16))


@pytest.mark.parametrize("kind", layers.NORMS)
def test_every_norm_gives_its_dtype(kind):
    module, x = layers.NORMS[kind]("bfloat16", name="norm"), draw(*SHAPE).astype(jnp.bfloat16)
    normed = module.apply(module.init(jax.random.key(0), x), x)
    assert normed.dtype == jnp.bfloat16


# Queries and keys. ---------------------------------------------------------------------------


def test_normalized_queries_and_keys_are_invariant_to_the_scale_of_their_input():
    config, mask = config_of(**{"attention.query_key_norm": "rms"}), np.ones((2, 5, 5), bool)
    x = draw(*SHAPE)
    module = layers.Attention(config)

    def weights_of(module, x, factor):
        key, value = module.keys_values(factor * x)
        return module(factor * x, (key, value / factor), mask, None, True)

    params = module.init(jax.random.key(0), x, 1.0, method=weights_of)
    actual, scaled = (module.apply(params, x, f, method=weights_of) for f in (1.0, 100.0))
    np.testing.assert_allclose(actual, scaled, rtol=1e-3, atol=1e-4)
    assert set(params["params"]) == {"query", "key", "value", "out", "query_norm", "key_norm"}


@pytest.mark.parametrize("normed", ["none", "rms"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_scores_start_with_variance_one_whatever_the_scale(normed, scale):
    """64 queries and keys of 64 units make 4096 scores for each of 4 heads."""
    config = config_of(
        d_model=64,
        head_dim=16,
        num_kv_heads=4,
        **{"attention.scale": scale, "attention.query_key_norm": normed},
    )
    module, x, seen = layers.Attention(config), draw(1, 64, 64), {}

    def scores(module, x):
        key, value = module.keys_values(x)
        mask = jnp.ones((1, 64, 64), bool)
        module(x, (key, value), mask, None, True)
        query = module.query(x)
        if normed == "rms":
            query = module.query_norm(query)
        seen["scores"] = scale * jnp.einsum("btnh,bsnh->bnts", query, key)

    module.init(jax.random.key(0), x, method=scores)
    # 64 x 16 independent numbers on either side of each head: the variance is known to some 10 %.
    assert float(jnp.var(seen["scores"])) == pytest.approx(1, abs=0.2)


def test_rotary_positions_rotate_queries_and_keys_but_not_values():
    config, x, mask = (
        config_of(**{"position.rotary_base": 50.0}),
        draw(*SHAPE),
        np.ones((2, 5, 5), bool),
    )
    module = layers.Attention(config)

    def whole(module, x, shift):
        places = jnp.broadcast_to(shift + jnp.arange(5), (2, 5))
        turned = module(x, module.keys_values(x, places), mask, None, True, places)
        return turned, module(x, module.keys_values(x), mask, None, True)

    params = module.init(jax.random.key(0), x, 0, method=whole)
    (turned, plain), (shifted, _) = (module.apply(params, x, s, method=whole) for s in (0, 30))
    np.testing.assert_allclose(turned, shifted, rtol=1e-3, atol=1e-4)
    assert np.abs(turned - plain).max() > 0.01
