"""Which parameters: regular expressions over paths, first match wins; which axes are a matrix."""

from __future__ import annotations

import math
import re
from typing import Any

import jax

Rules = tuple[tuple[str, float | None], ...]  # (pattern, multiplier); None freezes
MOST = 1000.0  # multiplier


def path_of(keys) -> str:
    """A parameter's path as text: encoder/layers/self_attention/query/kernel."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def parse(text: str, field: str) -> Rules:
    """Text like "encoder/=0.1 embed=none" as rules; field, the key it is of: only rates freeze.

    Raises ValueError for what is no regular expression or no multiplier.
    """
    rules = []
    freezes = field == "learning_rate_multipliers"
    for word in text.split():
        pattern, equals, value = word.rpartition("=")
        if not (pattern and equals):
            raise ValueError(
                f"optimizer.{field} has {word!r}, which is no pattern=multiplier; write it like "
                f"'encoder/=0.1', several with space between."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"optimizer.{field} has {pattern!r}, which is no regular expression ({error}); "
                f"write a dot, bracket or star that stands for itself with a backslash before it."
            ) from None
        rules.append((pattern, _multiplier(value, word, field, freezes)))
    return tuple(rules)


def _multiplier(value: str, word: str, field: str, freezes: bool) -> float | None:
    if freezes and value == "none":
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= MOST or (freezes and number == 0):
        bounds = ("a number above 0, up to", ", or none") if freezes else ("a number from 0 to", "")
        raise ValueError(
            f"optimizer.{field} has {word!r}, whose multiplier is out of bounds; use "
            f"{bounds[0]} {MOST:g}{bounds[1]}."
        )
    return number


def multiplier(rules: Rules, keys) -> float | None:
    """The multiplier of the first rule that a parameter's path matches; 1 if none does."""
    path = path_of(keys)
    return next((value for pattern, value in rules if re.search(pattern, path)), 1.0)


def check_groups(config, params: Any) -> None:
    """Raise ValueError for a pattern that decides on no parameter, and for rates that freeze all.

    config: an OptimizerConfig. params: the tree of parameters, shapes suffice.
    """
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    for field in ("learning_rate_multipliers", "weight_decay_multipliers"):
        text = getattr(config, field)
        rules = parse(text, field)
        first = [next((i for i, (p, _) in enumerate(rules) if re.search(p, q)), -1) for q in paths]
        idle = sorted(set(range(len(rules))) - set(first))
        if idle and text != getattr(type(config), field):
            raise ValueError(
                f"optimizer.{field} has {rules[idle[0]][0]!r}, which is the first match of no "
                f"parameter; remove it, or match a path like {paths[0]}."
            )
        if all(i >= 0 and rules[i][1] is None for i in first):
            raise ValueError(
                f"optimizer.{field}={text!r} freezes every parameter; leave one to be trained."
            )


def multipliers(config) -> dict[str, float]:
    """Multipliers of the learning rate by their pattern, as optimizer.learning_rate_multipliers has them; frozen: 0."""
    return {
        pattern: value or 0.0
        for pattern, value in parse(config.learning_rate_multipliers, "learning_rate_multipliers")
    }


def trained_count(config, params: Any) -> int:
    """How many numbers of a tree are trained: those that no rate freezes. Shapes suffice."""
    rules, leaves = (
        parse(config.learning_rate_multipliers, "learning_rate_multipliers"),
        jax.tree_util.tree_leaves_with_path(params),
    )
    return sum(leaf.size for keys, leaf in leaves if multiplier(rules, keys) is not None)


def matrix(keys, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A parameter's axes as those of the rows and columns of T5's matrix, for each layer.

    A tower's stacked layers [L, ...] are as many parameters, so axis 0 is neither. Attention
    kernels are [D, N*H] and [N*H, D], their factors of LoRA alike. A vector's only axis is its
    columns'; it has no rows.
    """
    path = path_of(keys)
    axes = tuple(range(ndim))["layers" in path.split("/") :]
    last = max(len(axes) - 1, 0)
    cut = last if path.endswith(("out/kernel", "out/kernel/a")) else min(last, 1)
    return axes[:cut], axes[cut:]
