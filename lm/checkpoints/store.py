"""The directory of a run's checkpoints: save, and restore the newest one that verifies."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lm import exits, storage
from lm.checkpoints import checksums, hosts, metadata, retention
from lm.checkpoints.metadata import Mismatch

logger = logging.getLogger(__name__)
COMMITTED = "commit_success.txt"  # Orbax's mark of a complete step
FACTS = "metadata"  # Orbax's name for a JSON item
ITEMS = ("params", "opt_state", "average")  # the fields of a state that have arrays
SAVE_ERRORS = (OSError, ValueError, RuntimeError)  # of Orbax and TensorStore on a full disk
Accept = Callable[[dict], bool]  # facts -> whether to restore this step


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    max_to_keep: the number of newest ones to keep, at least 2. keep_period: also keep multiples of
    this step; 0: none. best_metric: also keep the best by this held-out metric; "": none.
    background: write in a thread after `save` returns, from a copy of the arrays.
    With several hosts every host must make every call.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        max_to_keep: int = 2,
        keep_period: int = 0,
        best_metric: str = "",
        read_only: bool = False,
        background: bool = True,
    ):
        self.directory: Any = storage.as_path(directory).absolute()
        self.read_only, self.background, self.best_metric = read_only, background, best_metric
        self._metrics: dict[int, dict[str, float]] = {}  # by step
        if not read_only:
            storage.check_deletable(self.directory)
        best = retention.KeepBest(best_metric, self._metrics_of) if best_metric else None
        self._policy = retention.make_policy(max_to_keep, keep_period, best)
        # Floats hardly compress, and compression needs a second copy in memory.
        self._arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
        self._saving = None  # the step of the last save
        self._manager = self._open_manager()

    def _open_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            atomicity_options=ocp.options.AtomicityOptions(
                mode=ocp.options.AtomicityMode.COMMIT_FILE
            ),
            enable_async_checkpointing=self.background and not self.read_only,
            read_only=self.read_only,
            create=not self.read_only,
        )
        arrays = lambda: ocp.PyTreeCheckpointHandler(use_compression=False)
        handlers: dict[str, Any] = {item: arrays() for item in ITEMS}
        handlers["facts"] = ocp.JsonCheckpointHandler(filename=FACTS)
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *error) -> None:
        try:
            self.wait()
        except OSError as save_error:
            if kind is None:
                raise
            logger.warning("%s", save_error)  # the first error is raised
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """Return the committed steps, newest first; they may be damaged."""
        self._manager.reload()
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, state: Any, facts: dict, metrics: dict[str, float] | None = None) -> None:
        """Start to save a steps.State and its facts under the state's step.

        The caller may donate the arrays when this returns. With opt_state=None the checkpoint
        has parameters only: it can be read, but no run can be resumed from it.

        Args:
          state: one logical copy of the state.
          facts: JSON values to restore with it.
          metrics: held-out metrics of this step, for best_metric; None without an evaluation.

        Raises:
          OSError: this save, or the one before it, could not be written.
          ValueError: the step exists already, or metrics lack best_metric.
        """
        step = int(state.step)
        if self.best_metric and metrics is not None and self.best_metric not in metrics:
            raise ValueError(
                f"checkpoint.best_metric={self.best_metric!r} is no held-out metric; choose one "
                f"of {', '.join(sorted(metrics))}, or leave it empty."
            )
        self.wait()
        if step in self._manager.all_steps():
            raise ValueError(
                f"checkpoint {step} is already in {self.directory}; restore it, or use another "
                f"--workdir."
            )
        trees = {item: getattr(state, item) for item in ITEMS}
        items = {
            item: {k: hosts.local_leaf(x) for k, x in metadata.flatten(tree).items()}
            for item, tree in trees.items()
            if tree is not None
        }
        facts = json.loads(json.dumps(facts)) | {"step": step, "skipped": int(state.skipped)}
        facts |= {"figures": metrics or {}, "leaves": self._describe_leaves(items)}
        saves: dict[str, Any] = {item: ocp.args.PyTreeSave(items[item]) for item in items}
        saves["facts"] = ocp.args.JsonSave(metadata.seal(facts))
        self._metrics[step], self._saving = facts["figures"], step
        with self._readable_errors():
            self._remove_unfinished()
            if not self._manager.save(step, args=ocp.args.Composite(**saves), force=True):
                raise RuntimeError("Orbax skipped it")

    def _describe_leaves(self, items: dict) -> dict:
        """Return {item: {path: {"sum", "dtype", "shape"}}}."""
        facts = {}
        for item, leaves in items.items():
            if self.background:
                sums = jax.device_get(checksums.tree_checksums(leaves))
            else:  # slower, but needs no second copy of the arrays
                sums = {name: checksums.host_checksum(leaf) for name, leaf in leaves.items()}
            facts[item] = {
                name: {"sum": int(sums[name]), **metadata.leaf_spec(leaf)}
                for name, leaf in leaves.items()
            }
        return facts

    def wait(self) -> None:
        """Block until the last save is on disk. Raises OSError if it could not be written."""
        with self._readable_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        # A manager that failed cannot be used again; a new one reads the complete steps on disk.
        try:
            yield
        except SAVE_ERRORS as error:
            with contextlib.suppress(*SAVE_ERRORS):
                self._manager.close()
            self._manager = self._open_manager()
            with contextlib.suppress(OSError):
                self._remove_unfinished()
            raise OSError(
                f"checkpoint {self._saving} could not be written in {self.directory} "
                f"({exits.one_line(error)}); check the free space and the permissions there, and "
                f"run the same command again: earlier checkpoints are complete."
            ) from error

    def _unfinished(self) -> list[pathlib.Path]:
        # Directories of steps without COMMITTED, from a killed or failed save.
        step_name = re.compile(r"\d+(\.orbax-checkpoint-tmp.*)?")
        paths = [path for path in self.directory.glob("*") if step_name.fullmatch(path.name)]
        is_dir = lambda path: path.is_symlink() or path.is_dir()
        return [path for path in paths if is_dir(path) and not (path / COMMITTED).exists()]

    def _remove_unfinished(self) -> None:
        for path in self._unfinished() if jax.process_index() == 0 else ():
            storage.remove_dir(path)

    def restore(self, state: Any, accept: Accept = lambda facts: True) -> tuple[Any, dict] | None:
        """Restore the newest step that verifies: (state, facts), or None if there are no steps.

        Args:
          state: a steps.State of arrays or ShapeDtypeStructs (with shardings to restore into). If
            only this state has an average, it is restored from the parameters.
          accept: facts -> whether to restore this step. Newer steps that verify but are not
            accepted are deleted, because they will be saved again.

        Raises:
          ValueError: checkpoints exist and none verifies.
          Mismatch: an undamaged checkpoint is of another model, or none is accepted.
        """
        trees = {item: getattr(state, item) for item in ITEMS}
        steps = hosts.broadcast_steps(self.steps())
        if not steps:
            self._check_nothing_lost()
            return None
        items, facts = self._read_first_sound(steps, trees, accept)
        if not self.read_only:
            self._remove_unfinished()  # from a kill during a deletion
        counts = {name: jnp.asarray(facts[name], jnp.int32) for name in ("step", "skipped")}
        return state._replace(**counts, **items), facts

    def restore_params(self, params: dict, which: str | int = "newest") -> tuple[dict, dict]:
        """Return (params, facts) of a step that verifies; the averaged weights if it has them.

        which: "newest", "best" (by best_metric), or a step. Subtrees that are None in `params` are
        not read.
        """
        items, facts = self._read_first_sound(self.find_steps(which), {"average": params})
        return items["average"], facts

    def fingerprint(self, which: str | int = "newest") -> tuple[int, str]:
        """Return (step, a hash of the parameters' checksums) of a step; reads no array.

        Raises ValueError if there is no such checkpoint or its facts cannot be read.
        """
        step = self.find_steps(which)[0]
        facts, damage = hosts.try_on_all_hosts(lambda: self._read_facts(step))
        if damage:
            raise ValueError(
                f"checkpoint {step} in {self.directory} is damaged ({damage}); restore it from a "
                f"copy."
            )
        leaves = facts["leaves"].get("average", facts["leaves"]["params"])
        return step, metadata.hash_facts(leaves)[:16]

    def find_steps(self, which: str | int) -> list[int]:
        """Return the steps selected by `which` of restore_params, in order of preference.

        Raises ValueError if there is none.
        """
        steps = hosts.broadcast_steps(self.steps())
        if not steps:
            raise ValueError(f"no checkpoint in {self.directory}; train that run first.")
        if which == "best":
            metrics = {step: self._metrics_of(step) for step in steps}
            chosen = retention.rank_steps(self.best_metric, metrics)
            problem = f"no checkpoint has checkpoint.best_metric={self.best_metric!r}"
            if not self.best_metric:
                problem = "the run has no checkpoint.best_metric, so no checkpoint is the best"
        else:
            chosen = steps if which == "newest" else [step for step in steps if step == which]
            problem = f"there is no checkpoint {which}"
        if not chosen:
            raise ValueError(
                f"{problem} in {self.directory}; choose newest or one of "
                f"{', '.join(map(str, sorted(steps)))}."
            )
        return chosen

    def _check_nothing_lost(self) -> None:
        # The first save is of step 0: an unfinished later step means that complete ones are gone.
        later = sorted(p.name for p in self._unfinished() if not p.name.startswith("0"))
        if later:
            raise ValueError(
                f"{self.directory} has unfinished checkpoints ({', '.join(later)}) and no complete "
                f"one; restore one from a copy, or delete them to start again."
            )

    def _read_first_sound(
        self, steps: list[int], trees: dict, accept: Accept = lambda facts: True
    ) -> tuple[dict, dict]:
        damaged, rejected = [], []
        for step in steps:
            checkpoint, damage = self._read(step, trees, accept)
            if damage:
                logger.warning("checkpoint %d in %s is damaged: %s", step, self.directory, damage)
                damaged.append(step)
            elif checkpoint is None:
                rejected.append(step)
            else:
                # Not earlier: if all steps were set aside, the next call would start a new run.
                self._set_aside(damaged, rejected)
                return checkpoint
        if rejected:
            raise Mismatch(
                f"no roll-back to any of the checkpoints {steps} in {self.directory} is possible; "
                f"use another --workdir, with a higher checkpoint.max_to_keep or keep_period."
            )
        raise ValueError(
            f"none of the checkpoints {steps} in {self.directory} can be read; "
            f"restore one from a copy, or use another --workdir."
        )

    def _read(self, step: int, trees: dict, accept: Accept) -> tuple[Any, str | None]:
        """Return ((items, facts), None), (None, None) if not accepted, or (None, damage)."""
        facts, damage = hosts.try_on_all_hosts(lambda: self._read_facts(step))
        if damage or not accept({name: facts[name] for name in facts if name != "leaves"}):
            return None, damage
        leaves = facts.pop("leaves")
        items, damage = hosts.try_on_all_hosts(lambda: self._read_items(step, trees, leaves))
        if damage:
            return None, damage
        _, damage = hosts.try_on_all_hosts(lambda: _verify_checksums(items, leaves))
        if damage:
            return None, damage
        structures = {item: jax.tree.structure(tree) for item, tree in trees.items()}
        restored = {k: tree.unflatten(items[k][1].values()) for k, tree in structures.items()}
        return (restored, facts), None

    def _read_facts(self, step: int) -> dict:
        path = self.directory / str(step) / "facts" / FACTS
        if not path.is_file():  # reading a pipe or a device would never end
            raise ValueError("it has no file of facts")
        facts = metadata.unseal(json.loads(path.read_text()))
        if facts["step"] != step:
            raise ValueError(f"it holds step {facts['step']}")
        if missing := {"skipped", "figures", "leaves"} - facts.keys():
            raise ValueError(f"its facts lack {', '.join(sorted(missing))}")
        return facts

    def _metrics_of(self, step: int) -> dict[str, float]:
        if step not in self._metrics:
            facts, damage = hosts.try_on_all_hosts(lambda: self._read_facts(step))
            self._metrics[step] = {} if damage else facts["figures"]
        return self._metrics[step]

    def _read_items(self, step: int, trees: dict, leaves: dict) -> dict[str, tuple[str, dict]]:
        """Return {item: (item on disk, {path: leaf})}; a missing average is the parameters."""
        items = {}
        for item, tree in trees.items():
            source = "params" if item == "average" and item not in leaves else item
            target = {name: _abstract_leaf(leaf) for name, leaf in metadata.flatten(tree).items()}
            stored = leaves.get(source, {})
            if isinstance(tree, dict):
                skipped = {name for name, subtree in tree.items() if subtree is None}
                stored = {k: spec for k, spec in stored.items() if k.split(".")[0] not in skipped}
            if tree is not None:
                checkpoint = f"checkpoint {step} of {self.directory}"
                metadata.check_leaves(source, target, stored, checkpoint)
            arrays = {}
            if target:
                restore_args = ocp.checkpoint_utils.construct_restore_args(target)
                args = ocp.args.PyTreeRestore(target, restore_args, partial_restore=True)
                arrays = self._arrays.restore(self.directory / str(step) / source, args=args)
            items[item] = source, {name: arrays[name] for name in target}
        return items

    def _set_aside(self, damaged: list[int], rejected: list[int]) -> None:
        # Otherwise a later save of the same step would fail.
        if self.read_only or not damaged + rejected:
            return
        is_first_host = jax.process_index() == 0
        for step in damaged if is_first_host else ():
            corrupt = f"{step}.corrupt-{time.time_ns()}"
            storage.move_dir(self.directory / str(step), self.directory / corrupt, COMMITTED)
        for step in rejected if is_first_host else ():
            (self.directory / str(step) / COMMITTED).unlink()  # then Orbax ignores it
            storage.remove_dir(self.directory / str(step))
        multihost_utils.sync_global_devices("checkpoints set aside")
        self._manager.reload()
        for step in damaged + rejected:
            self._metrics.pop(step, None)


def _verify_checksums(items: dict, leaves: dict) -> None:
    for source, arrays in items.values():
        sums = jax.device_get(checksums.tree_checksums(arrays))
        bad = [name for name in arrays if int(sums[name]) != leaves[source][name]["sum"]]
        if bad:
            raise ValueError(f"checksum of {source} {bad[0]} and {len(bad) - 1} more")


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
