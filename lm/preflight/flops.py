"""FLOPs that a program executes, recomputation included, counted in its jaxpr."""

from __future__ import annotations

import math
from typing import Any

import jax


def executed_flops(jaxpr: Any, platform: str = "tpu") -> int:
    """Counts FLOPs of all matrix products and convolutions of a (closed) jaxpr over its devices.

    A multiply-add is 2 FLOPs. Work under pmap or shard_map counts once per device; work that jit
    shards is written once and counts once. A scan counts its body as often as it runs, a while_loop
    once (its trip count is not in the jaxpr), a cond its largest branch, and a
    lax.platform_dependent the branch of the platform.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation_flops(equation, platform) for equation in jaxpr.eqns)


def _equation_flops(equation, platform: str) -> int:
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        shapes = [var.aval.shape for var in (*equation.invars[:2], equation.outvars[0])]
        return PRODUCTS[name](*shapes, params["dimension_numbers"])
    if name == "cond":
        flops = [executed_flops(branch, platform) for branch in params["branches"]]
        platforms = params.get("branches_platforms") or ()
        branches = zip(platforms, flops, strict=False)
        return next((n for names, n in branches if not names or platform in names), max(flops))
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":  # pmap is implemented by it
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    items = jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr)
    return times * sum(executed_flops(item, platform) for item in items if _is_jaxpr(item))


def _is_jaxpr(item: Any) -> bool:
    return hasattr(getattr(item, "jaxpr", item), "eqns")


def _dot_flops(left_shape, right_shape, out_shape, dimensions) -> int:
    (contracted, _), _ = dimensions
    return 2 * math.prod(out_shape) * math.prod(left_shape[axis] for axis in contracted)


def _convolution_flops(left_shape, kernel_shape, out_shape, dimensions) -> int:
    inputs = math.prod(kernel_shape) // kernel_shape[dimensions.rhs_spec[0]]
    return 2 * math.prod(out_shape) * inputs


PRODUCTS = {"dot_general": _dot_flops, "conv_general_dilated": _convolution_flops}
