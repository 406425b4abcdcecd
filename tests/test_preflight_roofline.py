"""Estimated times and costs: units, lower bounds, and the length of a whole run."""

from __future__ import annotations

import dataclasses

import pytest

from lm.preflight import compiler, roofline, slices

V5E = slices.CHIPS["v5e"]


def compiled(flops: float = 2e12, sent: float = 1e9, **fields) -> compiler.Compiled:
    """An update on 8 chips. flops, sent: of one chip."""
    fields = dict(target="v5e-8", chip=V5E, chips=8, hosts=1, sizes={}) | fields
    fields |= dict(executed_flops=flops * fields["chips"], collectives={"all-gather": sent})
    return compiler.Compiled(**dict(model_flops=8 * 1.5e12) | fields)


def seconds(**fields) -> float:
    return roofline.estimate(compiled(**fields)).seconds


def test_work_for_one_second_of_each_resource_takes_one_second():
    estimate = roofline.estimate(compiled(V5E.flops, V5E.network))
    assert (estimate.compute_seconds, estimate.network_seconds, estimate.seconds) == (1, 1, 1)


def test_a_v5e_multiplies_two_matrices_of_8192_in_5_6_milliseconds():
    # By hand: 2 x 8192^3 / 197e12 = 5.58 ms.
    estimate = roofline.estimate(compiled(2 * 8192**3, 0))
    assert estimate.seconds == pytest.approx(5.581e-3, rel=1e-3) and estimate.bound == "compute"


@pytest.mark.parametrize("resource", ["flops", "sent"])
def test_more_work_never_takes_less_time(resource):
    for times in (1.5, 10):
        assert seconds(**{resource: {"flops": 2e12, "sent": 1e9}[resource] * times}) >= seconds()
    assert seconds(**{resource: 1e16}) > seconds()


@pytest.mark.parametrize("property", ["flops", "network"])
def test_a_better_chip_is_never_slower(property):
    better = dataclasses.replace(V5E, **{property: 2 * getattr(V5E, property)})
    assert seconds(chip=better) <= seconds()


def test_the_bound_is_the_slower_resource():
    assert roofline.estimate(compiled(flops=1e15)).bound == "compute"
    assert roofline.estimate(compiled(sent=1e13)).bound == "network"


def test_a_single_chip_needs_no_network():
    single = dataclasses.replace(V5E, network=0)
    assert roofline.estimate(compiled(sent=0, chip=single)).network_seconds == 0


def test_mfu_is_one_without_recomputation_and_network():
    assert roofline.estimate(compiled(1.5e12, 0)).mfu == pytest.approx(1)
    recomputed = compiled(1.5e12 * 4 / 3, 0)  # a second forward pass
    assert roofline.estimate(recomputed).mfu == pytest.approx(3 / 4)


def test_days_and_costs_of_a_run_are_proportional_to_its_updates():
    one_second = compiled(V5E.flops, 0)
    run = roofline.estimate(one_second, tokens=65_536, updates=86_400, price=1.2)
    assert run.days == 1 and run.chip_hours == 8 * 24
    assert run.tokens_per_day == 65_536 * 86_400
    assert run.cost == pytest.approx(8 * 24 * 1.2)
    assert roofline.estimate(one_second, updates=86_400).cost is None


def test_twice_the_chips_take_half_the_days_for_the_same_chip_hours():
    run = dict(updates=10_000, price=1)
    small = roofline.estimate(compiled(2e12, 0), **run)
    large = roofline.estimate(compiled(1e12, 0, chips=16), **run)
    assert large.days == pytest.approx(small.days / 2)
    assert (large.chip_hours, large.cost) == pytest.approx((small.chip_hours, small.cost))
    assert large.mfu == pytest.approx(small.mfu)
