"""The teacher beside the loop, and the answers of the student that it judges."""

from __future__ import annotations

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from lm import batch, inference, parallel, runs, steps, transformer
from lm.distill import on_policy

CALLS = 3  # of the teacher's forward pass, whose median is what it takes


def model_of(run: runs.Run) -> transformer.ModelConfig:
    """The teacher's model as it is computed here: in teacher.dtype, with our attention."""
    theirs = runs.read_run(runs.teacher_source(run)[0]).model
    implementation, dtype = run.model.attention.implementation, run.teacher.dtype
    return theirs.replace({"attention.implementation": implementation, "dtype": dtype})


def cast(run: runs.Run, params):
    """The teacher's parameters in teacher.dtype, wherever they lie."""
    dtype = run.teacher.dtype
    return jax.tree.map(lambda x: x.astype(dtype), params)


def shapes(run: runs.Run):
    """What the teacher's parameters are on the devices, without using memory for it."""
    whole = transformer.param_shapes(runs.read_run(runs.teacher_source(run)[0]).model)
    return jax.eval_shape(functools.partial(cast, run), whole)


def read(run: runs.Run, tokens, strategy, *, fresh: bool):
    """The teacher's parameters as its run has them; None where nothing needs them.

    fresh: whether the student still has to start, from the teacher's layers as a rule; later a
    cached teacher is not needed. Raises ValueError where the teacher's run is not there, or not
    whole, or of other tokens.
    """
    named, which = runs.teacher_source(run)
    live, starts = (
        not run.teacher.cache,
        run.teacher.student_init != "random",
    )
    if not named or not (live or (fresh and starts)):
        return None
    return inference.read_params(runs.read_run(named), tokens, which, strategy)[0]


def placed(run: runs.Run, strategy, params):
    """A live teacher's parameters on the devices, cast once; None where there is none."""
    if params is None or run.teacher.cache:
        return None
    return strategy.place_state(cast(run, params))


def cost(run: runs.Run, strategy, teacher) -> dict[str, float]:
    """What a placed teacher takes: {"teacher_seconds", "teacher_gib", "teacher_process_gib",
    "teacher_workspace_gib"}.

    Seconds of its forward passes over one batch, in the parts that an update takes; GiB of its
    parameters on the fullest device and on all of this process, and of what a pass needs beside
    them on one, where the compiler tells. Measured by a few passes over made-up rows, once; {}
    without a teacher.
    """
    if teacher is None:
        return {}
    shards = max(strategy.shards, run.parallel.fixed_shards)
    parts = run.parallel.num_microbatches * shards // strategy.shards
    rows = run.data.batch_size // parts // parallel.host_index_and_count()[1]
    ids = [np.ones((rows, length), np.int32) for length in run.lengths for _ in range(2)]
    examples = strategy.place_batch(batch.Batch(*ids))
    model = transformer.Transformer(model_of(run), strategy.shard_activations)
    forward = strategy.compile(functools.partial(_forward, model=model))
    seconds = []
    for _ in range(1 + CALLS):
        start = time.perf_counter()
        jax.block_until_ready(forward(teacher, examples))
        seconds.append(time.perf_counter() - start)
    taken = {"teacher_seconds": parts * statistics.median(seconds[1:])}
    held = _bytes_by_device(teacher).values()
    taken |= {"teacher_gib": max(held) / 2**30, "teacher_process_gib": sum(held) / 2**30}
    told = forward.lower(teacher, examples).compile().memory_analysis()
    return taken | ({"teacher_workspace_gib": told.temp_size_in_bytes / 2**30} if told else {})


def _forward(params, examples, *, model, axis=None):
    # By row, of all logits, so that none is left out.
    logits = steps.apply_model(model, params, examples, None).astype(jnp.float32)
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1), axis=-1)


def _bytes_by_device(tree) -> dict:
    held: dict = {}
    for leaf in jax.tree.leaves(tree):
        for part in leaf.addressable_shards:
            held[part.device] = held.get(part.device, 0) + part.data.nbytes
    return held


def shares(cost: dict, rates: dict, memory: dict, ledger) -> dict[str, float]:
    """Of an update's time: {"teacher_share": what the teacher takes, "decode_share": the student's
    own answers}; and "teacher_memory_share", the teacher's parameters, of the memory's peak.

    cost: as `cost` gives it. rates: with "step_seconds", since the last row, as the ledger's.
    memory: as logs.memory. What is not known, or not there, is left out.
    """
    found = {}
    if cost and rates.get("step_seconds"):
        found["teacher_share"] = cost["teacher_seconds"] / rates["step_seconds"]
    for whose in ("device", "process"):
        peak = memory.get(f"{whose}_memory_peak_gib")
        if cost and peak:
            part = "teacher_gib" if whose == "device" else "teacher_process_gib"
            found["teacher_memory_share"] = cost[part] / peak
    if written := ledger.seconds_since_row("decode"):
        found["decode_share"] = written / (written + ledger.seconds_since_row("step"))
    return found


class Answers:
    """The student's own answers in place of a batch's targets, in a share of the updates.

    policy: which, and how they are found. One program on the devices; nothing is fetched.
    """

    def __init__(self, run: runs.Run, strategy, eos: int):
        self.policy = run.teacher.on_policy
        self._strategy, self._rows = strategy, run.data.batch_size
        self._seed = run.seed
        model = transformer.Transformer(run.model, strategy.shard_activations)
        options = {"length": run.lengths[1], "eos": eos, "config": self.policy.decoding}
        self._write = strategy.compile(
            functools.partial(on_policy.answered, model=model, **options)
        )

    def written(self, params, placed: batch.Batch, index: int) -> batch.Batch:
        """The placed batch of that number, answered by placed parameters of the model.

        What is drawn follows from the seed, the batch's number and the row's.
        """
        numbers = index * self._rows + np.arange(self._rows)
        addresses = np.stack([np.full_like(numbers, self._seed), numbers], axis=1)
        addresses = addresses.astype(np.uint32).view(np.int32)
        own = self._strategy.place_batch(parallel.host_rows(addresses))
        return self._write(params, placed, own)

    def given(self, placed: batch.Batch) -> batch.Batch:
        """The placed batch as it is, in the same form: no answer in it is the student's own."""
        rows = np.zeros(self._rows // parallel.host_index_and_count()[1], bool)
        return placed._replace(from_student=self._strategy.place_batch(rows))
