"""The optimizers: from gradients to the updates that the learning rate multiplies.

Whatever is measured of a parameter (its RMS, the rows and columns of its moments) is measured for
each layer's matrix, as if a tower's layers were not stacked in one array.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.optimizers import param_groups

MIN_PARAM_RMS = 1e-3  # so that zeros can grow
MIN_FACTORED_DIM = 128  # a matrix with fewer rows or columns keeps all its squares


class FactoredState(NamedTuple):
    """Adafactor's state: the number of updates, and running means of the squared gradient.

    rows [.., rows] and columns [.., columns] of factored matrices, `whole` of all others; None
    where a parameter has none.
    """

    count: jax.Array
    rows: Any
    columns: Any
    whole: Any


def _mean(x, axes, keepdims: bool = True):
    return jnp.mean(x, axes, keepdims=keepdims) if axes else x


def _rms(x, axes):
    return jnp.sqrt(_mean(jnp.square(x), axes))


def _is_factored(shape, axes, min_dim: int) -> bool:
    return all(side and math.prod(shape[axis] for axis in side) >= min_dim for side in axes)


def _unzip(like, tree):
    """Split a tree of equally long tuples into that many trees of the structure of `like`."""
    structure = jax.tree.structure(like)
    columns = zip(*structure.flatten_up_to(tree), strict=True)
    return [jax.tree.unflatten(structure, column) for column in columns]


def scale_by_factored_moment(min_dim: int = MIN_FACTORED_DIM) -> optax.GradientTransformation:
    """Divide gradients by the root of their factored second moment; clip each matrix to RMS 1.

    min_dim: rows and columns from which a matrix is factored.
    """

    def init(params):
        def zeros(keys, x):
            axes = param_groups.matrix_axes(keys, x.ndim)
            without = lambda removed: jnp.zeros(
                [size for axis, size in enumerate(x.shape) if axis not in removed]
            )
            if _is_factored(x.shape, axes, min_dim):
                return without(axes[1]), without(axes[0]), None
            return None, None, without(())

        moments = jax.tree_util.tree_map_with_path(zeros, params)
        return FactoredState(jnp.zeros([], jnp.int32), *_unzip(params, moments))

    def update(grads, state, params=None):
        count = state.count + 1
        decay = 1 - count.astype(jnp.float32) ** -0.8

        def update_leaf(keys, grad, rows, columns, whole):
            row_axes, column_axes = axes = param_groups.matrix_axes(keys, grad.ndim)
            square = jnp.square(grad) + 1e-30
            average = lambda old, new: decay * old + (1 - decay) * new
            if whole is not None:
                whole = average(whole, square)
                step = grad * jax.lax.rsqrt(whole)
            else:
                rows = average(rows, _mean(square, column_axes, keepdims=False))
                columns = average(columns, _mean(square, row_axes, keepdims=False))
                row_moment = jnp.expand_dims(rows, column_axes)
                step = grad * jax.lax.rsqrt(row_moment / _mean(row_moment, row_axes))
                step *= jax.lax.rsqrt(jnp.expand_dims(columns, row_axes))
            step /= jnp.maximum(1.0, _rms(step, sum(axes, ())))
            return step, rows, columns, whole

        results = jax.tree_util.tree_map_with_path(update_leaf, grads, *state[1:])
        steps, *moments = _unzip(grads, results)
        return steps, FactoredState(count, *moments)

    return optax.GradientTransformation(init, update)


def scale_by_late_adam(beta1: float, beta2: float) -> optax.GradientTransformation:
    """Adam that adds its 1e-6 to the root before the bias correction, as nanoT5 does."""

    def update(grads, state, params=None):
        count = state.count + 1
        mean = optax.tree.update_moment(grads, state.mu, beta1, 1)
        square = optax.tree.update_moment_per_elem_norm(grads, state.nu, beta2, 2)
        correction = jnp.sqrt(1 - beta2**count) / (1 - beta1**count)
        steps = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + 1e-6), mean, square)
        return steps, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def scale_by_param_rms() -> optax.GradientTransformation:
    """Multiply updates by the RMS of their matrix, at least 1e-3.

    LoRA factors are left out: b starts at 0, and at a rate of 1e-3 would never matter.
    """

    def scale(keys, step, x):
        if param_groups.path_of(keys).startswith("adapters/"):
            return step
        axes = sum(param_groups.matrix_axes(keys, x.ndim), ())
        return step * jnp.maximum(_rms(x, axes), MIN_PARAM_RMS)

    return optax.stateless(
        lambda steps, params: jax.tree_util.tree_map_with_path(scale, steps, params)
    )


def adafactor(config, min_dim: int = MIN_FACTORED_DIM) -> optax.GradientTransformation:
    """Adafactor with T5's settings: updates scaled by the parameter's RMS, no first moment.

    min_dim: rows and columns from which a matrix is factored.
    Source: Shazeer and Stern 2018, arXiv:1804.04235; layers and heads as in T5X.
    """
    return optax.chain(scale_by_factored_moment(min_dim), scale_by_param_rms())


def adamw(config) -> optax.GradientTransformation:
    """AdamW. Source: Loshchilov and Hutter 2019, arXiv:1711.05101."""
    return optax.scale_by_adam(config.beta1, config.beta2)


def adamw_rms(config) -> optax.GradientTransformation:
    """AdamW with updates scaled by the parameter's RMS, so that T5's learning rates fit.

    Source: Nawrot 2023, arXiv:2309.02373 (nanoT5's AdamWScale, which decays after the update; this
    decays before it, as AdamW does).
    """
    return optax.chain(scale_by_late_adam(config.beta1, config.beta2), scale_by_param_rms())


def muon(config) -> optax.GradientTransformation:
    """Orthogonalized momentum for the kernels of layers, AdamW for all else, at one rate.

    An orthogonal matrix is multiplied by 0.2 * sqrt(max(rows, columns)), so that its RMS is 0.2, as
    AdamW's tends to be: learning rates and decays of AdamW fit both.
    Source: Jordan 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025,
    arXiv:2502.16982 (the factor).
    """

    def labels(params):
        label = lambda keys, x: "muon" if _is_layer_kernel(keys) else "adamw"
        return jax.tree_util.tree_map_with_path(label, params)

    def dimension_numbers(params):
        make = lambda keys, x: optax.contrib.MuonDimensionNumbers(
            *param_groups.matrix_axes(keys, x.ndim)
        )
        return jax.tree_util.tree_map_with_path(make, params)

    def scale(keys, step):
        axes = param_groups.matrix_axes(keys, step.ndim)
        sides = (math.prod(step.shape[axis] for axis in side) for side in axes)
        return 0.2 * math.sqrt(max(sides)) * step

    orthogonalized = optax.chain(
        optax.contrib.scale_by_muon(beta=config.beta1, weight_dimension_numbers=dimension_numbers),
        optax.stateless(lambda steps, params: jax.tree_util.tree_map_with_path(scale, steps)),
    )
    return optax.partition({"muon": orthogonalized, "adamw": adamw(config)}, labels)


def _is_layer_kernel(keys) -> bool:
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
