"""An optimizer put together from a config: clip, direction, decay, rate; frozen where it says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.optimizers import param_groups, run_length, schedules, transforms
from lm.optimizers.config import OptimizerConfig


def decay_weights(weight_decay: float, rules: param_groups.Rules) -> optax.GradientTransformation:
    """Steps plus weight_decay * multiplier * weights, by path."""

    def decayed(keys, step, x):
        share = weight_decay * param_groups.multiplier(rules, keys)
        return step + share * x if share else step

    return optax.stateless(
        lambda steps, params: jax.tree_util.tree_map_with_path(decayed, steps, params)
    )


def multiply_rates(rules: param_groups.Rules) -> optax.GradientTransformation:
    """Steps times the multiplier of their parameter's path."""
    times = lambda keys, step: step * param_groups.multiplier(rules, keys)
    return optax.stateless(lambda steps, params: jax.tree_util.tree_map_with_path(times, steps))


def freeze() -> optax.GradientTransformation:
    """No step, whatever the gradient: -0.0, which added to any number leaves its bits."""
    return optax.stateless(lambda steps, params: jax.tree.map(lambda x: -jnp.zeros_like(x), steps))


def make_optimizer(
    config: OptimizerConfig, steps: int, params: Any, pace: run_length.RunLength
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """An optax transformation, and its learning rate as a function of the updates before.

    steps: updates of the whole run. params: the tree of parameters, shapes suffice. Frozen ones
    have no moments, no part in the norm that is clipped, and keep their bits.
    Raises ValueError for patterns that fit no parameter or freeze all, and durations too long.
    """
    param_groups.check_groups(config, params)
    rates, decays = (
        param_groups.parse(config.learning_rate_multipliers, "learning_rate_multipliers"),
        param_groups.parse(config.weight_decay_multipliers, "weight_decay_multipliers"),
    )
    rate = schedules.SCHEDULES[config.schedule](config.span(steps, pace))
    links = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
    links.append(transforms.OPTIMIZERS[config.name](config))
    if config.weight_decay:
        links.append(decay_weights(config.weight_decay, decays))
    if rates:
        links.append(multiply_rates(rates))
    optimizer = optax.chain(*links, optax.scale_by_learning_rate(rate))

    def label(keys, leaf):
        return "frozen" if param_groups.multiplier(rates, keys) is None else "trained"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if "frozen" in jax.tree.leaves(labels):
        optimizer = optax.partition({"trained": optimizer, "frozen": freeze()}, labels)
    return optimizer, rate
