"""Checkpoints that prove themselves: {state, data position, config} as one atomic step.

Orbax commits a step whole or not at all, but neither checksums array data nor falls back to an
older step; both are done here. Every leaf has an integer checksum of its bits, and restore takes
the newest step that verifies and renames the others out of the way.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)
FACTOR = np.uint32(2654435761)
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class Mismatch(ValueError):
    """A sound checkpoint, but of another model or optimizer than is asked for."""


def leaf_sum(x: jax.Array) -> jax.Array:
    """A uint32 checksum of an array's bits, the same for any sharding; leaves of up to 4 bytes."""
    words = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize])
    words, index, stride = words.astype(jnp.uint32), jnp.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index, stride = index + place * jnp.uint32(stride), stride * words.shape[axis] % 2**32
    parts = (words ^ (words >> 15)) * ((index * FACTOR) | jnp.uint32(1))
    for axis in reversed(range(words.ndim)):  # much faster than all at once
        parts = jnp.sum(parts, axis=axis, dtype=jnp.uint32)
    return parts


def host_sum(x, chunk: int = 2**20) -> int:
    """leaf_sum of an array on this host, taken in parts: it needs next to no memory."""
    flat, total = np.asarray(x).reshape(-1), 0
    words = flat.view(f"u{flat.dtype.itemsize}")
    for start in range(0, words.size, chunk):
        part = words[start : start + chunk].astype(np.uint32)
        index = np.arange(start, start + part.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum((part ^ (part >> 15)) * (index * FACTOR | 1), dtype=np.uint32))
    return total % 2**32


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """An unset float32 array that jax.device_put takes over on CPU without copying it."""
    size = 4 * math.prod(shape)
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(np.float32).reshape(shape)


@jax.jit
def checksums(tree: Any) -> Any:
    """leaf_sum of every leaf."""
    return jax.tree.map(leaf_sum, tree)


def flatten(tree: Any) -> dict[str, Any]:
    """{dotted path: leaf}, the form on disk: no class of ours or of optax is needed to read it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _seal(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one run, newest first; a context manager that waits for the last save.

    background: a save copies the arrays and returns; else it writes them from where they are.
    """

    def __init__(self, directory, *, keep: int = 2, read_only=False, background=True):
        self.directory = pathlib.Path(directory).absolute()
        self.read_only, self.background = read_only, background
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(max(keep, 2)),
            atomicity_options=ocp.options.AtomicityOptions(
                mode=ocp.options.AtomicityMode.COMMIT_FILE
            ),
            cleanup_tmp_directories=not read_only,
            enable_async_checkpointing=background and not read_only,
            read_only=read_only,
            create=not read_only,
        )
        # Floats hardly compress, and compressing them takes as much memory again.
        arrays = lambda: ocp.PyTreeCheckpointHandler(use_compression=False)
        handlers = {"params": arrays(), "opt_state": arrays(), "facts": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._manager.close()

    def steps(self) -> list[int]:
        """Committed steps, newest first, good or not."""
        self._manager.reload()
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, state, facts: dict) -> None:
        """Start to save a steps.State of one logical copy and its facts (JSON); step as state says.

        With opt_state=None parameters alone are saved: to be read, not to be continued.
        The caller may donate the arrays when this returns.
        """
        step, trees = int(state.step), {"params": state.params, "opt_state": state.opt_state}
        items = {item: flatten(tree) for item, tree in trees.items() if tree is not None}
        on_host = lambda leaves: {name: host_sum(leaf) for name, leaf in leaves.items()}
        sums_of = checksums if self.background else on_host
        sums = {item: jax.device_get(sums_of(leaves)) for item, leaves in items.items()}
        facts = json.loads(json.dumps(facts)) | {"step": step}
        facts["leaves"] = {
            item: {
                name: {"sum": int(sums[item][name]), **_form(leaf)} for name, leaf in leaves.items()
            }
            for item, leaves in items.items()
        }
        saves = {item: ocp.args.PyTreeSave(leaves) for item, leaves in items.items()}
        saves["facts"] = ocp.args.JsonSave(facts | {"seal": _seal(facts)})
        if not self._manager.save(step, args=ocp.args.Composite(**saves), force=True):
            raise RuntimeError(f"step {step} was not saved in {self.directory}.")

    def restore(self, state):
        """(state, facts) of the newest step that verifies, or None where nothing was ever saved.

        state: a steps.State of arrays or ShapeDtypeStructs (with shardings to restore into).
        Raises ValueError where checkpoints exist and none verifies, now and at every later call:
        nothing restarts silently. Raises it too for a sound checkpoint of another model.
        """
        found = self._newest({"params": state.params, "opt_state": state.opt_state})
        if found is None:
            return None
        items, facts = found
        step = jnp.asarray(facts["step"], jnp.int32)
        skipped = jnp.asarray(facts.get("skipped", 0), jnp.int32)
        return type(state)(step, items["params"], items["opt_state"], skipped), facts

    def restore_params(self, params):
        """(params, facts) of the newest step that verifies; other state is not read."""
        found = self._newest({"params": params})
        if found is None:
            raise ValueError(f"no checkpoint in {self.directory}; train that run first.")
        items, facts = found
        return items["params"], facts

    def wait(self) -> None:
        """Block until the save in progress is on disk."""
        self._manager.wait_until_finished()

    def _newest(self, wanted: dict):
        steps, bad = self.steps(), []
        for step in steps:
            try:
                found = self._read(step, wanted)
            except Mismatch:
                raise
            # Damage surfaces as errors of many types, bare Exception among them.
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                logger.warning("checkpoint %d in %s is damaged: %s", step, self.directory, reason)
                bad.append(step)
                continue
            # Only now: with none left in place, the next call would take it for a fresh start.
            for damaged in bad if not self.read_only else ():
                self._quarantine(damaged)
            return found
        if steps:
            raise ValueError(
                f"none of the checkpoints {steps} in {self.directory} can be read; "
                f"restore one from a copy, or start anew in another --workdir."
            )
        return None

    def _read(self, step: int, wanted: dict):
        facts = self._manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))
        facts = dict(facts["facts"])
        if facts.pop("seal", None) != _seal(facts):
            raise ValueError("its facts do not match their seal")
        if facts["step"] != step:
            raise ValueError(f"it holds step {facts['step']}")
        items = {}
        for item, tree in wanted.items():
            target = {name: _abstract(leaf) for name, leaf in flatten(tree).items()}
            stored = facts["leaves"].get(item, {})
            self._check_forms(step, item, target, stored)
            placed = ocp.checkpoint_utils.construct_restore_args(target)
            restore = ocp.args.PyTreeRestore(item=target, restore_args=placed)
            args = ocp.args.Composite(**{item: restore})
            leaves = self._manager.restore(step, args=args)[item]
            sums = jax.device_get(checksums(leaves))
            bad = [name for name in leaves if int(sums[name]) != stored[name]["sum"]]
            if bad:
                raise ValueError(f"checksum of {item} {bad[0]} and {len(bad) - 1} more")
            ordered = [leaves[name] for name in target]
            items[item] = jax.tree.unflatten(jax.tree.structure(tree), ordered)
        del facts["leaves"]
        return items, facts

    def _check_forms(self, step: int, item: str, target: dict, stored: dict) -> None:
        # Orbax would cast another dtype without a word.
        for name in sorted(target.keys() | stored.keys()):
            ours = _form(target[name]) if name in target else None
            theirs = {k: stored[name][k] for k in ("dtype", "shape")} if name in stored else None
            if ours != theirs:
                raise Mismatch(
                    f"{item} {name} is {_said(theirs)} in checkpoint {step} of {self.directory}, "
                    f"but {_said(ours)} here; use the config and code that made it."
                )

    def _quarantine(self, step: int) -> None:
        # A bad step left in place would make a later save of that step a silent no-op.
        bad = self.directory / str(step)
        bad.rename(self.directory / f"{step}.corrupt-{time.time_ns()}")
        self._manager.reload()


def _form(leaf) -> dict:
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _said(form: dict | None) -> str:
    return f"{form['dtype']} {form['shape']}" if form else "absent"


def _abstract(leaf):
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
