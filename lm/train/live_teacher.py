"""The teacher of a distillation that runs beside the student, and the student's own answers."""

from __future__ import annotations

import collections
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import batch, inference, logs, parallel, runs, steps, tokenizer, transformer
from lm.distill import on_policy

NUM_TIMED_CALLS = 3  # of the teacher's forward pass; the median counts


def teacher_config(run: runs.Run) -> transformer.ModelConfig:
    """The teacher's model config, in teacher.dtype and with the run's attention implementation."""
    implementation, dtype = run.model.attention.implementation, run.teacher.dtype
    config = runs.read_run(runs.teacher_source(run)[0]).model
    return config.replace({"attention.implementation": implementation, "dtype": dtype})


def cast_params(run: runs.Run, params: Any) -> Any:
    """The teacher's parameters in teacher.dtype."""
    return jax.tree.map(lambda x: x.astype(run.teacher.dtype), params)


def param_shapes(run: runs.Run) -> Any:
    """The shapes and dtypes of the teacher's parameters on devices, without using memory."""
    shapes = transformer.param_shapes(teacher_config(run))
    return jax.eval_shape(functools.partial(cast_params, run), shapes)


def load_params(
    run: runs.Run, tokens: tokenizer.Tokenizer, strategy: parallel.Strategy, *, is_fresh: bool
) -> Any:
    """The teacher's parameters as its run holds them; None if nothing needs them.

    is_fresh: whether the student still has to be initialized, usually from the teacher's layers;
    later, a cached teacher is not needed. Raises ValueError if the teacher's run does not exist,
    is damaged, or has another tokenizer.
    """
    workdir, which = runs.teacher_source(run)
    initializes = is_fresh and run.teacher.student_init != "random"
    if not workdir or (run.teacher.cache and not initializes):
        return None
    return inference.read_params(runs.read_run(workdir), tokens, which, strategy)[0]


def place_params(run: runs.Run, strategy: parallel.Strategy, params: Any) -> Any:
    """Cast and place a live teacher's parameters; None if the teacher is absent or cached."""
    if params is None or run.teacher.cache:
        return None
    return strategy.place_state(cast_params(run, params))


def measure_cost(run: runs.Run, strategy: parallel.Strategy, teacher: Any) -> dict[str, float]:
    """Measure a placed teacher by a few forward passes over dummy rows; {} without a teacher.

    Returns "teacher_seconds" of the forward passes over one batch, split as an update splits it,
    and GiB of the parameters on the fullest device, "teacher_gib", and on this process's devices
    together, "teacher_process_gib".
    """
    if teacher is None:
        return {}
    shards = max(strategy.shards, run.parallel.fixed_shards)
    num_passes = run.parallel.num_microbatches * shards // strategy.shards
    rows = run.data.batch_size // num_passes // parallel.host_index_and_count()[1]
    ids = [np.ones((rows, length), np.int32) for length in run.lengths for _ in range(2)]
    examples = strategy.place_batch(batch.Batch(*ids))
    model = transformer.Transformer(teacher_config(run), strategy.shard_activations)
    forward = strategy.compile(functools.partial(_forward, model=model))
    seconds = []
    for _ in range(1 + NUM_TIMED_CALLS):
        start = time.perf_counter()
        jax.block_until_ready(forward(teacher, examples))
        seconds.append(time.perf_counter() - start)
    sizes = collections.Counter()
    for shard in (shard for leaf in jax.tree.leaves(teacher) for shard in leaf.addressable_shards):
        sizes[shard.device] += shard.data.nbytes
    return {
        "teacher_seconds": num_passes * statistics.median(seconds[1:]),
        "teacher_gib": max(sizes.values()) / 2**30,
        "teacher_process_gib": sizes.total() / 2**30,
    }


def _forward(params, examples, *, model, axis=None):
    # Per row and from all logits, so that the compiler can leave none out.
    logits = steps.apply_model(model, params, examples, None).astype(jnp.float32)
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1), axis=-1)


def cost_shares(
    cost: dict, throughput: dict, memory: dict, ledger: logs.TimeLedger | logs.NullLog
) -> dict[str, float]:
    """Shares of an update's time and of peak memory, without those that are unknown.

    "teacher_share": the teacher's time; "decode_share": the time of the student's own answers;
    "teacher_memory_share": the teacher's parameters. cost: of measure_cost. throughput: of
    logs.ThroughputMeter. memory: of logs.memory_peak. ledger: at its last row.
    """
    shares = {}
    if cost and throughput.get("step_seconds"):
        shares["teacher_share"] = cost["teacher_seconds"] / throughput["step_seconds"]
    for owner, size in (("device", "teacher_gib"), ("process", "teacher_process_gib")):
        peak = memory.get(f"{owner}_memory_peak_gib")
        if cost and peak:
            shares["teacher_memory_share"] = cost[size] / peak
    if decoding := ledger.seconds_since_row("decode"):
        shares["decode_share"] = decoding / (decoding + ledger.seconds_since_row("step"))
    return shares


class StudentAnswers:
    """Replaces a batch's targets by the student's own answers in a fraction of the updates.

    policy: the section teacher.on_policy. Answers are generated by one program on the devices.
    """

    def __init__(self, run: runs.Run, strategy: parallel.Strategy, eos: int):
        self.policy = run.teacher.on_policy
        self._strategy, self._num_rows, self._seed = strategy, run.data.batch_size, run.seed
        model = transformer.Transformer(run.model, strategy.shard_activations)
        options = {"length": run.lengths[1], "eos": eos, "config": self.policy.decoding}
        answer = functools.partial(on_policy.answer_batch, model=model, **options)
        self._answer = strategy.compile(answer)

    def generate(self, params: Any, placed: batch.Batch, index: int) -> batch.Batch:
        """The placed batch of number `index` with answers of the placed model parameters.

        Samples depend on the seed and on the numbers of the batch and the row only.
        """
        numbers = index * self._num_rows + np.arange(self._num_rows)
        addresses = np.stack([np.full_like(numbers, self._seed), numbers], axis=1)
        addresses = parallel.host_rows(addresses.astype(np.uint32).view(np.int32))
        return self._answer(params, placed, self._strategy.place_batch(addresses))

    def mark_as_given(self, placed: batch.Batch) -> batch.Batch:
        """The placed batch in the form of `generate`, with no answer marked as the student's."""
        rows = np.zeros(self._num_rows // parallel.host_index_and_count()[1], bool)
        return placed._replace(from_student=self._strategy.place_batch(rows))
