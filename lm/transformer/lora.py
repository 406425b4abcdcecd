"""LoRA: train two low-rank factors per kernel instead of the kernel.

The parameters of such a run are the model's, unchanged, and under "adapters" factors a and b of
every adapted kernel W: the model computes with W + (alpha / rank) * a b. With rank r, W
[L, D, N, H] has a [L, D, r] and b [L, r, N, H].
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
OTHERS = rf"^(?!{ADAPTERS}/)"  # matches the paths of all parameters but the factors
MAX_ALPHA = 1e4


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels have factors, and their rank; keys as in configs/base.py. rank 0: no LoRA."""

    rank: int = 0
    alpha: float = 16.0
    target_pattern: str = "attention/(query|value)/kernel$"

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} is too small; use 0 (no LoRA) or more.")
        if not 0 < self.alpha <= MAX_ALPHA:
            raise ValueError(
                f"lora.alpha={self.alpha} is out of bounds; use 1e-9 to {MAX_ALPHA:g}."
            )
        try:
            re.compile(self.target_pattern)
        except re.error as error:
            raise ValueError(
                f"lora.target_pattern={self.target_pattern!r} is no regular expression ({error}); "
                f"write a backslash before a bracket or star that stands for itself."
            ) from None
        defaults = LoraConfig.alpha, LoraConfig.target_pattern
        if not self.rank and (self.alpha, self.target_pattern) != defaults:
            raise ValueError(
                f"lora.alpha={self.alpha} and lora.target_pattern={self.target_pattern!r} have no "
                f"effect with lora.rank=0; set a rank, or leave them at their defaults."
            )

    @property
    def scale(self) -> float:
        """The number that multiplies the product of the factors."""
        return self.alpha / self.rank


def num_input_axes(path: str) -> int:
    """Return how many axes of a kernel, after L, are contracted with its input."""
    return 2 if path.endswith("out/kernel") else 1


def shapes(config: LoraConfig, params: Any) -> Any:
    """Return the tree that training holds, as shapes: the model's `params` and the factors.

    Raises ValueError if lora.target_pattern matches no kernel, or a parameter that is none, and for
    a rank above a kernel's.
    """
    if not config.rank:
        return params
    flat = traverse_util.flatten_dict(params, sep="/")
    targets = [path for path in flat if re.search(config.target_pattern, path)]
    kernels = [path for path in flat if "/layers/" in path and path.endswith("/kernel")]
    if others := sorted(set(targets) - set(kernels)):
        raise ValueError(
            f"lora.target_pattern={config.target_pattern!r} matches {others[0]}, which is no "
            f"kernel of a layer; match paths like {kernels[0]} alone."
        )
    if not targets:
        raise ValueError(
            f"lora.target_pattern={config.target_pattern!r} matches no parameter; match a path "
            f"like {kernels[0]}."
        )
    factors = {}
    for path in targets:
        shape, dtype, cut = flat[path].shape, flat[path].dtype, 1 + num_input_axes(path)
        max_rank = min(math.prod(shape[1:cut]), math.prod(shape[cut:]))
        if config.rank > max_rank:
            raise ValueError(
                f"lora.rank={config.rank} is more than {path} can have, {max_rank}; use at most "
                f"that."
            )
        factors[f"{path}/a"] = jax.ShapeDtypeStruct((*shape[:cut], config.rank), dtype)
        b_shape = (shape[0], config.rank, *shape[cut:])
        factors[f"{path}/b"] = jax.ShapeDtypeStruct(b_shape, dtype)
    return {**params, ADAPTERS: traverse_util.unflatten_dict(factors, sep="/")}


def init_lora(config: LoraConfig, params: Any, key: jax.Array) -> Any:
    """Add initial factors to a model's parameters: b is 0, so its outputs do not change.

    a is uniform with the variance of peft's, 1 / (3 * inputs).
    """
    if not config.rank:
        return params
    factors = traverse_util.flatten_dict(shapes(config, params)[ADAPTERS], sep="/")
    for number, (path, leaf) in enumerate(sorted(factors.items())):
        if path.endswith("/b"):
            factors[path] = jnp.zeros(leaf.shape, leaf.dtype)
            continue
        bound = math.prod(leaf.shape[1:-1]) ** -0.5
        leaf_key = jax.random.fold_in(key, number)
        factors[path] = jax.random.uniform(leaf_key, leaf.shape, leaf.dtype, -bound, bound)
    return {**params, ADAPTERS: traverse_util.unflatten_dict(factors, sep="/")}


def merge_lora(config: LoraConfig, params: Any) -> Any:
    """Return the model's parameters with the factors' products added to the kernels.

    Gradients flow to the factors only.
    """
    if not config.rank:
        return params
    base = {name: leaf for name, leaf in params.items() if name != ADAPTERS}
    flat = traverse_util.flatten_dict(jax.lax.stop_gradient(base), sep="/")
    factors = traverse_util.flatten_dict(params[ADAPTERS], sep="/")
    for path in (name.removesuffix("/a") for name in factors if name.endswith("/a")):
        a, b = factors[f"{path}/a"], factors[f"{path}/b"]
        depth, rank = b.shape[:2]
        product = a.reshape(depth, -1, rank) @ b.reshape(depth, rank, -1)
        flat[path] += config.scale * product.reshape(flat[path].shape)
    return traverse_util.unflatten_dict(flat, sep="/")


def with_lora(config: LoraConfig, loss: Callable) -> Callable:
    """Turn a loss (params, ..) of the model's parameters into one of the tree of `shapes`."""
    if not config.rank:
        return loss
    return lambda params, *args: loss(merge_lora(config, params), *args)
