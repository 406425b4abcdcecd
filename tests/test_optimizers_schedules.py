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
COOLDOWN = {"wsd": 20}
FALLS = ["linear", "cosine", "wsd"]
every_schedule = pytest.mark.parametrize("schedule", optimizers.SCHEDULES)


def rate_of(schedule, steps=STEPS, pace=PACE, **fields):
    """The rate of AdamW with a peak of 0.02; wsd falls over 20 updates, unless fields say else."""
    defaults = dict(name="adamw", learning_rate=0.02, schedule=schedule, warmup=0)
    defaults |= {"cooldown": COOLDOWN[schedule]} if schedule in COOLDOWN else {}
    config = optimizers.OptimizerConfig(**defaults | fields)
    return optimizers.make_optimizer(config, steps, {"w": jnp.zeros(())}, pace)[1]


# Schedules. ----------------------------------------------------------------------------------


@every_schedule
def test_without_warm_up_the_first_update_has_the_peak_rate(schedule):
    assert rate_of(schedule)(0) == pytest.approx(0.02)


@pytest.mark.parametrize("schedule", ["constant", *FALLS])
def test_warm_up_is_linear_from_zero_to_the_peak(schedule):
    rate = rate_of(schedule, warmup=10)
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
        rate = rate_of(schedule, warmup=warmup, final_learning_rate_fraction=final)
        expected = 0.02 * (final + (1 - final) * left)
        np.testing.assert_allclose([rate(i) for i in n], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("schedule", FALLS)
@pytest.mark.parametrize("final", [0.0, 0.25])
def test_after_the_last_update_the_rate_stays_at_its_final_share(schedule, final):
    rate = rate_of(schedule, final_learning_rate_fraction=final, warmup=3)
    rates = [rate(n) for n in (STEPS, STEPS + 1, 10 * STEPS)]
    np.testing.assert_allclose(rates, 0.02 * final, atol=1e-9)


def test_wsd_is_stable_between_warm_up_and_cooldown_and_may_have_no_middle():
    rate = rate_of("wsd", warmup=10, cooldown=15)
    np.testing.assert_allclose([rate(n) for n in range(10, 36)], 0.02, rtol=1e-6)
    assert rate(36) < 0.02 * 0.94
    whole = rate_of("wsd", warmup=30, cooldown=20)
    np.testing.assert_allclose([whole(n) for n in (29, 30, 40)], [0.02 * 29 / 30, 0.02, 0.01], 1e-6)


def test_cosine_is_optax_warm_up_and_cosine():
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.02, 10, STEPS, end_value=0.002)
    ours = rate_of("cosine", warmup=10, final_learning_rate_fraction=0.1)
    steps = range(STEPS + 5)
    np.testing.assert_allclose([ours(n) for n in steps], [theirs(n) for n in steps], rtol=1e-5)


def test_linear_is_optax_warm_up_and_linear():
    ramp, fall = optax.linear_schedule(0, 0.02, 10), optax.linear_schedule(0.02, 0.004, STEPS - 10)
    theirs, ours = (
        optax.join_schedules([ramp, fall], [10]),
        rate_of("linear", warmup=10, final_learning_rate_fraction=0.2),
    )
    steps = range(STEPS + 5)
    np.testing.assert_allclose([ours(n) for n in steps], [theirs(n) for n in steps], rtol=1e-5)


def test_rsqrt_is_t5_one_over_root_n():
    rate = rate_of("rsqrt", warmup=10_000, learning_rate=0.01)
    for n in (0, 1, 9_999, 10_000, 40_000, 1_000_000):
        assert rate(n) == pytest.approx(1 / math.sqrt(max(n, 10_000)), rel=1e-6)


@every_schedule
def test_a_rate_is_the_same_compiled_and_never_negative(schedule):
    final = {"final_learning_rate_fraction": 0.1} if schedule in FALLS else {}
    rate = rate_of(schedule, warmup=7, **final)
    steps = jnp.arange(2 * STEPS)
    compiled = jax.jit(jax.vmap(rate))(steps)
    np.testing.assert_allclose(compiled, [rate(n) for n in range(2 * STEPS)], rtol=1e-5)
    assert compiled.min() >= 0 and compiled.max() == pytest.approx(0.02)


# Durations. ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 100, 65_536, 2**31 - 1])
def test_a_number_of_updates_in_any_unit_is_that_number_again(count):
    total = 2**31 - 1
    for pace in (PACE, optimizers.RunLength(1 / 3, 1), optimizers.RunLength(1e7, 2**23)):
        texts = {
            "updates": count,
            "epochs": count / pace.epoch,
            "tokens": count * pace.tokens,
            "percent": 100 * count / total,
        }
        for unit, number in texts.items():
            assert optimizers.num_updates(f"{number} {unit}", total, pace) == count, (unit, pace)


def test_durations_are_rounded_to_the_nearest_update_and_are_never_none():
    assert optimizers.num_updates("2 percent", 65_536, PACE) == 1311  # of 1310.72
    assert optimizers.num_updates("1e6 tokens", 0, PACE) == 244  # of 244.14
    assert optimizers.num_updates("1e-6 epochs", 0, PACE) == 1


BAD = ["2", "percent", "2 percent 3 epochs", "2percent", "-1 epochs", "0 updates", "nan tokens"]
BAD += ["inf epochs", "two epochs", "1,000 updates", " "]


@pytest.mark.parametrize("text", BAD)
def test_what_is_not_one_number_and_one_unit_is_no_duration(text):
    with pytest.raises(ValueError, match="is not one duration, a number above 0 and a unit; write"):
        optimizers.num_updates(text, 100, PACE)
    with pytest.raises(ValueError, match="is not one duration"):  # before anything is made
        optimizers.OptimizerConfig(warmup=0, warmup_duration=text)


def test_a_wrong_unit_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unit of '1 epoch'='epoch' .* did you mean 'epochs'"):
        optimizers.num_updates("1 epoch", 100, PACE)


def test_a_duration_that_no_run_could_have_is_refused():
    with pytest.raises(ValueError, match="are 2.44e\\+26 updates here; use at most 2147483647"):
        optimizers.num_updates("1e30 tokens", 100, PACE)


def test_percent_is_no_length_for_the_run_itself():
    with pytest.raises(ValueError, match="'3 percent' of a run is no length for it; use updates"):
        optimizers.num_updates("3 percent", 0, PACE)
    assert optimizers.num_updates("3 epochs", 0, PACE) == 750


def test_warm_up_and_cooldown_last_as_long_as_their_durations_say():
    pace = optimizers.RunLength(epoch=20.0, tokens=1000)
    said = rate_of("wsd", 100, pace, warmup_duration="0.5 epochs", cooldown_duration="3e4 tokens",
                   cooldown=0)  # fmt: skip
    counted = rate_of("wsd", 100, pace, warmup=10, cooldown=30)
    assert [said(n) for n in range(101)] == [counted(n) for n in range(101)]
    knee = rate_of("rsqrt", 100, pace, warmup_duration="10 percent")
    assert knee(40) == pytest.approx(0.02 / 2)


def test_wsd_whose_ends_are_longer_than_the_run_is_refused_with_the_length_it_needs():
    message = "warmup of 40 updates and optimizer.cooldown of 20 .* 50 of the run; .* steps to 60"
    with pytest.raises(ValueError, match=message):
        rate_of("wsd", warmup=40)
    with pytest.raises(ValueError, match="warmup of 40 updates"):
        rate_of("wsd", warmup_duration="80 percent", cooldown=0, cooldown_duration="20 updates")
    rate_of("wsd", warmup=30)
