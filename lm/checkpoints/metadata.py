"""The facts of a checkpoint: dotted paths, dtypes, shapes, and a seal, the hash of all facts."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax


class Mismatch(ValueError):
    """An undamaged checkpoint does not fit the requested model, optimizer or step."""


def flatten(tree: Any) -> dict[str, Any]:
    """Return {dotted path: leaf}, the form on disk, which needs no class of lm or optax."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def leaf_spec(leaf: Any) -> dict:
    """Return {"dtype", "shape"} of an array or ShapeDtypeStruct as JSON values."""
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def seal(facts: dict) -> dict:
    """Return the facts with "seal", the hash of all of them."""
    return facts | {"seal": hash_facts(facts)}


def unseal(facts: dict) -> dict:
    """Return the facts without their seal. Raises ValueError if the seal does not match."""
    facts = dict(facts)
    if facts.pop("seal", None) != hash_facts(facts):
        raise ValueError("its facts do not match their seal")
    return facts


def hash_facts(facts: dict) -> str:
    """Return the sha256 of facts, independent of the order of keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_leaves(item: str, target: dict, stored: dict, checkpoint: str) -> None:
    """Raise Mismatch, naming the first leaf whose dtype or shape differs from the stored one.

    Orbax would cast to another dtype without an error.

    Args:
      item: "params", "opt_state" or "average".
      target: {path: leaf} to restore into.
      stored: {path: leaf_spec} of the checkpoint.
      checkpoint: its name for the message.
    """
    for name in sorted(target.keys() | stored.keys()):
        expected = leaf_spec(target[name]) if name in target else None
        actual = {k: stored[name][k] for k in ("dtype", "shape")} if name in stored else None
        if expected != actual:
            raise Mismatch(
                f"{item} {name} is {_describe(actual)} in {checkpoint}, but {_describe(expected)} "
                f"in this config; use the config and code that wrote the checkpoint."
            )


def _describe(spec: dict | None) -> str:
    return f"{spec['dtype']} {spec['shape']}" if spec else "absent"
