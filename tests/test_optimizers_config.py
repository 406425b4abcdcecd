"""Laws of the optimizer's keys: bounds, contradictions, patterns, defaults."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import optimizers, transformer

RUN_LENGTH = optimizers.RunLength(epoch=10.0, tokens=64)
PARAMS = {
    "embed": {"embedding": jnp.ones((4, 3))},
    "encoder": {"layers": {"up": {"kernel": jnp.ones((2, 3, 4))}}, "norm": {"scale": jnp.ones(3)}},
    "head": jnp.full((3, 4), -0.0),
}
config_of = optimizers.OptimizerConfig


def moved(rates=(), decays=None, weight_decay=0.0, gradients=None, **fields):
    """The updates at rate 1 for gradients of 1, by path, and the optimizer state."""
    more = {} if decays is None else {"weight_decay_multipliers": decays}
    config = dict(
        name="lion", learning_rate=1.0, schedule="constant", warmup={"steps": 0}, grad_clip_norm=0.0
    )
    config |= dict(learning_rate_multipliers=rates)
    config = config_of(**config | fields, weight_decay=weight_decay, **more)
    optimizer, _ = optimizers.make_optimizer(config, 10, PARAMS, RUN_LENGTH)
    gradients = jax.tree.map(jnp.ones_like, PARAMS) if gradients is None else gradients
    steps, state = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    return {path(keys): np.asarray(step) for keys, step in leaves(steps)}, state


leaves = jax.tree_util.tree_leaves_with_path
path = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")

# Numbers and words. --------------------------------------------------------------------------

BOUNDED = [
    "learning_rate",
    "final_learning_rate_fraction",
    "weight_decay",
    "grad_clip_norm",
    "beta1",
    "beta2",
    "ema_decay",
]


@pytest.mark.parametrize("field", BOUNDED)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-9, 1e10])
def test_a_number_out_of_bounds_is_refused_with_its_bounds(field, value):
    with pytest.raises(ValueError, match=rf"optimizer.{field}={value} is out of bounds; use 0 to"):
        config_of(**{field: value})


@pytest.mark.parametrize("field", ["beta1", "beta2", "ema_decay"])
def test_a_decay_of_one_is_refused(field):
    with pytest.raises(ValueError, match=f"optimizer.{field}=1.0 is out of bounds; use 0 to 0.99"):
        config_of(name="adamw", **{field: 1.0})


def test_every_number_of_the_config_is_bounded():
    fields = dataclasses.fields(config_of)
    assert {f.name for f in fields if f.type in ("int", "float")} == set(BOUNDED)


@pytest.mark.parametrize("field", ["beta1", "beta2"])
@pytest.mark.parametrize("name", sorted(set(optimizers.OPTIMIZERS) - {"adafactor"}))
def test_the_largest_beta_allowed_still_takes_finite_steps(name, field):
    with pytest.raises(ValueError) as error:
        config_of(**{field: 2.0})
    largest = float(str(error.value).split(" to ")[1].rstrip("."))
    for step in moved(name=name, **{field: largest})[0].values():
        assert np.isfinite(step).all() and step.all()


@pytest.mark.parametrize("field, near", [("name", "adafactor"), ("schedule", "cosine")])
def test_an_unknown_word_is_refused_with_the_nearest(field, near):
    with pytest.raises(ValueError, match=f"optimizer.{field}='{near}e' .* did you mean '{near}'"):
        config_of(**{field: near + "e"})


# Contradictions. -----------------------------------------------------------------------------

WSD = dict(schedule="wsd", cooldown={"steps": 5})
CONTRADICTIONS = [
    (
        dict(warmup={"steps": 5, "epochs": 1.0}),
        "optimizer.warmup.epochs=1.0 and steps=5 are both set",
    ),
    (
        dict(WSD, cooldown={"steps": 5, "percent": 1.0}),
        "optimizer.cooldown.steps=5 and percent=1.0",
    ),
    (dict(warmup={"steps": -1}), "optimizer.warmup.steps=-1 is not a length"),
    (dict(warmup={"steps": 2**31}), "optimizer.warmup.steps=2147483648 is too large"),
    (dict(warmup={"updates": 1}), "the key of optimizer.warmup='updates' is unknown; choose one"),
    (dict(warmup=5), "optimizer.warmup=5 is a whole section; set one of epochs"),
    (dict(schedule="wsd"), "'wsd' has no optimizer.cooldown"),
    (
        dict(schedule="cosine", cooldown={"steps": 5}),
        "cooldown={'steps': 5} has no effect with .*'cosine'; remove it, or use schedule='wsd'",
    ),
    (dict(cooldown={"epochs": 1.0}), "cooldown={'epochs': 1.0} has no effect with .*'rsqrt'"),
    (
        dict(final_learning_rate_fraction=0.1),
        "final_learning_rate_fraction=0.1 has no effect with .*'rsqrt'",
    ),
    (
        dict(schedule="constant", final_learning_rate_fraction=0.1),
        "final_learning_rate_fraction=0.1 has no effect with .*'constant'",
    ),
    (
        dict(weight_decay_multipliers=(("bias", 0.0),)),
        "weight_decay_multipliers=.* has no effect with optimizer.weight_decay=0.0",
    ),
    (dict(beta1=0.8), "beta1=0.8 has no effect with .*'adafactor'; remove it, or use another"),
    (dict(beta2=0.8), "beta2=0.8 has no effect with .*'adafactor'"),
]


@pytest.mark.parametrize("fields, message", CONTRADICTIONS)
def test_a_key_without_effect_is_refused_with_the_cause(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        config_of(**fields)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


AGREED = [
    dict(warmup={"epochs": 1.0}),
    dict(schedule="wsd", cooldown={"epochs": 1.0}),
    *(
        dict(WSD, final_learning_rate_fraction=0.1),
        dict(schedule="cosine", final_learning_rate_fraction=0.1),
        dict(schedule="linear", final_learning_rate_fraction=1.0),
    ),
    dict(weight_decay=0.1, weight_decay_multipliers=(("bias", 0.0),)),
    dict(name="lion", beta1=0.8, beta2=0.99),
]


@pytest.mark.parametrize("fields", AGREED, ids=str)
def test_the_same_keys_with_an_effect_are_accepted(fields):
    config_of(**fields)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
@pytest.mark.parametrize("schedule", optimizers.SCHEDULES)
def test_defaults_fit_every_optimizer_and_schedule(name, schedule):
    config = config_of(
        name=name, schedule=schedule, **{"cooldown": {"steps": 5}} if schedule == "wsd" else {}
    )
    assert config.warmup and config.beta1 and config.weight_decay_multipliers
    optimizers.make_optimizer(config, 20_000, {"w": jnp.ones(2)}, RUN_LENGTH)


# Patterns. -----------------------------------------------------------------------------------


def test_a_multiplier_multiplies_the_whole_update_with_weight_decay():
    plain, half = (moved(rates, weight_decay=0.5)[0] for rates in ((), (("encoder/", 0.5),)))
    for name, step in plain.items():
        share = 0.5 if name.startswith("encoder/") else 1
        np.testing.assert_array_equal(half[name], share * step, err_msg=name)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_rates_multiply_the_updates_of_every_optimizer(name):
    plain, more = (moved(rates, name=name)[0] for rates in ((), (("embed", 3.0),)))
    np.testing.assert_allclose(more["embed/embedding"], 3 * plain["embed/embedding"], rtol=1e-6)
    np.testing.assert_array_equal(more["head"], plain["head"])


def test_the_first_match_wins():
    steps, _ = moved((("layers/", 0.5), ("encoder/", 0.25), (".*", 2.0)))
    sizes = {name: -step.ravel()[0] for name, step in steps.items()}
    assert sizes == {
        "embed/embedding": 2,
        "encoder/layers/up/kernel": 0.5,
        "encoder/norm/scale": 0.25,
        "head": 2,
    }
    steps, _ = moved(
        decays=(("norm/", 3.0), ("encoder/", 1.0), (".*", 0.0)), weight_decay=0.5, learning_rate=0.5
    )
    # Of 0.5, lion's sign is 0.5 and the decay of weights of 1 is 0.25 times the multiplier.
    assert -steps["encoder/norm/scale"][0] == 0.5 + 0.75
    assert -steps["encoder/layers/up/kernel"][0, 0, 0] == 0.5 + 0.25
    assert -steps["embed/embedding"][0, 0] == 0.5


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_frozen_parameters_keep_their_bits_and_have_no_moments(name):
    gradients = jax.tree.map(jnp.ones_like, PARAMS) | {"head": jnp.full((3, 4), jnp.nan)}
    fields = dict(name=name, weight_decay=0.5, grad_clip_norm=1.0, gradients=gradients)
    steps, state = moved((("head", None), ("encoder/norm", None)), **fields)
    stored = [path(keys) for keys, leaf in leaves(state) if leaf.ndim]
    assert any("embed/embedding" in name for name in stored)
    assert not any("head" in name or "encoder/norm" in name for name in stored), stored
    for name in ("head", "encoder/norm/scale"):
        before = PARAMS["head"] if name == "head" else PARAMS["encoder"]["norm"]["scale"]
        after = jax.jit(optax.apply_updates)(before, steps.pop(name))
        bits = lambda x: np.asarray(x).view(np.int32)
        np.testing.assert_array_equal(bits(after), bits(before))  # -0.0 stays -0.0
    assert all(np.isfinite(step).all() and step.all() for step in steps.values())


def test_frozen_parameters_do_not_count_in_the_clipped_norm():
    gradients = jax.tree.map(lambda x: 3e-3 * jnp.ones_like(x), PARAMS)
    huge = gradients | {"head": jnp.full((3, 4), 1e9)}
    # A step of Adam's beta2 near 1 shows the gradient's own size after another was seen; so does
    # Adafactor's mean of squares.
    for name in ("adamw", "adafactor"):
        calm, loud = (
            moved((("head", None),), name=name, grad_clip_norm=1.0, gradients=g)
            for g in (gradients, huge)
        )
        jax.tree.map(np.testing.assert_array_equal, calm[1], loud[1])


def test_learning_rate_multipliers_are_listed_by_pattern():
    assert optimizers.multipliers(config_of()) == {}
    config = config_of(learning_rate_multipliers=(("encoder/", 0.1), ("embed", None)))
    assert optimizers.multipliers(config) == {"encoder/": 0.1, "embed": 0.0}


RATES, DECAYS = "learning_rate_multipliers", "weight_decay_multipliers"
BAD_RULES = [
    (RATES, "encoder", "'encoder', which is no pair of a pattern and a multiplier"),
    (RATES, ("encoder",), "which is no pair of a pattern and a multiplier"),
    (RATES, ("enc(oder", 0.1), r"'enc\(oder', which is no regular expression \(missing \)"),
    (RATES, ("head", 0), "a number above 0, up to 1000, or None to freeze"),
    (RATES, ("head", -1), "a number above 0"),
    (RATES, ("head", math.nan), "a number above 0"),
    (RATES, ("head", 1e9), "a number above 0"),
    (RATES, ("head", "none"), "use a number above 0, up to 1000, or None"),
    (DECAYS, ("head", None), "a number from 0 to 1000"),
    (DECAYS, ("head", -1), "a number from 0 to 1000"),
    (DECAYS, ("head", "x"), "weight_decay_multipliers has 'head' with the multiplier 'x', .* use"),
]


@pytest.mark.parametrize("field, rule, message", BAD_RULES)
def test_a_malformed_pattern_or_multiplier_is_refused(field, rule, message):
    with pytest.raises(ValueError, match=message):
        config_of(weight_decay=0.1, **{field: (rule,)})


@pytest.mark.parametrize("field", [RATES, DECAYS])
@pytest.mark.parametrize("patterns", [("heat",), ("embed", "embedding"), ("head", "head")])
def test_a_pattern_that_matches_no_parameter_first_is_refused(field, patterns):
    keys = {"learning_rate_multipliers": "rates", "weight_decay_multipliers": "decays"}
    with pytest.raises(ValueError, match=f"optimizer.{field} has .* first match of no parameter"):
        moved(weight_decay=0.1, **{keys[field]: tuple((pattern, 0.5) for pattern in patterns)})


def test_freezing_all_parameters_is_refused():
    with pytest.raises(ValueError, match="None.* freezes every parameter; leave one"):
        moved(((".*", None),))


def test_by_default_all_parameters_but_norms_and_relative_biases_decay():
    config = transformer.ModelConfig(
        vocab_size=64, d_model=16, d_ff=16, head_dim=4, norm=dict(kind="layer")
    )
    params = jax.tree.map(lambda x: jnp.ones(x.shape), transformer.param_shapes(config))
    optimizer, _ = optimizers.make_optimizer(
        config_of(name="lion", weight_decay=0.5, grad_clip_norm=0.0), 10, params, RUN_LENGTH
    )
    nothing = jax.tree.map(jnp.zeros_like, params)
    steps, _ = optimizer.update(nothing, optimizer.init(params), params)
    ends = lambda which: {keys[-1].key for keys, step in leaves(steps) if bool(step.any()) == which}
    assert ends(False) == {"scale", "bias", "relative_bias"}
    assert ends(True) == {"kernel", "embedding", "head"}
