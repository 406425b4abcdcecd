"""make_optimizer: clipping, the optimizer, weight decay, learning rate, frozen parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.optimizers import param_groups, run_length, schedules, transforms
from lm.optimizers.config import OptimizerConfig


def _decay_weights(weight_decay: float, rules: param_groups.Rules) -> optax.GradientTransformation:
    """Add weight_decay * multiplier * weights to the updates; the multiplier is by path."""

    def decay(path, update, param):
        factor = weight_decay * param_groups.multiplier(rules, path)
        return update + factor * param if factor else update

    return transforms.map_updates(decay)


def _scale_learning_rates(rules: param_groups.Rules) -> optax.GradientTransformation:
    """Multiply the update of each parameter by the multiplier of its path."""
    return transforms.map_updates(
        lambda path, update, param: update * param_groups.multiplier(rules, path)
    )


def make_optimizer(
    config: OptimizerConfig, steps: int, params: Any, length: run_length.RunLength
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Build an optax transformation and its schedule.

    Frozen parameters have no moments, do not count in the clipped norm, and keep their bits.

    Args:
      config: the section optimizer.
      steps: updates of the whole run.
      params: the tree of parameters; shapes suffice.
      length: converts durations in epochs and tokens.

    Raises: ValueError for patterns that match no parameter or freeze all, and durations too long.
    """
    param_groups.check_groups(config, params)
    rules = config.learning_rate_multipliers
    schedule = schedules.SCHEDULES[config.schedule](config.schedule_config(steps, length))
    chain = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
    chain.append(transforms.OPTIMIZERS[config.name](config))
    if config.weight_decay:
        chain.append(_decay_weights(config.weight_decay, config.weight_decay_multipliers))
    if rules:
        chain.append(_scale_learning_rates(rules))
    optimizer = optax.chain(*chain, optax.scale_by_learning_rate(schedule))

    def label(path, leaf):
        return "frozen" if param_groups.multiplier(rules, path) is None else "trained"

    labels = param_groups.map_with_path(label, params)
    if "frozen" in jax.tree.leaves(labels):
        # Adding -0.0 keeps the bits of every number.
        freeze = transforms.map_updates(lambda path, update, param: -jnp.zeros_like(update))
        optimizer = optax.partition({"trained": optimizer, "frozen": freeze}, labels)
    return optimizer, schedule
