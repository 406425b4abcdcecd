"""Laws of rates and durations: closed forms at their corners, optax's curves, inverses."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import optimizers

STEPS = 50
PACE = optimizers.RunLength(epoch=250.0, tokens=4096)
COOLDOWN = {"wsd": {"steps": 20}}
FALLS = ["linear", "cosine", "wsd"]
every_schedule = pytest.mark.parametrize("schedule", optimizers.SCHEDULES)


def rate_of(schedule, steps=STEPS, pace=PACE, **fields):
    """The rate of AdamW with a peak of 0.02; wsd falls over 20 updates, unless fields say else."""
    defaults = dict(name="adamw", learning_rate=0.02, schedule=schedule, warmup={"steps": 0})
    defaults |= {"cooldown": COOLDOWN[schedule]} if schedule in COOLDOWN else {}
    config = optimizers.OptimizerConfig(**defaults | fields)
    return optimizers.make_optimizer(config, steps, {"w": jnp.zeros(())}, pace)[1]


# Schedules. ----------------------------------------------------------------------------------


@every_schedule
def test_without_warm_up_the_first_update_has_the_peak_rate(schedule):
    assert rate_of(schedule)(0) == pytest.approx(0.02)


@pytest.mark.parametrize("schedule", ["constant", *FALLS])
def test_warm_up_is_linear_from_zero_to_the_peak(schedule):
    rate = rate_of(schedule, warmup={"steps": 10})
    rates = [rate(n) for n in range(11)]
    np.testing.assert_allclose(rates, 0.02 * np.arange(11) / 10, rtol=1e-6)


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 10])
def test_linear_cosine_and_wsd_go_from_peak_to_final_where_training_ends(warmup, final):
    n = np.arange(warmup, STEPS + 1)
    done = (n - warmup) / (STEPS - warmup)
    cooled = np.clip((n - (STEPS - 20)) / 20, 0, 1)
    shares = {"linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2, "wsd": 1 - cooled}
    for schedule, left in shares.items():
        rate = rate_of(schedule, warmup={"steps": warmup}, final_learning_rate_fraction=final)
        expected = 0.02 * (final + (1 - final) * left)
        np.testing.assert_allclose([rate(i) for i in n], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("schedule", FALLS)
@pytest.mark.parametrize("final", [0.0, 0.25])
def test_after_the_last_update_the_rate_stays_at_its_final_share(schedule, final):
    rate = rate_of(schedule, final_learning_rate_fraction=final, warmup={"steps": 3})
    rates = [rate(n) for n in (STEPS, STEPS + 1, 10 * STEPS)]
    np.testing.assert_allclose(rates, 0.02 * final, atol=1e-9)


def test_wsd_is_stable_between_warm_up_and_cooldown_and_may_have_no_middle():
    rate = rate_of("wsd", warmup={"steps": 10}, cooldown={"steps": 15})
    np.testing.assert_allclose([rate(n) for n in range(10, 36)], 0.02, rtol=1e-6)
    assert rate(36) < 0.02 * 0.94
    whole = rate_of("wsd", warmup={"steps": 30}, cooldown={"steps": 20})
    np.testing.assert_allclose([whole(n) for n in (29, 30, 40)], [0.02 * 29 / 30, 0.02, 0.01], 1e-6)


def test_cosine_is_optax_warm_up_and_cosine():
    expected = optax.warmup_cosine_decay_schedule(0.0, 0.02, 10, STEPS, end_value=0.002)
    actual = rate_of("cosine", warmup={"steps": 10}, final_learning_rate_fraction=0.1)
    steps = range(STEPS + 5)
    np.testing.assert_allclose([actual(n) for n in steps], [expected(n) for n in steps], rtol=1e-5)


def test_linear_is_optax_warm_up_and_linear():
    ramp, fall = optax.linear_schedule(0, 0.02, 10), optax.linear_schedule(0.02, 0.004, STEPS - 10)
    expected, actual = (
        optax.join_schedules([ramp, fall], [10]),
        rate_of("linear", warmup={"steps": 10}, final_learning_rate_fraction=0.2),
    )
    steps = range(STEPS + 5)
    np.testing.assert_allclose([actual(n) for n in steps], [expected(n) for n in steps], rtol=1e-5)


def test_rsqrt_is_t5_one_over_root_n():
    rate = rate_of("rsqrt", warmup={"steps": 10_000}, learning_rate=0.01)
    for n in (0, 1, 9_999, 10_000, 40_000, 1_000_000):
        assert rate(n) == pytest.approx(1 / math.sqrt(max(n, 10_000)), rel=1e-6)


@every_schedule
def test_a_rate_is_the_same_compiled_and_never_negative(schedule):
    final = {"final_learning_rate_fraction": 0.1} if schedule in FALLS else {}
    rate = rate_of(schedule, warmup={"steps": 7}, **final)
    steps = jnp.arange(2 * STEPS)
    compiled = jax.jit(jax.vmap(rate))(steps)
    np.testing.assert_allclose(compiled, [rate(n) for n in range(2 * STEPS)], rtol=1e-5)
    assert compiled.min() >= 0 and compiled.max() == pytest.approx(0.02)


# Durations. ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 100, 65_536, 2**31 - 1])
def test_a_number_of_updates_in_any_unit_is_that_number_again(count):
    total = 2**31 - 1
    for pace in (PACE, optimizers.RunLength(1 / 3, 1), optimizers.RunLength(1e7, 2**23)):
        lengths = {
            "steps": count,
            "epochs": count / pace.epoch,
            "tokens": count * pace.tokens,
            "percent": 100 * count / total,
        }
        for unit, number in lengths.items():
            length = optimizers.LengthConfig(**{unit: number})
            assert length.num_updates(pace, total) == count, (unit, pace)


def test_durations_are_rounded_to_the_nearest_update_and_are_never_none():
    length = optimizers.LengthConfig
    assert length(percent=2.0).num_updates(PACE, 65_536) == 1311  # of 1310.72
    assert length(tokens=1e6).num_updates(PACE) == 244  # of 244.14
    assert length(epochs=1e-6).num_updates(PACE) == 1
    assert length().num_updates(PACE) == 0
    assert optimizers.DurationConfig(epochs=3.0).num_updates(PACE) == 750


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("unit", ["steps", "percent", "epochs", "tokens"])
def test_what_is_no_number_above_0_is_no_length(unit, value):
    with pytest.raises(ValueError, match=f"{unit}={value} is not a length; use a number above 0"):
        optimizers.LengthConfig(**{unit: value})


def test_a_duration_that_no_run_could_have_is_refused():
    with pytest.raises(ValueError, match="are 2.44e\\+26 updates; use at most 2147483647"):
        optimizers.DurationConfig(tokens=1e30).num_updates(PACE)


def test_warm_up_and_cooldown_last_as_long_as_their_durations_say():
    pace = optimizers.RunLength(epoch=20.0, tokens=1000)
    message = rate_of("wsd", 100, pace, warmup={"epochs": 0.5}, cooldown={"tokens": 3e4})
    counted = rate_of("wsd", 100, pace, warmup={"steps": 10}, cooldown={"steps": 30})
    assert [message(n) for n in range(101)] == [counted(n) for n in range(101)]
    knee = rate_of("rsqrt", 100, pace, warmup={"percent": 10})
    assert knee(40) == pytest.approx(0.02 / 2)


def test_wsd_whose_ends_are_longer_than_the_run_is_refused_with_the_length_it_needs():
    message = "warmup of 40 updates and optimizer.cooldown of 20 .* 50 of the run; .* steps to 60"
    with pytest.raises(ValueError, match=message):
        rate_of("wsd", warmup={"steps": 40})
    with pytest.raises(ValueError, match="warmup of 40 updates"):
        rate_of("wsd", warmup={"percent": 80.0}, cooldown={"steps": 20})
    rate_of("wsd", warmup={"steps": 30})
