"""The training step of a run, lowered for any devices from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lm import batch, optimizers, pipeline, runs, train, transformer


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An update and the shapes of its arguments (state, batch, teacher) over all devices."""

    strategy: Any
    step: Callable
    arguments: tuple

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes on each device by kind, without the padding of buffers; gradients a lower bound."""
        state, rows, teacher = self.arguments
        trees = {
            "params": state.params,
            "optimizer": (state.opt_state, state.step, state.skipped),
            "average": state.average,
            "teacher": teacher,
            "batch": rows,
            "gradients": state.params,
        }
        size = self._bytes_per_device
        return {name: sum(map(size, jax.tree.leaves(tree))) for name, tree in trees.items()}

    def _bytes_per_device(self, leaf) -> int:
        if leaf.sharding:
            return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        return leaf.size * leaf.dtype.itemsize // self.strategy.shards  # stacked: a row per device

    def lower(self) -> jax.stages.Lowered:
        """Lowers the program as train compiles it."""
        return self.strategy.compile(self.step, donate=True).lower(*self.arguments)

    def jaxpr(self) -> jax.extend.core.ClosedJaxpr:
        """Traces the same program; flops counts in it."""
        return jax.make_jaxpr(self.strategy.compile(self.step))(*self.arguments)


def prepare(run: runs.Run, devices: Sequence) -> Prepared:
    """Prepares the update of a run for jax devices; neither they nor the run's data need exist.

    Placeholders of the same shape stand for values of the data: the text bytes of each token and
    the number of updates in an epoch. Each process of the devices is a host.

    Raises: ValueError if the batch or the layout does not divide over the devices, or if the
      teacher is missing.
    """
    hosts = len({device.process_index for device in devices})
    strategy = train.make_strategy(run, list(devices), (0, hosts))
    update = make_update(run, strategy.shard_activations)
    state, rows = strategy.global_shapes(update.state_shapes, batch_shapes(run))
    teacher = None
    if run.stage == "distill" and not run.teacher.cache:
        teacher, _ = strategy.global_shapes(train.live_teacher.param_shapes(run), batch_shapes(run))
    return Prepared(strategy, update.train_step, (state, rows, teacher))


def make_update(
    run: runs.Run, shard_activations: Callable = transformer.no_constraint
) -> train.Update:
    """Calls train.make_update for a run without data, with placeholders as in prepare."""
    text_bytes = np.arange(run.model.vocab_size, dtype=np.int32)
    updates, length = 2**31 - 1, optimizers.RunLength(1.0, 2**31)  # no shape depends on them
    if total_updates(run):
        updates, length = total_updates(run), runs.run_length(run, 0)
    return train.make_update(run, text_bytes, updates, length, shard_activations)


def total_updates(run: runs.Run) -> int:
    """Counts the updates of the run; 0 if its length is in epochs, which requires the data."""
    optimizer = run.optimizer
    if run.duration.epochs or optimizer.warmup.epochs or optimizer.cooldown.epochs:
        return 0
    return runs.total_updates(run, 0)


def batch_shapes(run: runs.Run) -> batch.Batch:
    """Returns the shapes of the batch of one update, over all hosts."""
    inputs, targets = run.lengths
    lengths = (inputs, inputs, targets, targets)
    ids = [jax.ShapeDtypeStruct((run.data.batch_size, length), np.int32) for length in lengths]
    teacher_top_k = None
    if run.teacher.cache:
        k = pipeline.open_teacher_cache(run.teacher.cache).identity["k"]
        each = lambda dtype, *dims: jax.ShapeDtypeStruct((*ids[2].shape, *dims), dtype)
        teacher_top_k = batch.TeacherTopK(each(np.int32, k), each(np.float32, k), each(np.float32))
    return batch.Batch(*ids, teacher_top_k=teacher_top_k)
