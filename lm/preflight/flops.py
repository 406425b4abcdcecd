"""FLOPs that a program executes, read from its jaxpr: the model's, and what is computed again."""

from __future__ import annotations

import math
from collections.abc import Iterator


def executed_flops(jaxpr, platform: str = "tpu") -> int:
    """FLOPs of all matrix products and convolutions of a (closed) jaxpr, on all its devices.

    A multiplication and an addition are 2. What one device does under pmap or shard_map counts once
    a device; what jit shards is written once and counts once. A scan counts its body as often as it
    runs, a while_loop once, since its length is not written, and a cond its largest branch, or of
    lax.platform_dependent the platform's.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_flops(equation, platform) for equation in jaxpr.eqns)


def _flops(equation, platform: str) -> int:
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        shapes = [var.aval.shape for var in (*equation.invars[:2], equation.outvars[0])]
        return PRODUCTS[name](*shapes, params["dimension_numbers"])
    if name == "cond":
        return _of_branches(params, platform)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":  # pmap is one too
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return times * sum(executed_flops(part, platform) for part in _inside(params))


def _of_branches(params: dict, platform: str) -> int:
    flops = [executed_flops(branch, platform) for branch in params["branches"]]
    for names, of_branch in zip(params.get("branches_platforms") or (), flops, strict=False):
        if names is None or platform in names:
            return of_branch
    return max(flops)


def _inside(params: dict) -> Iterator:
    # The jaxprs among an equation's parameters.
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(part, "jaxpr", part), "eqns"):
                yield part


def _dot(left, right, out, dimensions) -> int:
    (contracted, _), _ = dimensions
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(left, kernel, out, dimensions) -> int:
    return 2 * math.prod(out) * math.prod(kernel) // kernel[dimensions.rhs_spec[0]]


PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution}
