"""LoRA: of a kernel only two thin factors are trained, whose product is added to it.

The parameters of such a run are the model's, as they were, and beside them, under "adapters", for
each kernel W that is adapted a and b: the model computes with W + (alpha / rank) * a b. Of r, the
rank: W [L, D, N, H] has a [L, D, r] and b [L, r, N, H]. All but a and b stays, to the bit.
Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

ADAPTERS = "adapters"
OTHERS = rf"^(?!{ADAPTERS}/)"  # the paths of all other parameters
MOST = 1e4  # of alpha


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels are adapted, and how; keys as in configs/base.py. rank 0: none is."""

    rank: int = 0
    alpha: float = 16.0
    target_pattern: str = "attention/(query|value)/kernel$"

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} is too small; use 0 (no LoRA) or more.")
        if not 0 < self.alpha <= MOST:
            raise ValueError(f"lora.alpha={self.alpha} is out of bounds; use 1e-9 to {MOST:g}.")
        try:
            re.compile(self.target_pattern)
        except re.error as error:
            raise ValueError(
                f"lora.target_pattern={self.target_pattern!r} is no regular expression ({error}); "
                f"write a bracket or star that stands for itself with a backslash before it."
            ) from None
        asked = (self.alpha, self.target_pattern) != (LoraConfig.alpha, LoraConfig.target_pattern)
        if not self.rank and asked:
            raise ValueError(
                f"lora.alpha={self.alpha} and lora.target_pattern={self.target_pattern!r} "
                f"have no use "
                f"with lora.rank=0; set a rank, or leave them as they are in configs/base.py."
            )

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank


def inputs_of(path: str) -> int:
    """How many axes of a kernel are summed over, after L: the first ones."""
    return 2 if path.endswith("out/kernel") else 1


def shapes(config: LoraConfig, params: Any) -> Any:
    """The tree that training holds, as shapes: the model's `params`, and a and b where there is a
    rank.

    Raises ValueError where lora.target_pattern finds no kernel, or something else, and for a rank
    that a kernel has not.
    """
    if not config.rank:
        return params
    flat = traverse_util.flatten_dict(params, sep="/")
    found = {path: leaf for path, leaf in flat.items() if re.search(config.target_pattern, path)}
    kernels = [path for path in flat if "/layers/" in path and path.endswith("/kernel")]
    if odd := sorted(found.keys() - set(kernels)):
        raise ValueError(
            f"lora.target_pattern={config.target_pattern!r} matches {odd[0]}, which is no "
            f"kernel of a layer; match "
            f"paths like {kernels[0]} alone."
        )
    if not found:
        raise ValueError(
            f"lora.target_pattern={config.target_pattern!r} matches no parameter; match a "
            f"path like {kernels[0]}."
        )
    made = {}
    for path, leaf in found.items():
        depth, cut = leaf.shape[0], 1 + inputs_of(path)
        most = min(math.prod(leaf.shape[1:cut]), math.prod(leaf.shape[cut:]))
        if config.rank > most:
            raise ValueError(
                f"lora.rank={config.rank} is more than {path} can have, {most}; use at most that."
            )
        factor = lambda shape, leaf=leaf: jax.ShapeDtypeStruct(shape, leaf.dtype)
        made[f"{path}/a"] = factor((*leaf.shape[:cut], config.rank))
        made[f"{path}/b"] = factor((depth, config.rank, *leaf.shape[cut:]))
    return {**params, ADAPTERS: traverse_util.unflatten_dict(made, sep="/")}


def init_lora(config: LoraConfig, params: Any, key: jax.Array) -> Any:
    """The model's parameters with fresh factors beside them: b is 0, so nothing changes yet.

    a is uniform with the variance of peft's, 1 / (3 * inputs).
    """
    if not config.rank:
        return params
    wanted = traverse_util.flatten_dict(shapes(config, params)[ADAPTERS], sep="/")
    made = {}
    for number, (path, leaf) in enumerate(sorted(wanted.items())):
        if path.endswith("/b"):
            made[path] = jnp.zeros(leaf.shape, leaf.dtype)
            continue
        bound = math.prod(leaf.shape[1:-1]) ** -0.5
        own = jax.random.fold_in(key, number)
        made[path] = jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)
    return {**params, ADAPTERS: traverse_util.unflatten_dict(made, sep="/")}


def merge_lora(config: LoraConfig, params: Any) -> Any:
    """The model's parameters, with the product of the factors in them.

    Gradients go to the factors alone.
    """
    if not config.rank:
        return params
    base = {name: leaf for name, leaf in params.items() if name != ADAPTERS}
    flat = traverse_util.flatten_dict(jax.lax.stop_gradient(base), sep="/")
    factors = traverse_util.flatten_dict(params[ADAPTERS], sep="/")
    for path in (name.removesuffix("/a") for name in factors if name.endswith("/a")):
        a, b = (factors[f"{path}/{name}"] for name in "ab")
        depth, rank = b.shape[:2]
        product = a.reshape(depth, -1, rank) @ b.reshape(depth, rank, -1)
        flat[path] += config.scale * product.reshape(flat[path].shape)
    return traverse_util.unflatten_dict(flat, sep="/")


def with_lora(config: LoraConfig, loss: Callable) -> Callable:
    """A loss of the model's parameters, (params, ..) -> .., as one of what training holds."""
    if not config.rank:
        return loss
    return lambda params, *rest: loss(merge_lora(config, params), *rest)
