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
    """ "encoder/=0.1 embed=none" as rules. field: the key's name in errors; only rates freeze.

    Raises ValueError for what is no regular expression or no multiplier.
    """
    rules = []
    freezes = field == "rates"
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
        bounds = (
            f"a number above 0, up to {MOST:g}, or none (frozen)"
            if freezes
            else (f"a number from 0 to {MOST:g}")
        )
        raise ValueError(f"optimizer.{field} has {word!r}, whose multiplier must be {bounds}.")
    return number


def multiplier(rules: Rules, keys) -> float | None:
    """The multiplier of the first rule that a parameter's path matches; 1 if none does."""
    path = path_of(keys)
    return next((value for pattern, value in rules if re.search(pattern, path)), 1.0)


def check_used(rules: Rules, field: str, params: Any) -> None:
    """Raise ValueError for a rule that is the first match of no parameter."""
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    first = lambda path: next((rule for rule in rules if re.search(rule[0], path)), None)
    used = {first(path) for path in paths}
    for rule in rules:
        if rule not in used or rules.count(rule) > 1:
            raise ValueError(
                f"optimizer.{field} has {rule[0]!r}, which is the first match of no parameter; "
                f"remove it, or match a path like {paths[0]}."
            )


def multipliers(config) -> dict[str, float]:
    """Multipliers of the learning rate by their pattern, as optimizer.rates has them; frozen: 0."""
    return {pattern: value or 0.0 for pattern, value in parse(config.rates, "rates")}


def matrix(keys, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A parameter's axes as those of the rows and columns of T5's matrix, for each layer.

    A tower's stacked layers [L, ...] are as many parameters, so axis 0 is neither. Attention
    kernels are [D, N*H] and [N*H, D]. A vector's only axis is its columns'; it has no rows.
    """
    path = path_of(keys)
    axes = tuple(range(ndim))["layers" in path.split("/") :]
    last = max(len(axes) - 1, 0)
    cut = last if path.endswith("out/kernel") else min(last, 1)
    return axes[:cut], axes[cut:]
