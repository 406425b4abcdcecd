"""Build an optimizer from a config: clipping, direction, weight decay, learning rate, freezing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.optimizers import param_groups, run_length, schedules, transforms
from lm.optimizers.config import OptimizerConfig


def decay_weights(weight_decay: float, rules: param_groups.Rules) -> optax.GradientTransformation:
    """Add weight_decay * multiplier * weights to the updates; the multiplier is by path."""

    def decay(keys, update, param):
        factor = weight_decay * param_groups.multiplier(rules, keys)
        return update + factor * param if factor else update

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(decay, updates, params)
    )


def scale_learning_rates(rules: param_groups.Rules) -> optax.GradientTransformation:
    """Multiply the update of each parameter by the multiplier of its path."""
    scale = lambda keys, update: update * param_groups.multiplier(rules, keys)
    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates))


def freeze() -> optax.GradientTransformation:
    """Replace updates by -0.0, which leaves the bits of any number that it is added to."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda x: -jnp.zeros_like(x), updates)
    )


def make_optimizer(
    config: OptimizerConfig, steps: int, params: Any, length: run_length.RunLength
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Build an optax transformation and its schedule.

    Frozen parameters have no moments, do not count in the clipped norm, and keep their bits.

    Args:
      config: the section optimizer.
      steps: updates of the whole run.
      params: the tree of parameters, shapes suffice.
      length: for durations in epochs and tokens.

    Raises: ValueError for patterns that match no parameter or freeze all, and durations too long.
    """
    param_groups.check_groups(config, params)
    rules = config.learning_rate_multipliers
    schedule = schedules.SCHEDULES[config.schedule](config.schedule_config(steps, length))
    chain = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
    chain.append(transforms.OPTIMIZERS[config.name](config))
    if config.weight_decay:
        chain.append(decay_weights(config.weight_decay, config.weight_decay_multipliers))
    if rules:
        chain.append(scale_learning_rates(rules))
    optimizer = optax.chain(*chain, optax.scale_by_learning_rate(schedule))

    def label(keys, leaf):
        return "frozen" if param_groups.multiplier(rules, keys) is None else "trained"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if "frozen" in jax.tree.leaves(labels):
        optimizer = optax.partition({"trained": optimizer, "frozen": freeze()}, labels)
    return optimizer, schedule
