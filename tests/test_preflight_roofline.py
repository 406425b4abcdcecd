"""Laws of predicted times: units, bounds from below, and what a whole run takes."""

from __future__ import annotations

import dataclasses

import pytest

from lm.preflight import roofline, slices

V5E = slices.CHIPS["v5e"]
LOAD = dict(flops=2e12, memory_bytes=4e9, network=1e9, alone=1e9)
RUN = dict(chips=8, model_flops=1.2e13, tokens=65_536, updates=10_000)


def test_a_second_of_each_resource_takes_a_second():
    full = roofline.predict(
        V5E, flops=V5E.flops, memory_bytes=V5E.bandwidth, network=V5E.network, alone=0
    )
    assert (full.compute_s, full.memory_s, full.network_s, full.step_s) == (1, 1, 1, 1)


def test_a_v5e_multiplies_two_matrices_of_8192_in_5_6_milliseconds():
    size = 8192  # by hand: 2 x 8192^3 / 197e12 = 5.58 ms; 3 matrices of 2 bytes / 819e9 = 0.49 ms
    made = roofline.predict(V5E, flops=2 * size**3, memory_bytes=3 * 2 * size**2, network=0)
    assert made.step_s == pytest.approx(5.581e-3, rel=1e-3)
    assert made.memory_s == pytest.approx(0.4917e-3, rel=1e-3)
    assert made.bound == "compute"


@pytest.mark.parametrize("what", LOAD)
def test_more_work_never_takes_less_time(what):
    base = roofline.predict(V5E, **LOAD).step_s
    for times in (1.5, 10, 1000):
        more = LOAD | {what: LOAD[what] * times}
        more["memory_bytes"] = max(more["memory_bytes"], more["alone"])
        assert roofline.predict(V5E, **more).step_s >= base
    assert roofline.predict(V5E, **LOAD | {what: LOAD[what] * 1000}).step_s > base


@pytest.mark.parametrize("what", ["flops", "bandwidth", "network"])
def test_a_better_chip_is_never_slower(what):
    better = dataclasses.replace(V5E, **{what: 2 * getattr(V5E, what)})
    assert roofline.predict(better, **LOAD).step_s <= roofline.predict(V5E, **LOAD).step_s


def test_a_step_takes_at_least_each_resource_and_at_most_their_sum():
    for alone in (0, 1e9, 4e9):
        made = roofline.predict(V5E, **LOAD | {"alone": alone})
        parts = made.compute_s, made.memory_s, made.network_s
        assert max(parts) <= made.step_s <= sum(parts)


def test_what_no_product_hides_is_added_to_the_products():
    made = roofline.predict(V5E, flops=V5E.flops, memory_bytes=V5E.bandwidth, network=0)
    assert made.step_s == 1
    apart = dataclasses.replace(made, alone_s=0.25)
    assert apart.step_s == 1.25
    assert dataclasses.replace(made, alone_s=1.0).step_s == 2


def test_the_network_is_free_for_a_chip_that_has_none():
    lonely = dataclasses.replace(V5E, network=0)
    assert roofline.predict(lonely, **LOAD | {"network": 0}).network_s == 0


@pytest.mark.parametrize(
    ("changed", "bound"),
    [
        ({"flops": 1e15}, "compute"),
        ({"memory_bytes": 1e13}, "memory"),
        ({"network": 1e13}, "network"),
    ],
)
def test_the_bound_is_what_the_step_waits_for(changed, bound):
    assert roofline.predict(V5E, **LOAD | changed).bound == bound


def test_mfu_is_one_where_only_the_model_is_computed_and_nothing_else_waits():
    flops = RUN["model_flops"] / RUN["chips"]
    made = roofline.predict(V5E, flops=flops, memory_bytes=0, network=0)
    assert roofline.plan(made, V5E, **RUN).mfu == pytest.approx(1)
    again = roofline.predict(V5E, flops=flops * 4 / 3, memory_bytes=0, network=0)
    assert roofline.plan(again, V5E, **RUN).mfu == pytest.approx(3 / 4)  # a forward pass twice


def test_a_run_is_its_updates_one_after_the_other():
    second = roofline.Prediction(compute_s=1, memory_s=0, network_s=0)
    made = roofline.plan(second, V5E, price=1.2, **RUN | {"updates": 86_400})
    assert made.days == 1 and made.chip_hours == 8 * 24
    assert made.tokens_per_day == 65_536 * 86_400
    assert made.cost == pytest.approx(8 * 24 * 1.2)


def test_without_a_price_there_is_no_cost():
    assert roofline.plan(roofline.predict(V5E, **LOAD), V5E, **RUN).cost is None


def test_twice_the_chips_take_half_the_days_for_the_same_chip_hours():
    work = dict(memory_bytes=0, network=0)
    one = roofline.plan(roofline.predict(V5E, flops=2e12, **work), V5E, price=1, **RUN)
    half = roofline.predict(V5E, flops=1e12, **work)
    two = roofline.plan(half, V5E, price=1, **RUN | {"chips": 16})
    assert two.days == pytest.approx(one.days / 2)
    assert (two.chip_hours, two.cost) == pytest.approx((one.chip_hours, one.cost))
    assert two.mfu == pytest.approx(one.mfu)
