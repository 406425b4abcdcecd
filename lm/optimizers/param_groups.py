"""Parameter groups by regular expressions over paths (first match wins), and matrix axes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from lm.optimizers.config import OptimizerConfig

Rules = tuple[tuple[str, float | None], ...]  # (pattern, multiplier); None freezes
MAX_MULTIPLIER = 1000.0
FIELDS = ("learning_rate_multipliers", "weight_decay_multipliers")


def _path_of(keys) -> str:
    """A parameter's path as text: encoder/layers/self_attention/query/kernel."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def map_with_path(function: Callable, *trees: Any) -> Any:
    """Map (path, leaf, ..) -> leaf over trees of one structure; paths are text."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: function(_path_of(keys), *leaves), *trees
    )


def check_rules(pairs: Iterable, field: str) -> Rules:
    """Return (pattern, multiplier) pairs as tuples. field: the key; only learning rates freeze.

    Raises ValueError for a malformed pair, pattern or multiplier.
    """
    rules, can_freeze = [], field == "learning_rate_multipliers"
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ValueError(
                f"optimizer.{field} has {pair!r}, which is no pair of a pattern and a multiplier; "
                f"write it as (('encoder/', 0.1),)."
            )
        pattern, multiplier = pair
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"optimizer.{field} has {pattern!r}, which is no regular expression ({error}); "
                f"write a backslash before a dot, bracket or star that stands for itself."
            ) from None
        number = 1.0 if can_freeze and multiplier is None else multiplier
        number = number if isinstance(number, int | float) else math.nan
        if not 0 <= number <= MAX_MULTIPLIER or (can_freeze and number == 0):
            bounds = "a number above 0, up to" if can_freeze else "a number from 0 to"
            freeze = ", or None to freeze" if can_freeze else ""
            raise ValueError(
                f"optimizer.{field} has {pattern!r} with the multiplier {multiplier!r}, which is "
                f"out of bounds; use {bounds} {MAX_MULTIPLIER:g}{freeze}."
            )
        rules.append((pattern, None if multiplier is None else float(multiplier)))
    return tuple(rules)


def multiplier(rules: Rules, path: str) -> float | None:
    """Return the multiplier of the first rule that a parameter's path matches; 1 if none does."""
    return next((value for pattern, value in rules if re.search(pattern, path)), 1.0)


def check_groups(config: OptimizerConfig, params: Any) -> None:
    """Raise ValueError for a pattern that is no parameter's first match, and if all are frozen.

    params: the tree of parameters; shapes suffice.
    """
    paths = [_path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    for field in FIELDS:
        rules = getattr(config, field)
        first = [next((i for i, (p, _) in enumerate(rules) if re.search(p, q)), -1) for q in paths]
        unused = sorted(set(range(len(rules))) - set(first))
        if unused and rules != getattr(type(config), field):
            raise ValueError(
                f"optimizer.{field} has {rules[unused[0]][0]!r}, which is the first match of no "
                f"parameter; remove it, or match a path like {paths[0]}."
            )
        if all(i >= 0 and rules[i][1] is None for i in first):
            raise ValueError(
                f"optimizer.{field}={rules!r} freezes every parameter; leave one to be trained."
            )


def multipliers(config: OptimizerConfig) -> dict[str, float]:
    """Return the learning rate's multipliers by pattern; 0 for a frozen group."""
    return {pattern: value or 0.0 for pattern, value in config.learning_rate_multipliers}


def trained_count(config: OptimizerConfig, params: Any) -> int:
    """Count the numbers of a tree that are not frozen; shapes suffice."""
    rules, leaves = config.learning_rate_multipliers, jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for keys, leaf in leaves if multiplier(rules, _path_of(keys)) is not None)


def matrix_axes(path: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the row axes and the column axes of a parameter as a matrix.

    Attention kernels are matrices [D, N*H] and [N*H, D], as in T5, and so are their LoRA factors.
    The layer axis of a stacked tower [L, ...] is in neither: each layer is a matrix. A vector has
    only a column axis.
    """
    axes = tuple(range(ndim))["layers" in path.split("/") :]
    last = max(len(axes) - 1, 0)
    cut = last if path.endswith(("out/kernel", "out/kernel/a")) else min(last, 1)
    return axes[:cut], axes[cut:]
