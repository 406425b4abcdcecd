"""The very step that train would run, lowered for any devices from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lm import batch, optimizers, pipeline, runs, steps, train, transformer


@dataclasses.dataclass(frozen=True)
class Program:
    """A lowered update; jaxpr: the same, to count in."""

    lowered: Any
    jaxpr: Any


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An update and the shapes of what all devices together hold."""

    strategy: Any
    step: Callable
    arguments: tuple  # state, batch, teacher

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes on each device by kind, of buffers as long as their elements.

        params, optimizer, average (of the weights), teacher, batch; gradients, at least once.
        """
        (state, rows, teacher), of = self.arguments, self._on_a_device
        parts = {
            "params": state.params,
            "optimizer": (state.opt_state, state.step, state.skipped),
            "average": state.average,
            "teacher": teacher,
            "batch": rows,
            "gradients": state.params,
        }
        return {name: sum(map(of, jax.tree.leaves(tree))) for name, tree in parts.items()}

    def _on_a_device(self, leaf) -> int:
        # As its sharding cuts it; where there is none, leaves are stacked, one for each device.
        count, cut = self.strategy.shards, leaf.sharding
        shape = cut.shard_shape(leaf.shape) if cut else (leaf.shape[0] // count, *leaf.shape[1:])
        return math.prod(shape) * leaf.dtype.itemsize

    def lowered(self) -> Program:
        """The program, as train compiles it."""
        compile, given = self.strategy.compile, self.arguments
        return Program(
            lowered=compile(self.step, donate=True).lower(*given),
            jaxpr=jax.make_jaxpr(compile(self.step))(*given),
        )


def prepared(run: runs.Run, devices) -> Prepared:
    """The update of a run on these jax devices, which need not be here, nor the run's data.

    The number of hosts is that of the devices' processes. What the data decide is made up and has
    the same shape: the text bytes of a piece, and how many updates an epoch has.
    Raises ValueError where the layout does not suit the devices, or a teacher is not there.
    """
    devices = list(devices)
    hosts = len({device.process_index for device in devices})
    strategy = train.make_strategy(run, devices, (0, hosts))
    update = made_update(run, strategy.shard_activations)
    state, rows = strategy.global_shapes(update.shapes, batch_shapes(run))
    teacher = None
    if run.config["stage"] == "distill" and not run.config["teacher"]["cache"]:
        teacher, _ = strategy.global_shapes(train.live_teacher.shapes(run), batch_shapes(run))
    return Prepared(strategy, update.step, (state, rows, teacher))


def lowered(run: runs.Run, devices) -> Program:
    """The program of a run on these jax devices; arguments and errors as `prepared`."""
    return prepared(run, devices).lowered()


def made_update(run: runs.Run, place=transformer.no_constraint) -> train.Update:
    """The update of a run whose data are not there; place: as of train.make_update."""
    text_bytes = np.arange(run.model.vocab_size, dtype=np.int32)
    if total_updates(run):
        return train.make_update(run, text_bytes, total_updates(run), runs.pace(run, 0), place)
    endless = optimizers.RunLength(1.0, 2**31)  # no shape follows from a duration
    return train.make_update(run, text_bytes, 2**31 - 1, endless, place)


def total_updates(run: runs.Run) -> int:
    """Updates of the whole run; 0 where only the data can tell, which epochs are counted in."""
    words = run.config["duration"], run.optimizer.warmup_duration
    if "epoch" in "".join((*words, run.optimizer.cooldown_duration)):
        return 0
    return runs.total_updates(run, 0)


def state(run: runs.Run) -> steps.State:
    """The shapes of all that training changes."""
    return made_update(run).shapes


def batch_shapes(run: runs.Run) -> batch.Batch:
    """The shapes of the rows of one update, of all hosts together."""
    inputs, targets = run.lengths
    widths = (inputs, inputs, targets, targets)
    whole = [jax.ShapeDtypeStruct((run.data.batch_size, width), np.int32) for width in widths]
    cache, told = run.config["teacher"]["cache"], None
    if cache:
        k = pipeline.open_teacher_cache(cache).identity["k"]
        each = lambda dtype, *more: jax.ShapeDtypeStruct((*whole[2].shape, *more), dtype)
        told = batch.TeacherTopK(each(np.int32, k), each(np.float32, k), each(np.float32))
    return batch.Batch(*whole, teacher_top_k=told)
