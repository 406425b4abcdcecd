"""Learning rates as functions of the number of updates done before."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A rate's course: its peak, the share of it that is left at last, lengths in updates."""

    peak: float
    final: float
    warmup: int
    cooldown: int
    steps: int


def rsqrt(span: ScheduleConfig) -> optax.Schedule:
    """peak while n < warmup, then peak * sqrt(warmup / n): T5's pre-training schedule."""
    warmup = max(span.warmup, 1)
    return lambda n: span.peak * (warmup / jnp.maximum(n, warmup)) ** 0.5


def constant(span: ScheduleConfig) -> optax.Schedule:
    """peak after a linear warm-up: T5's fine-tuning schedule."""
    return _warmed(span, lambda n: 1.0)


def linear(span: ScheduleConfig) -> optax.Schedule:
    """peak after a linear warm-up, then linear to final * peak after the last update."""
    return _warmed(span, lambda n: 1 - _done(span, n, span.warmup))


def cosine(span: ScheduleConfig) -> optax.Schedule:
    """peak after a linear warm-up, then half a cosine to final * peak after the last."""
    return _warmed(span, lambda n: (1 + jnp.cos(jnp.pi * _done(span, n, span.warmup))) / 2)


def wsd(span: ScheduleConfig) -> optax.Schedule:
    """peak after a linear warm-up; over the last `cooldown` updates linear to final * peak.

    Source: Hu et al. 2024, arXiv:2404.06395; linear as in Hägele et al. 2024, arXiv:2405.18392.
    """
    return _warmed(span, lambda n: 1 - _done(span, n, span.steps - span.cooldown))


def _done(span: ScheduleConfig, n, start: int):
    """The share of the way from update `start` to the last, 0 to 1."""
    return jnp.clip((n - start) / max(span.steps - start, 1), 0, 1)


def _warmed(span: ScheduleConfig, left: optax.Schedule) -> optax.Schedule:
    # Not optax.warmup_constant_schedule: with no warm-up its rate is 0 for ever.
    fall = lambda n: span.final + (1 - span.final) * left(n)
    ramp = lambda n: n / span.warmup if span.warmup else 1.0
    return lambda n: span.peak * jnp.where(n < span.warmup, ramp(n), fall(n))


SCHEDULES = {
    "rsqrt": rsqrt,
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
}
FALLING = {"linear", "cosine", "wsd"}  # to a share of the peak that can be chosen
