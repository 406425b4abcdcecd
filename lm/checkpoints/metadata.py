"""What a checkpoint says of itself: dotted paths, dtypes and shapes, sealed facts."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax


class Mismatch(ValueError):
    """A sound checkpoint, but of another model or optimizer, or another step, than asked for."""


def flatten(tree: Any) -> dict[str, Any]:
    """{dotted path: leaf}, the form on disk: no class of ours or of optax is needed to read it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def leaf_spec(leaf) -> dict:
    """{"dtype", "shape"} of an array or a ShapeDtypeStruct, as facts say it."""
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def seal(facts: dict) -> dict:
    """Facts with "seal", a hash over all others."""
    return facts | {"seal": hash_facts(facts)}


def unseal(facts: dict) -> dict:
    """Facts without their seal; ValueError where they are not as they were sealed."""
    facts = dict(facts)
    if facts.pop("seal", None) != hash_facts(facts):
        raise ValueError("its facts do not match their seal")
    return facts


def hash_facts(facts: dict) -> str:
    """The sha256 of facts, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_leaves(item: str, target: dict, stored: dict, where: str) -> None:
    """Raise Mismatch naming the first leaf whose form is not the stored one.

    target: {path: leaf}; stored: {path: form}; where: the checkpoint, for the sentence.
    Orbax would cast another dtype without a word.
    """
    for name in sorted(target.keys() | stored.keys()):
        ours = leaf_spec(target[name]) if name in target else None
        theirs = {k: stored[name][k] for k in ("dtype", "shape")} if name in stored else None
        if ours != theirs:
            raise Mismatch(
                f"{item} {name} is {_said(theirs)} in {where}, but {_said(ours)} here; use the "
                f"config and code that made it."
            )


def _said(form: dict | None) -> str:
    return f"{form['dtype']} {form['shape']}" if form else "absent"
