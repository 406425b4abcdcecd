"""Laws of the fixed reduction: the bits of a run follow from its shards, not from its devices."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import batch, cpu_kernels, optimizers, parallel, steps, transformer
from tests import layouts

MODEL = dataclasses.replace(
    layouts.MODEL, num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.2
)
KINDS = {  # (optimizer, micro-batches, the devices it is tried on)
    "adamw, 2 parts": ("adamw", 2, (1, 2, 4, 8)),
    "adafactor": ("adafactor", 1, (1, 8)),
}
pytestmark = pytest.mark.exact  # without optimizations the rounding depends on the shapes
BATCHES = layouts.BATCHES
LONG = 128  # inputs of a row that attention would take by itself, were it not whole


@functools.cache
def update(
    optimizer: str,
    num_microbatches: int,
    devices: int,
    reduction: bool = True,
    implementation="fast_cpu",
):
    """(strategy, compiled update, first state), with dropout and all that a state can hold."""
    config = MODEL.replace({"attention.implementation": implementation})
    layout = parallel.ParallelConfig(
        deterministic_reduction=reduction, num_microbatches=num_microbatches
    )
    strategy = parallel.make_strategy(layout, jax.devices()[:devices])
    shapes, model = transformer.param_shapes(config), transformer.Transformer(config)
    chosen = optimizers.OptimizerConfig(
        name=optimizer, learning_rate=1e-2, warmup={"steps": 0}, weight_decay=0.1
    )
    transform, _ = optimizers.make_optimizer(chosen, 10, shapes, optimizers.RunLength(1.0, 1))
    loss = steps.make_language_loss(model, steps.LossConfig(), np.arange(MODEL.vocab_size) % 5)
    step_config = steps.StepConfig(0, num_microbatches, layout.fixed_shards, ema_decay=0.9)
    step = functools.partial(steps.train_step, loss=loss, optimizer=transform, config=step_config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    state = jax.device_get(steps.init_state(model, transform, step_config, params))
    return strategy, strategy.compile(step), state


def bits(tree) -> str:
    """A hash of every bit of a tree."""
    leaves = jax.tree.leaves(jax.device_get(tree))
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()


def run(kind, devices: list[int], reduction: bool = True) -> str:
    """The bits of state and sums after an update a batch, each on so many devices."""
    state = update(*kind, devices[0], reduction)[2]
    for count, examples in zip(devices, BATCHES, strict=True):
        strategy, step, _ = update(*kind, count, reduction)
        state, sums = step(strategy.place_state(state), strategy.place_batch(examples))
        state, sums = jax.device_get(strategy.fetch((state, sums)))
    return bits((state, sums))


@pytest.mark.parametrize("name", KINDS)
def test_the_bits_of_a_run_are_the_same_on_any_number_of_devices(name):
    *kind, counts = KINDS[name]
    results = {devices: run(kind, [devices] * len(BATCHES)) for devices in counts}
    assert len(set(results.values())) == 1, results
    # and where the number changes on the way
    assert run(kind, [counts[-1], counts[0]]) == results[1] == run(kind, [counts[0], counts[-1]])


def test_the_bits_are_the_same_with_long_rows():
    rng, rows = np.random.default_rng(0), layouts.ROWS
    draw = lambda length: rng.integers(3, 90, (rows, length)).astype(np.int32)
    ones = lambda length: np.ones((rows, length), np.int32)
    long = batch.Batch(draw(LONG), ones(LONG), draw(16), ones(16))
    assert MODEL.num_heads * LONG**2 >= cpu_kernels.MIN_ROW_SCORES
    results = []
    for devices in (1, 2):
        strategy, step, state = update("adafactor", 1, devices, implementation="einsum")
        done = step(strategy.place_state(state), strategy.place_batch(long))
        results.append(bits(strategy.fetch(done)))
    assert results[0] == results[1]


def test_the_default_reduction_has_different_bits_on_other_devices():
    """So that the law above is no accident of small numbers."""
    assert len({run(("adamw", 1), [devices] * 2, False) for devices in (1, 2)}) == 2


def folded(shards: int, devices: int, seed: int = 0) -> np.ndarray:
    """The sum of one number per row, [shards], as the update adds it on `devices` devices."""
    rows = np.random.default_rng(seed).normal(size=shards).astype(np.float32)
    rows *= 10.0 ** np.random.default_rng(seed).integers(-6, 7, shards).astype(np.float32)
    strategy = parallel.make_strategy(parallel.ParallelConfig(), jax.devices()[:devices])
    step_config = steps.StepConfig(reduction_shards=shards)

    def add(_, placed, *, axis):
        return steps._batch_sum(
            lambda part, key: jnp.sum(part), placed, jax.random.key(0), step_config, axis
        )

    placed = strategy.place_batch(rows)
    return rows, np.asarray(strategy.compile(add)(placed, placed))


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("shards", [8, 16])
def test_shards_are_summed_by_halving(shards, devices):
    rows, results = folded(shards, devices)
    while len(rows) > 1:
        half = len(rows) // 2
        rows = rows[:half] + rows[half:]
    np.testing.assert_array_equal(results, np.repeat(rows, devices))
