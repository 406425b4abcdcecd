"""Which way: the optimizers, each from gradients to the step that the learning rate multiplies.

Whatever is measured of a parameter (its size, its moments' rows and columns) is measured of each
layer's matrix by itself, as if a tower's layers were not stacked in one array.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.optimizers import param_groups

LEAST_SIZE = 1e-3  # of a parameter, so that zeros can grow
FACTORED = 128  # a matrix with as many rows and columns keeps sums of both, not all its squares


class FactoredState(NamedTuple):
    """Adafactor's memory: updates done, running means of the squared gradient.

    rows [.., rows], columns [.., columns] of factored matrices, whole of all else; None elsewhere.
    """

    count: jax.Array
    rows: Any
    columns: Any
    whole: Any


def _mean(x, axes, keep: bool = True):
    return jnp.mean(x, axes, keepdims=keep) if axes else x


def _size(x, axes):
    """Root mean square over some axes, which stay with length 1."""
    return jnp.sqrt(_mean(jnp.square(x), axes))


def _is_factored(shape, axes, least: int) -> bool:
    return all(part and math.prod(shape[axis] for axis in part) >= least for part in axes)


def _unzip(like, tree):
    """A tree of equally long tuples as that many trees, each with the structure of `like`."""
    tuples = jax.tree.structure(like).flatten_up_to(tree)
    return [
        jax.tree.unflatten(jax.tree.structure(like), parts) for parts in zip(*tuples, strict=True)
    ]


def scale_by_factored_moment(least: int = FACTORED) -> optax.GradientTransformation:
    """Gradients over the root of their factored second moment, each matrix clipped to RMS 1.

    least: rows and columns from which a matrix is factored.
    """

    def init(params):
        def zeros(keys, x):
            axes = param_groups.matrix(keys, x.ndim)
            lacking = lambda gone: jnp.zeros([n for i, n in enumerate(x.shape) if i not in gone])
            if _is_factored(x.shape, axes, least):
                return lacking(axes[1]), lacking(axes[0]), None
            return None, None, lacking(())

        moments = jax.tree_util.tree_map_with_path(zeros, params)
        return FactoredState(jnp.zeros([], jnp.int32), *_unzip(params, moments))

    def update(grads, state, params=None):
        count = state.count + 1
        decay = 1 - count.astype(jnp.float32) ** -0.8

        def one(keys, grad, rows, columns, whole):
            down, across = axes = param_groups.matrix(keys, grad.ndim)
            square = jnp.square(grad) + 1e-30
            mixed = lambda old, new: decay * old + (1 - decay) * new
            if whole is not None:
                whole = mixed(whole, square)
                step = grad * jax.lax.rsqrt(whole)
            else:
                rows = mixed(rows, _mean(square, across, keep=False))
                columns = mixed(columns, _mean(square, down, keep=False))
                spread = jnp.expand_dims(rows, across)
                step = grad * jax.lax.rsqrt(spread / _mean(spread, down))
                step *= jax.lax.rsqrt(jnp.expand_dims(columns, down))
            step /= jnp.maximum(1.0, _size(step, sum(axes, ())))
            return step, rows, columns, whole

        done = jax.tree_util.tree_map_with_path(one, grads, *state[1:])
        steps, *moments = _unzip(grads, done)
        return steps, FactoredState(count, *moments)

    return optax.GradientTransformation(init, update)


def scale_by_late_adam(beta1: float, beta2: float) -> optax.GradientTransformation:
    """Adam whose 1e-6 is added to the root before its bias is corrected, as nanoT5's does."""

    def update(grads, state, params=None):
        count = state.count + 1
        mean = optax.tree.update_moment(grads, state.mu, beta1, 1)
        square = optax.tree.update_moment_per_elem_norm(grads, state.nu, beta2, 2)
        size = jnp.sqrt(1 - beta2**count) / (1 - beta1**count)
        steps = jax.tree.map(lambda m, v: size * m / (jnp.sqrt(v) + 1e-6), mean, square)
        return steps, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def scale_by_param_rms() -> optax.GradientTransformation:
    """Steps times the RMS of the matrix that they are for, 1e-3 at least.

    Those of LoRA's factors stay as they are: b starts at 0, and at 1e-3 would never be of use.
    """

    def scaled(keys, step, x):
        if param_groups.path_of(keys).startswith("adapters/"):
            return step
        return step * jnp.maximum(_size(x, sum(param_groups.matrix(keys, x.ndim), ())), LEAST_SIZE)

    return optax.stateless(
        lambda steps, params: jax.tree_util.tree_map_with_path(scaled, steps, params)
    )


def adafactor(config, least: int = FACTORED) -> optax.GradientTransformation:
    """Adafactor with T5's settings: steps scaled by the parameter's RMS, no first moment.

    least: rows and columns from which a matrix is factored.
    Source: Shazeer and Stern 2018, arXiv:1804.04235; layers and heads as in T5X.
    """
    return optax.chain(scale_by_factored_moment(least), scale_by_param_rms())


def adamw(config) -> optax.GradientTransformation:
    """AdamW. Source: Loshchilov and Hutter 2019, arXiv:1711.05101."""
    return optax.scale_by_adam(config.beta1, config.beta2)


def adamw_rms(config) -> optax.GradientTransformation:
    """AdamW with steps scaled by the parameter's RMS, so that T5's rates serve it.

    Source: Nawrot 2023, arXiv:2309.02373 (nanoT5's AdamWScale; its decay comes after the step,
    ours, as AdamW's, before).
    """
    return optax.chain(scale_by_late_adam(config.beta1, config.beta2), scale_by_param_rms())


def muon(config) -> optax.GradientTransformation:
    """Momentum made orthogonal for the kernels of layers, AdamW for all else, at one rate.

    An orthogonal matrix's step is multiplied by 0.2 * sqrt(max(rows, columns)), so that its RMS is
    0.2, as AdamW's tends to be: rates and decays that serve AdamW serve both.
    Source: Jordan 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025,
    arXiv:2502.16982 (the size).
    """

    def labels(params):
        label = lambda keys, x: "muon" if _is_hidden(keys) else "adamw"
        return jax.tree_util.tree_map_with_path(label, params)

    def numbers(params):
        make = lambda keys, x: optax.contrib.MuonDimensionNumbers(
            *param_groups.matrix(keys, x.ndim)
        )
        return jax.tree_util.tree_map_with_path(make, params)

    def sized(keys, step):
        sides = (
            math.prod(step.shape[i] for i in axes) for axes in param_groups.matrix(keys, step.ndim)
        )
        return 0.2 * math.sqrt(max(sides)) * step

    orthogonal = optax.chain(
        optax.contrib.scale_by_muon(beta=config.beta1, weight_dimension_numbers=numbers),
        optax.stateless(lambda steps, params: jax.tree_util.tree_map_with_path(sized, steps)),
    )
    return optax.partition({"muon": orthogonal, "adamw": adamw(config)}, labels)


def _is_hidden(keys) -> bool:
    names = param_groups.path_of(keys).split("/")
    return "layers" in names and names[-1] == "kernel"


def lion(config) -> optax.GradientTransformation:
    """The sign of a momentum. Source: Chen et al. 2023, arXiv:2302.06675."""
    return optax.scale_by_lion(config.beta1, config.beta2)


OPTIMIZERS = {
    "adafactor": adafactor,
    "adamw": adamw,
    "adamw_rms": adamw_rms,
    "muon": muon,
    "lion": lion,
}
