"""The very step that train would run, lowered for any devices from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lm import batch, optimizers, pipeline, run, steps, train, transformer


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


def prepared(this: run.Run, devices) -> Prepared:
    """The update of a run on these jax devices, which need not be here, nor the run's data.

    The number of hosts is that of the devices' processes. What the data decide is made up and has
    the same shape: the text bytes of a piece, and how many updates an epoch has.
    Raises ValueError where the layout does not suit the devices, or a teacher is not there.
    """
    devices = list(devices)
    hosts = len({device.process_index for device in devices})
    strategy = train.layout(this, devices, (0, hosts))
    update = made_update(this, strategy.place_rows)
    state, rows = strategy.placed(update.shapes, batch_shapes(this))
    teacher = None
    if this.config["stage"] == "distill" and not this.config["teacher"]["cache"]:
        teacher, _ = strategy.placed(train.teaching.shapes(this), batch_shapes(this))
    return Prepared(strategy, update.step, (state, rows, teacher))


def lowered(this: run.Run, devices) -> Program:
    """The program of a run on these jax devices; arguments and errors as `prepared`."""
    return prepared(this, devices).lowered()


def made_update(this: run.Run, place=transformer.anywhere) -> train.Update:
    """The update of a run whose data are not there; place: as of train.make_update."""
    text_bytes = np.arange(this.model.vocab_size, dtype=np.int32)
    if total_updates(this):
        return train.make_update(this, text_bytes, total_updates(this), run.pace(this, 0), place)
    endless = optimizers.Pace(1.0, 2**31)  # no shape follows from a duration
    return train.make_update(this, text_bytes, 2**31 - 1, endless, place)


def total_updates(this: run.Run) -> int:
    """Updates of the whole run; 0 where only the data can tell, which epochs are counted in."""
    words = this.config["duration"], this.optimizer.warmup_duration
    if "epoch" in "".join((*words, this.optimizer.cooldown_duration)):
        return 0
    return run.total_updates(this, 0)


def state(this: run.Run) -> steps.State:
    """The shapes of all that training changes."""
    return made_update(this).shapes


def batch_shapes(this: run.Run) -> batch.Batch:
    """The shapes of the rows of one update, of all hosts together."""
    inputs, targets = this.lengths
    widths = (inputs, inputs, targets, targets)
    whole = [jax.ShapeDtypeStruct((this.data.batch_size, width), np.int32) for width in widths]
    cache, told = this.config["teacher"]["cache"], None
    if cache:
        k = pipeline.read_taught(cache).identity["k"]
        each = lambda dtype, *more: jax.ShapeDtypeStruct((*whole[2].shape, *more), dtype)
        told = batch.Taught(each(np.int32, k), each(np.float32, k), each(np.float32))
    return batch.Batch(*whole, taught=told)
