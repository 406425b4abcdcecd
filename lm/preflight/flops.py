"""FLOPs that a program executes, read from its jaxpr, recomputation included."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


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
        return _branch_flops(params, platform)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":  # pmap is implemented by it
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return times * sum(executed_flops(inner, platform) for inner in _inner_jaxprs(params))


def _branch_flops(params: dict, platform: str) -> int:
    flops = [executed_flops(branch, platform) for branch in params["branches"]]
    platforms = params.get("branches_platforms") or ()
    for names, branch_flops in zip(platforms, flops, strict=False):
        if names is None or platform in names:
            return branch_flops
    return max(flops)


def _inner_jaxprs(params: dict) -> Iterator:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item


def _dot_flops(left, right, out, dimensions) -> int:
    (contracted, _), _ = dimensions
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution_flops(left, kernel, out, dimensions) -> int:
    return 2 * math.prod(out) * math.prod(kernel) // kernel[dimensions.rhs_spec[0]]


PRODUCTS = {"dot_general": _dot_flops, "conv_general_dilated": _convolution_flops}
