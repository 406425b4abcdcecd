"""Learning-rate schedules: functions of n, the number of previous updates."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The peak rate, the final rate as a fraction of it, and lengths in updates."""

    peak: float
    final: float
    warmup: int
    cooldown: int
    steps: int


def rsqrt(config: ScheduleConfig) -> optax.Schedule:
    """peak while n < warmup, then peak * sqrt(warmup / n): T5's pre-training schedule."""
    warmup = max(config.warmup, 1)
    return lambda n: config.peak * (warmup / jnp.maximum(n, warmup)) ** 0.5


def constant(config: ScheduleConfig) -> optax.Schedule:
    """peak after a linear warm-up: T5's fine-tuning schedule."""
    return _with_warmup(config, lambda n: 1.0)


def linear(config: ScheduleConfig) -> optax.Schedule:
    """peak after a linear warm-up, then linear to final * peak after the last update."""
    return _with_warmup(config, lambda n: 1 - _progress(config, n, config.warmup))


def cosine(config: ScheduleConfig) -> optax.Schedule:
    """peak after a linear warm-up, then half a cosine to final * peak after the last update."""
    progress = lambda n: _progress(config, n, config.warmup)
    return _with_warmup(config, lambda n: (1 + jnp.cos(jnp.pi * progress(n))) / 2)


def wsd(config: ScheduleConfig) -> optax.Schedule:
    """peak after a linear warm-up; linear to final * peak over the last `cooldown` updates.

    Source: Hu et al. 2024, arXiv:2404.06395; linear as in Hägele et al. 2024, arXiv:2405.18392.
    """
    start = config.steps - config.cooldown
    return _with_warmup(config, lambda n: 1 - _progress(config, n, start))


def _progress(config: ScheduleConfig, n, start: int):
    """Completed fraction of the updates from `start` to the last, 0 to 1."""
    return jnp.clip((n - start) / max(config.steps - start, 1), 0, 1)


def _with_warmup(config: ScheduleConfig, decay: optax.Schedule) -> optax.Schedule:
    # optax.warmup_constant_schedule without a warm-up would return 0.
    rate = lambda n: config.final + (1 - config.final) * decay(n)
    warmup = lambda n: n / config.warmup if config.warmup else 1.0
    return lambda n: config.peak * jnp.where(n < config.warmup, warmup(n), rate(n))


SCHEDULES = {
    "rsqrt": rsqrt,
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
}
DECAYING = {"linear", "cosine", "wsd"}  # to final_learning_rate_fraction
