"""Learning-rate schedules and the optimizers that follow them, all from optax."""

from __future__ import annotations

import dataclasses
import math

import jax
import optax

from lm import choose


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients; keys and units as in configs/base.py."""

    name: str = "adafactor"
    peak: float = 1e-2
    schedule: str = "rsqrt"
    warmup: int = 10_000
    warmup_duration: str = ""
    cooldown: int = 0
    cooldown_duration: str = ""
    final: float = 0.0
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    decays: str = "(scale|bias)$=0"
    rates: str = ""
    beta1: float = 0.9
    beta2: float = 0.98
    average: float = 0.0

    def __post_init__(self):
        choose.choose(OPTIMIZERS, self.name, "optimizer.name")
        choose.choose(SCHEDULES, self.schedule, "optimizer.schedule")
        bounds = {"peak": (0, 1e3), "final": (0, 1), "weight_decay": (0, 1), "clip_norm": (0, 1e9)}
        # Not 1: Adam divides by 1 - beta^t.
        bounds |= {"beta1": (0, 0.9999), "beta2": (0, 0.99999), "warmup": (0, 2**31)}
        for field, (low, high) in bounds.items():
            value = getattr(self, field)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(
                    f"optimizer.{field}={value} is out of bounds; use {low} to {high:g}."
                )


def rsqrt(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """peak while n < warmup, then peak * sqrt(warmup / n): T5's pre-training schedule."""
    warmup = max(config.warmup, 1)
    return lambda n: config.peak * (warmup / jax.numpy.maximum(n, warmup)) ** 0.5


def constant(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """peak after a linear warm-up: T5's fine-tuning schedule."""
    return _warmed(config, optax.constant_schedule(config.peak))


def linear(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """peak after a linear warm-up, then linear to final * peak after the last update."""
    length = max(steps - config.warmup, 1)
    return _warmed(config, optax.linear_schedule(config.peak, config.final * config.peak, length))


def cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """peak after a linear warm-up, then half a cosine to final * peak after the last."""
    length = max(steps - config.warmup, 1)
    return _warmed(config, optax.cosine_decay_schedule(config.peak, length, config.final))


def _warmed(config: OptimizerConfig, after: optax.Schedule) -> optax.Schedule:
    # Not optax.warmup_constant_schedule: with no warm-up its rate is 0 for ever.
    ramp = optax.linear_schedule(0.0, config.peak, config.warmup)
    return optax.join_schedules([ramp, after], [config.warmup])


SCHEDULES = {"rsqrt": rsqrt, "constant": constant, "linear": linear, "cosine": cosine}


def decays(params) -> dict:
    """True for the parameters that weight decay shrinks: matrices, not norm scales or biases."""

    def decayed(path, leaf):
        return not any(word in jax.tree_util.keystr(path) for word in ("scale", "bias"))

    return jax.tree_util.tree_map_with_path(decayed, params)


def adafactor(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor with T5's settings: steps scaled by the parameter's RMS, no first moment.

    A tower's layers are one parameter here: its RMS, for scale and clipping, is over all of them.

    Weight decay as in `adamw`. Source: Shazeer and Stern 2018, arXiv:1804.04235.
    """
    # optax does not multiply this decay by the learning rate by itself.
    decay = (lambda n: config.weight_decay * rate(n)) if config.weight_decay else None
    return optax.adafactor(
        rate,
        weight_decay_rate=decay,
        weight_decay_mask=decays,
        clipping_threshold=1.0,
    )


def adamw(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW; weight_decay is multiplied by the learning rate, norm scales are not decayed.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    return optax.adamw(
        rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decays
    )


OPTIMIZERS = {"adafactor": adafactor, "adamw": adamw}


def make_optimizer(config: OptimizerConfig, steps: int):
    """(optimizer, schedule): an optax transformation and its learning rate as a function of n."""
    rate = SCHEDULES[config.schedule](config, steps)
    optimizer = OPTIMIZERS[config.name](config, rate)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer, rate
