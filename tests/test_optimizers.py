"""Laws of rates and updates: optax's schedules, AdamW and Adafactor in float64, what decays."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import optimizers, transformer

STEPS = 50
every_schedule = pytest.mark.parametrize("schedule", optimizers.SCHEDULES)


def config_of(**fields):
    defaults = dict(peak=0.02, schedule="constant", warmup=0, clip_norm=0.0)
    return optimizers.OptimizerConfig(**defaults | fields)


def rate_of(**fields):
    return optimizers.make_optimizer(config_of(**fields), STEPS)[1]


def params_and_gradients(count=3, seed=0):
    """A tree with a factored and a small matrix, a scale and a bias; `count` gradients of it."""
    rng = np.random.default_rng(seed)
    shapes = {"wide": (128, 130), "narrow": (3, 4), "norm": {"scale": (5,)}}
    shapes["relative"] = {"relative_bias": (4, 2)}
    draw = lambda scale: jax.tree.map(
        lambda shape: scale * rng.normal(size=shape), shapes, is_leaf=lambda x: type(x) is tuple
    )
    return draw(0.5), [draw(10.0 ** -(i + 1)) for i in range(count)]


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def train(optimizer, params, gradients):
    """Parameters after one update a gradient."""
    params = as_float32(params)
    opt_state = optimizer.init(params)
    for grads in gradients:
        updates, opt_state = optimizer.update(as_float32(grads), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(ours, theirs, rtol=2e-5):
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)
    jax.tree.map(compare, ours, theirs)


# Schedules. ----------------------------------------------------------------------------------


@every_schedule
def test_without_warm_up_the_first_update_has_the_peak_rate(schedule):
    assert rate_of(schedule=schedule, warmup=0)(0) == pytest.approx(0.02)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_from_zero_to_the_peak(schedule):
    rate = rate_of(schedule=schedule, warmup=10)
    rates = [rate(n) for n in range(11)]
    np.testing.assert_allclose(rates, 0.02 * np.arange(11) / 10, rtol=1e-6)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_linear_and_cosine_go_from_peak_to_final_where_training_ends(final):
    for warmup in (0, 10):
        done = (np.arange(warmup, STEPS + 1) - warmup) / (STEPS - warmup)
        for schedule, left in (("linear", 1 - done), ("cosine", (1 + np.cos(np.pi * done)) / 2)):
            rate = rate_of(schedule=schedule, warmup=warmup, final=final)
            rates = [rate(n) for n in range(warmup, STEPS + 1)]
            expected = 0.02 * (final + (1 - final) * left)
            np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-8)


def test_cosine_is_optax_warm_up_and_cosine():
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.02, 10, STEPS, end_value=0.002)
    ours = rate_of(schedule="cosine", warmup=10, final=0.1)
    steps = range(STEPS + 5)
    np.testing.assert_allclose([ours(n) for n in steps], [theirs(n) for n in steps], rtol=1e-5)


def test_rsqrt_is_t5_one_over_root_n():
    rate = rate_of(schedule="rsqrt", warmup=10_000, peak=0.01)
    for n in (0, 1, 9_999, 10_000, 40_000, 1_000_000):
        assert rate(n) == pytest.approx(1 / math.sqrt(max(n, 10_000)), rel=1e-6)


@every_schedule
def test_a_rate_is_the_same_compiled_and_never_negative(schedule):
    rate = rate_of(schedule=schedule, warmup=7, final=0.1)
    steps = jnp.arange(2 * STEPS)
    compiled = jax.jit(jax.vmap(rate))(steps)
    np.testing.assert_allclose(compiled, [rate(n) for n in range(2 * STEPS)], rtol=1e-5)
    assert compiled.min() >= 0 and compiled.max() == pytest.approx(0.02)


def test_an_update_uses_the_rate_of_its_number():
    """A constant gradient moves AdamW by the rate itself, so the path shows the schedule."""
    optimizer, rate = optimizers.make_optimizer(
        config_of(name="adamw", schedule="linear", warmup=3, peak=0.01), STEPS
    )
    params, ones = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    moved = [-train(optimizer, params, [ones] * n)["w"] for n in range(6)]
    np.testing.assert_allclose(np.diff(moved), [rate(n) for n in range(5)], rtol=1e-4, atol=1e-8)


# Updates. ------------------------------------------------------------------------------------


def test_adamw_is_its_paper_in_float64():
    config = config_of(name="adamw", weight_decay=0.1, beta1=0.8, beta2=0.95, peak=0.01)
    params, gradients = params_and_gradients()
    ours = train(optimizers.make_optimizer(config, STEPS)[0], params, gradients)

    def exact(path, x):
        decay = 0.0 if "scale" in str(path) or "relative" in str(path) else 0.1
        mean = square = 0.0
        for t, grads in enumerate(gradients, start=1):
            g = grads
            for entry in path:
                g = g[entry.key]
            mean, square = 0.8 * mean + 0.2 * g, 0.95 * square + 0.05 * g * g
            step = mean / (1 - 0.8**t) / (np.sqrt(square / (1 - 0.95**t)) + 1e-8)
            x = x - 0.01 * (step + decay * x)
        return x

    assert_close(ours, jax.tree_util.tree_map_with_path(exact, params))


def test_adafactor_is_its_paper_in_float64():
    params, gradients = params_and_gradients()
    optimizer, _ = optimizers.make_optimizer(config_of(name="adafactor", peak=0.01), STEPS)
    ours = train(optimizer, params, gradients)
    rms = lambda x: np.sqrt(np.mean(x * x))

    def exact(x, *grads):
        square = rows = columns = 0.0
        for t, g in enumerate(grads, start=1):
            beta, new = 1 - t**-0.8, g * g + 1e-30
            if min(g.shape) >= 128:
                rows = beta * rows + (1 - beta) * new.mean(1, keepdims=True)
                columns = beta * columns + (1 - beta) * new.mean(0, keepdims=True)
                square = rows * columns / rows.mean()
            else:
                square = beta * square + (1 - beta) * new
            step = g / np.sqrt(square)
            x = x - 0.01 * max(1e-3, rms(x)) * step / max(1.0, rms(step))
        return x

    assert_close(ours, jax.tree.map(exact, params, *gradients), rtol=1e-4)


def test_adafactors_first_step_is_the_rate_times_the_size_of_the_parameter():
    params, gradients = params_and_gradients(1)
    params["norm"]["scale"] *= 0  # below 1e-3, that is the size
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    optimizer, _ = optimizers.make_optimizer(config_of(name="adafactor", peak=0.01), STEPS)
    moved = jax.tree.map(lambda a, b: rms(a - b), train(optimizer, params, gradients), params)
    expected = jax.tree.map(lambda x: 0.01 * max(rms(x), 1e-3), params)
    assert_close(moved, expected, rtol=1e-3)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_weight_decay_is_a_share_of_the_rate_and_spares_scales_and_bias(name):
    params, _ = params_and_gradients(0)
    zero = jax.tree.map(np.zeros_like, params)
    config = config_of(name=name, weight_decay=0.1, peak=0.01)
    decayed = train(optimizers.make_optimizer(config, STEPS)[0], params, [zero, zero])
    for key, share in {"wide": 0.999**2, "narrow": 0.999**2, "norm": 1, "relative": 1}.items():
        expected = jax.tree.map(lambda x, share=share: share * x, params[key])
        assert_close(decayed[key], expected, rtol=1e-6)


def test_all_but_norm_scales_and_relative_biases_decay_in_the_model():
    config = transformer.ModelConfig(vocab_size=64, d_model=16, d_ff=16, head_dim=4)
    mask = optimizers.decays(transformer.shapes(config))
    spared = {path[-1].key for path, yes in jax.tree_util.tree_leaves_with_path(mask) if not yes}
    kept = {path[-1].key for path, yes in jax.tree_util.tree_leaves_with_path(mask) if yes}
    assert spared == {"scale", "relative_bias"} and kept == {"kernel", "embedding", "head"}


# Clipping. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [0.5, 1e-3])
def test_clipping_scales_the_whole_gradient_to_its_norm(clip_norm):
    params, gradients = params_and_gradients()
    norms = [math.sqrt(sum(np.sum(g * g) for g in jax.tree.leaves(tree))) for tree in gradients]
    assert max(norms) > clip_norm
    by_hand = [
        jax.tree.map(lambda g, n=norm: g * min(1, clip_norm / n), tree)
        for tree, norm in zip(gradients, norms, strict=True)
    ]
    optimizer = lambda clip: optimizers.make_optimizer(
        config_of(name="adamw", clip_norm=clip), STEPS
    )[0]
    ours = train(optimizer(clip_norm), params, gradients)
    assert_close(ours, train(optimizer(0.0), params, by_hand), rtol=1e-4)


def test_a_gradient_below_the_norm_and_a_norm_of_zero_clip_nothing():
    params, gradients = params_and_gradients()
    optimizer = lambda clip: optimizers.make_optimizer(
        config_of(name="adamw", clip_norm=clip), STEPS
    )[0]
    none, large = (train(optimizer(clip), params, gradients) for clip in (0.0, 1e6))
    jax.tree.map(np.testing.assert_array_equal, none, large)


# Configs. ------------------------------------------------------------------------------------

BOUNDED = ["peak", "final", "weight_decay", "clip_norm", "beta1", "beta2", "warmup"]


@pytest.mark.parametrize("field", BOUNDED)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9, 1e10])
def test_a_number_out_of_bounds_is_refused_with_its_bounds(field, value):
    with pytest.raises(ValueError, match=rf"optimizer.{field}={value} is out of bounds; use 0 to"):
        config_of(**{field: value})


def test_every_number_of_the_config_is_bounded():
    fields = dataclasses.fields(optimizers.OptimizerConfig)
    assert {f.name for f in fields if f.type in ("int", "float")} == set(BOUNDED)


@pytest.mark.parametrize("field", ["beta1", "beta2"])
def test_the_largest_beta_allowed_still_takes_finite_steps(field):
    with pytest.raises(ValueError) as error:
        config_of(**{field: 2.0})
    largest = float(str(error.value).split(" to ")[1].rstrip("."))
    optimizer, _ = optimizers.make_optimizer(config_of(name="adamw", **{field: largest}), STEPS)
    params, gradients = params_and_gradients()
    trained = train(optimizer, params, gradients)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained))


@pytest.mark.parametrize("field, near", [("name", "adafactor"), ("schedule", "cosine")])
def test_an_unknown_word_is_refused_with_the_nearest(field, near):
    with pytest.raises(ValueError, match=f"optimizer.{field}='{near}e' .* did you mean '{near}'"):
        config_of(**{field: near + "e"})
