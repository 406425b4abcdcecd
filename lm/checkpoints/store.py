"""The folder of a run's checkpoints: save, and the way back to the newest one that is sound."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lm import storage
from lm.checkpoints import checksums, hosts, metadata, retention
from lm.checkpoints.metadata import Mismatch

logger = logging.getLogger(__name__)
COMMITTED = "commit_success.txt"  # Orbax's mark of a step that is whole
FACTS = "metadata"  # its name for a JSON item
UNWRITTEN = (OSError, ValueError, RuntimeError)  # what Orbax and TensorStore raise for a full disk


class Checkpoints:
    """The checkpoints of one run, newest first; a context manager that waits for the last save.

    keep: the newest that stay, 2 at least; keep_every: and those at its multiples, 0: none;
    keep_best: and the best by this held-out figure, lower is better for losses; empty: none.
    background: a save copies the arrays and returns; else it writes them from where they are.
    With several hosts every one of them calls every function.
    """

    def __init__(
        self, directory, *, keep=2, keep_every=0, keep_best="", read_only=False, background=True
    ):
        self.directory = storage.as_path(directory).absolute()
        self.read_only, self.background, self.keep_best = read_only, background, keep_best
        self._figures: dict[int, dict[str, float]] = {}
        if not read_only:
            storage.check_deletable(self.directory)
        best = retention.KeepBest(keep_best, self._figures_of) if keep_best else None
        self._policy = retention.make_policy(keep, keep_every, best)
        # Floats hardly compress, and compressing them takes as much memory again.
        self._arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
        self._saving = None
        self._manager = self._open()

    def _open(self):
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
        handlers = {item: arrays() for item in ("params", "opt_state", "average")}
        handlers["facts"] = ocp.JsonCheckpointHandler(filename=FACTS)
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        try:
            self.wait()
        except OSError as unwritten:
            if kind is None:
                raise
            logger.warning("%s", unwritten)  # what is on its way out says why
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """Committed steps, newest first, good or not."""
        self._manager.reload()
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, state, facts: dict, figures: dict[str, float] | None = None) -> None:
        """Start to save a steps.State of one logical copy and its facts (JSON); step as state says.

        figures: the held-out figures of this step, for keep_best; None where it was not evaluated.
        With opt_state=None parameters alone are saved: to be read, not to be continued.
        The caller may donate the arrays when this returns. Raises OSError where this save, or the
        one before it, could not be written; ValueError for a figure or a step that cannot be.
        """
        step = int(state.step)
        self._check_figure(figures)
        self.wait()
        if step in self._manager.all_steps():
            raise ValueError(
                f"checkpoint {step} is already in {self.directory}; restore it, or use another "
                f"--workdir."
            )
        trees = {"params": state.params, "opt_state": state.opt_state, "average": state.average}
        items = {
            item: {name: hosts.local_leaf(leaf) for name, leaf in metadata.flatten(tree).items()}
            for item, tree in trees.items()
            if tree is not None
        }
        facts = json.loads(json.dumps(facts)) | {"step": step, "skipped": int(state.skipped)}
        facts |= {"figures": figures or {}, "leaves": self._leaves(items)}
        saves = {item: ocp.args.PyTreeSave(leaves) for item, leaves in items.items()}
        saves["facts"] = ocp.args.JsonSave(metadata.seal(facts))
        self._figures[step], self._saving = facts["figures"], step
        with self._written(f"checkpoint {step}"):
            self._clear()
            if not self._manager.save(step, args=ocp.args.Composite(**saves), force=True):
                raise RuntimeError("it was passed over")

    def _check_figure(self, figures: dict | None) -> None:
        if self.keep_best and figures is not None and self.keep_best not in figures:
            raise ValueError(
                f"keep_best={self.keep_best!r} is no held-out figure; choose one of "
                f"{', '.join(sorted(figures))}, or leave it empty."
            )

    def _leaves(self, items: dict) -> dict:
        # On the host the sums of arrays need no second copy, on devices they are faster.
        on_host = lambda leaves: {
            name: checksums.host_checksum(leaf) for name, leaf in leaves.items()
        }
        sums_of = checksums.tree_checksums if self.background else on_host
        found = {item: jax.device_get(sums_of(leaves)) for item, leaves in items.items()}
        said = lambda item, name, leaf: {"sum": int(found[item][name]), **metadata.leaf_spec(leaf)}
        return {
            item: {name: said(item, name, leaf) for name, leaf in leaves.items()}
            for item, leaves in items.items()
        }

    def wait(self) -> None:
        """Block until the save in progress is on disk; OSError where it could not be written."""
        with self._written(f"checkpoint {self._saving}"):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _written(self, what: str):
        # A manager that failed once is of no use; the new one sees what is whole on disk.
        try:
            yield
        except UNWRITTEN as error:
            with contextlib.suppress(*UNWRITTEN):
                self._manager.close()
            self._manager = self._open()
            with contextlib.suppress(OSError):
                self._clear()
            raise OSError(
                f"{what} could not be written in {self.directory} ({hosts.short(error)}); make "
                f"room or allow writing there and start the same command again: what was saved "
                f"before is whole."
            ) from error

    def _unfinished(self) -> list[pathlib.Path]:
        # What a killed or failed save left: a number, without the mark of a whole step.
        made = re.compile(r"\d+(\.orbax-checkpoint-tmp.*)?")
        paths = [path for path in self.directory.glob("*") if made.fullmatch(path.name)]
        is_folder = lambda path: path.is_symlink() or path.is_dir()
        return [path for path in paths if is_folder(path) and not (path / COMMITTED).exists()]

    def _clear(self) -> None:
        for path in self._unfinished() if hosts.is_first_host() else ():
            storage.remove_dir(path)

    def restore(self, state, accept: Callable[[dict], bool] = lambda facts: True):
        """(state, facts) of the newest step that verifies, or None where nothing was ever saved.

        state: a steps.State of arrays or ShapeDtypeStructs (with shardings to restore into). Where
        it has an average and the checkpoint none, the average starts from the parameters.
        accept: facts -> whether this step is wanted; newer ones that are sound but not wanted are
        deleted, so that saving goes on past them. Raises ValueError where checkpoints exist and
        none verifies, now and at every later call: nothing restarts silently. Raises Mismatch for
        a sound checkpoint of another model, and where none is accepted.
        """
        wanted = {"params": state.params, "opt_state": state.opt_state, "average": state.average}
        steps = hosts.broadcast_steps(self.steps())
        if not steps:
            self._check_nothing_lost()
            return None
        items, facts = self._first_sound(steps, wanted, accept)
        if not self.read_only:
            self._clear()  # what a kill in the middle of a deletion left
        step = jnp.asarray(facts["step"], jnp.int32)
        skipped = jnp.asarray(facts["skipped"], jnp.int32)
        return state._replace(step=step, skipped=skipped, **items), facts

    def restore_params(self, params, which: str | int = "newest"):
        """(params, facts) of a step that verifies, the average of weights where it has one.

        which: "newest", "best" (by keep_best), or the number of a step. Other state is not read,
        nor a part of the parameters that is None in `params`.
        """
        items, facts = self._first_sound(self.named(which), {"average": params})
        return items["average"], facts

    def fingerprint(self, which: str | int = "newest") -> tuple[int, str]:
        """(step, a hash of the sums of what restore_params gives); no array is read.

        Raises ValueError as restore_params where there is none, or its facts cannot be read.
        """
        step = self.named(which)[0]
        facts, damage = hosts.try_on_all_hosts(lambda: self._facts(step))
        if damage:
            raise ValueError(
                f"checkpoint {step} in {self.directory} is damaged ({damage}); restore it from a "
                f"copy."
            )
        leaves = facts["leaves"]
        return step, metadata.hash_facts(leaves["average" if "average" in leaves else "params"])[
            :16
        ]

    def named(self, which: str | int) -> list[int]:
        """The steps that `which` means, the first choice first; see restore_params.

        Raises ValueError where there is none.
        """
        steps = hosts.broadcast_steps(self.steps())
        if not steps:
            raise ValueError(f"no checkpoint in {self.directory}; train that run first.")
        if which == "best":
            figures = {step: self._figures_of(step) for step in steps}
            chosen = retention.rank_steps(self.keep_best, figures)
            lacking = f"no checkpoint has the figure keep_best={self.keep_best!r}"
            if not self.keep_best:
                lacking = "the run has no keep_best, so no checkpoint is the best"
        else:
            chosen = steps if which == "newest" else [step for step in steps if step == which]
            lacking = f"there is no checkpoint {which}"
        if not chosen:
            raise ValueError(
                f"{lacking} in {self.directory}; choose newest or one of "
                f"{', '.join(map(str, sorted(steps)))}."
            )
        return chosen

    def _check_nothing_lost(self) -> None:
        # The first save is of step 0: of a later one that is unfinished, some were whole before.
        lost = sorted(p.name for p in self._unfinished() if not p.name.startswith("0"))
        if lost:
            raise ValueError(
                f"{self.directory} has unfinished checkpoints ({', '.join(lost)}) and no whole "
                f"one; restore one from a copy, or delete them to start anew."
            )

    def _first_sound(self, steps: list[int], wanted: dict, accept=lambda facts: True):
        damaged, refused = [], []
        for step in steps:
            found, damage = self._read(step, wanted, accept)
            if damage:
                logger.warning("checkpoint %d in %s is damaged: %s", step, self.directory, damage)
                damaged.append(step)
            elif found is None:
                refused.append(step)
            else:
                # Only now: with none left in place, the next call would take it for a fresh start.
                self._put_away(damaged, refused)
                return found
        if refused:
            raise Mismatch(
                f"of the checkpoints {steps} in {self.directory} none is one to go back to; keep "
                f"more of them (keep, keep_every) in another --workdir."
            )
        raise ValueError(
            f"none of the checkpoints {steps} in {self.directory} can be read; "
            f"restore one from a copy, or start anew in another --workdir."
        )

    def _read(self, step: int, wanted: dict, accept):
        # ((items, facts), None); (None, None) where not accepted; (None, the damage in words).
        facts, damage = hosts.try_on_all_hosts(lambda: self._facts(step))
        if damage or not accept({name: facts[name] for name in facts if name != "leaves"}):
            return None, damage
        leaves = facts.pop("leaves")
        items, damage = hosts.try_on_all_hosts(lambda: self._items(step, wanted, leaves))
        if damage:
            return None, damage
        _, damage = hosts.try_on_all_hosts(lambda: _check_sums(items, leaves))
        if damage:
            return None, damage
        trees = {item: jax.tree.structure(tree) for item, tree in wanted.items()}
        whole = {item: tree.unflatten(items[item][1].values()) for item, tree in trees.items()}
        return (whole, facts), None

    def _facts(self, step: int) -> dict:
        path = self.directory / str(step) / "facts" / FACTS
        if not path.is_file():  # a pipe or a device would be read for ever
            raise ValueError("it has no file of facts")
        facts = metadata.unseal(json.loads(path.read_text()))
        if facts["step"] != step:
            raise ValueError(f"it holds step {facts['step']}")
        if lacking := {"skipped", "figures", "leaves"} - facts.keys():
            raise ValueError(f"its facts lack {', '.join(sorted(lacking))}")
        return facts

    def _figures_of(self, step: int) -> dict[str, float]:
        if step not in self._figures:
            facts, damage = hosts.try_on_all_hosts(lambda: self._facts(step))
            self._figures[step] = {} if damage else facts["figures"]
        return self._figures[step]

    def _items(self, step: int, wanted: dict, leaves: dict) -> dict[str, tuple[str, dict]]:
        # {item: (what it was read from, {path: leaf})}; a first average is the parameters.
        items = {}
        for item, tree in wanted.items():
            source = "params" if item == "average" and item not in leaves else item
            target = {name: _abstract(leaf) for name, leaf in metadata.flatten(tree).items()}
            stored = leaves.get(source, {})
            if isinstance(tree, dict):
                unread = {name for name, part in tree.items() if part is None}
                stored = {name: stored[name] for name in stored if name.split(".")[0] not in unread}
            if tree is not None:
                where = f"checkpoint {step} of {self.directory}"
                metadata.check_leaves(source, target, stored, where)
            found = {}
            if target:
                placed = ocp.checkpoint_utils.construct_restore_args(target)
                args = ocp.args.PyTreeRestore(target, placed, partial_restore=True)
                found = self._arrays.restore(self.directory / str(step) / source, args=args)
            items[item] = source, {name: found[name] for name in target}
        return items

    def _put_away(self, damaged: list[int], refused: list[int]) -> None:
        # A step left in place would make a later save of that step impossible.
        if self.read_only or not damaged + refused:
            return
        for step in damaged if hosts.is_first_host() else ():
            aside = f"{step}.corrupt-{time.time_ns()}"
            storage.move_dir(self.directory / str(step), self.directory / aside, COMMITTED)
        for step in refused if hosts.is_first_host() else ():
            (self.directory / str(step) / COMMITTED).unlink()  # at once it is no step any more
            storage.remove_dir(self.directory / str(step))
        hosts.barrier("checkpoints put away")
        self._manager.reload()
        for step in damaged + refused:
            self._figures.pop(step, None)


def _check_sums(items: dict, leaves: dict) -> None:
    for source, found in items.values():
        summed = jax.device_get(checksums.tree_checksums(found))
        bad = [name for name in found if int(summed[name]) != leaves[source][name]["sum"]]
        if bad:
            raise ValueError(f"checksum of {source} {bad[0]} and {len(bad) - 1} more")


def _abstract(leaf):
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
