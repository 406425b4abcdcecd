"""The optimizers: from gradients to updates, which the chain multiplies by the learning rate.

Statistics of a parameter (its RMS, the rows and columns of its second moment) are computed per
layer, although a tower stacks its layers in one array.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm.optimizers import param_groups

if TYPE_CHECKING:
    from lm.optimizers.config import OptimizerConfig

MIN_PARAM_RMS = 1e-3  # parameters that are zero must be able to grow
MIN_FACTORED_DIM = 128


class FactoredState(NamedTuple):
    """Adafactor's state: the number of updates, and running means of the squared gradient.

    A factored matrix has `rows` [.., rows] and `columns` [.., columns], any other parameter
    `whole`; the rest is None.
    """

    count: jax.Array
    rows: Any
    columns: Any
    whole: Any


def map_updates(function: Callable) -> optax.GradientTransformation:
    """Return the stateless transformation (path, update, param) -> update of every parameter."""
    return optax.stateless(
        lambda updates, params: param_groups.map_with_path(function, updates, params)
    )


def _mean(x, axes, keepdims: bool = True):
    return jnp.mean(x, axes, keepdims=keepdims) if axes else x


def _rms(x, axes):
    return jnp.sqrt(_mean(jnp.square(x), axes))


def _unzip(like, tree):
    """Split a tree of equally long tuples into that many trees of the structure of `like`."""
    structure = jax.tree.structure(like)
    columns = zip(*structure.flatten_up_to(tree), strict=True)
    return [jax.tree.unflatten(structure, column) for column in columns]


def _init_moments(path, x, min_dim: int):
    """Zeros for the (rows, columns, whole) of FactoredState."""
    axes = param_groups.matrix_axes(path, x.ndim)
    sizes = (math.prod(x.shape[axis] for axis in side) for side in axes)
    if not (all(axes) and min(sizes) >= min_dim):
        return None, None, jnp.zeros(x.shape)
    zeros = lambda reduced: jnp.zeros([n for i, n in enumerate(x.shape) if i not in reduced])
    return zeros(axes[1]), zeros(axes[0]), None


def _update_moments(path, grad, rows, columns, whole, decay):
    """Return the parameter's update and its new (rows, columns, whole)."""
    row_axes, column_axes = param_groups.matrix_axes(path, grad.ndim)
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
    step /= jnp.maximum(1.0, _rms(step, row_axes + column_axes))
    return step, rows, columns, whole


def _scale_by_factored_moment(min_dim: int) -> optax.GradientTransformation:
    """Divide gradients by the root of their second moment, factored into rows and columns.

    Each parameter's update is then clipped to RMS 1: divided by its RMS if that exceeds 1. A
    matrix with fewer than min_dim rows or columns is not factored.
    """

    def init(params):
        moments = param_groups.map_with_path(
            lambda path, x: _init_moments(path, x, min_dim), params
        )
        return FactoredState(jnp.zeros([], jnp.int32), *_unzip(params, moments))

    def update(grads, state, params=None):
        count = state.count + 1
        decay = 1 - count.astype(jnp.float32) ** -0.8
        update_leaf = lambda *args: _update_moments(*args, decay)
        results = param_groups.map_with_path(update_leaf, grads, *state[1:])
        steps, *moments = _unzip(grads, results)
        return steps, FactoredState(count, *moments)

    return optax.GradientTransformation(init, update)


def _scale_by_late_adam(beta1: float, beta2: float) -> optax.GradientTransformation:
    """Adam that adds epsilon 1e-6 to the root before the bias correction, as nanoT5 does."""

    def update(grads, state, params=None):
        count = state.count + 1
        mean = optax.tree.update_moment(grads, state.mu, beta1, 1)
        square = optax.tree.update_moment_per_elem_norm(grads, state.nu, beta2, 2)
        correction = jnp.sqrt(1 - beta2**count) / (1 - beta1**count)
        steps = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + 1e-6), mean, square)
        return steps, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def _scale_by_param_rms() -> optax.GradientTransformation:
    """Multiply each parameter's update by the parameter's RMS, at least 1e-3.

    Updates of LoRA's factors are unchanged: b starts at 0, and at 1e-3 would hardly grow.
    """

    def scale(path, step, param):
        if path.startswith("adapters/"):
            return step
        axes = sum(param_groups.matrix_axes(path, param.ndim), ())
        return step * jnp.maximum(_rms(param, axes), MIN_PARAM_RMS)

    return map_updates(scale)


def adafactor(
    config: OptimizerConfig, min_dim: int = MIN_FACTORED_DIM
) -> optax.GradientTransformation:
    """Adafactor with T5's settings: updates scaled by the parameter's RMS, no first moment.

    min_dim: a matrix with fewer rows or columns keeps the second moment of every element.
    Source: Shazeer and Stern 2018, arXiv:1804.04235; layers and heads as in T5X.
    """
    return optax.chain(_scale_by_factored_moment(min_dim), _scale_by_param_rms())


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW; the chain adds its decay. Source: Loshchilov and Hutter 2019, arXiv:1711.05101."""
    return optax.scale_by_adam(config.beta1, config.beta2)


def adamw_rms(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's updates times the parameter's RMS, so that T5's learning rates fit; LoRA's are not.

    The chain adds the weight decay, which is not scaled.
    Source: Nawrot 2023, arXiv:2309.02373 (nanoT5's AdamWScale, which decays the updated weights).
    """
    return optax.chain(_scale_by_late_adam(config.beta1, config.beta2), _scale_by_param_rms())


def muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Orthogonalized momentum for the kernels of layers, AdamW for all other parameters.

    An orthogonal matrix is multiplied by 0.2 * sqrt(max(rows, columns)), so that its RMS is 0.2, as
    AdamW's tends to be: learning rates and decays of AdamW fit both.
    Source: Jordan 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025,
    arXiv:2502.16982 (the factor).
    """

    def label(path, x):
        return "muon" if "layers" in path.split("/") and path.endswith("/kernel") else "adamw"

    def dimensions(path, x):
        return optax.contrib.MuonDimensionNumbers(*param_groups.matrix_axes(path, x.ndim))

    def scale(path, step, param):
        axes = param_groups.matrix_axes(path, step.ndim)
        sides = (math.prod(step.shape[axis] for axis in side) for side in axes)
        return 0.2 * math.sqrt(max(sides)) * step

    by_path = lambda function: lambda params: param_groups.map_with_path(function, params)
    momentum = optax.contrib.scale_by_muon(
        beta=config.beta1, weight_dimension_numbers=by_path(dimensions)
    )
    transforms = {"muon": optax.chain(momentum, map_updates(scale)), "adamw": adamw(config)}
    return optax.partition(transforms, by_path(label))


def lion(config: OptimizerConfig) -> optax.GradientTransformation:
    """The sign of a momentum. Source: Chen et al. 2023, arXiv:2302.06675."""
    return optax.scale_by_lion(config.beta1, config.beta2)


OPTIMIZERS = {
    "adafactor": adafactor,
    "adamw": adamw,
    "adamw_rms": adamw_rms,
    "muon": muon,
    "lion": lion,
}
