"""A tiny model, its batches and its update, for tests of layouts."""

from __future__ import annotations

import functools

import jax
import numpy as np

from lm import batch, optimizers, parallel, steps, transformer

MODEL = transformer.ModelConfig(
    vocab_size=96,
    d_model=16,
    d_ff=32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    scan_layers=True,
)

ROWS, UPDATES = 16, 2

MESH = {"strategy": "mesh"}

LAYOUTS = {  # name: (devices, ParallelConfig)
    "pmap 1, 2 parts": (1, {"num_microbatches": 2}),
    "pmap 4": (4, {}),
    "pmap 8, 2 parts": (8, {"num_microbatches": 2}),
    "data 4, fsdp 2": (8, MESH | {"fsdp": 2}),
    "data 2, fsdp 2, tensor 2": (8, MESH | {"fsdp": 2, "tensor": 2}),
    "data 2, tensor 4, 2 parts": (8, MESH | {"tensor": 4, "num_microbatches": 2}),
}


def ragged_batch(seed: int) -> batch.Batch:
    """Rows of increasing, very different lengths; the last four are empty."""
    rng = np.random.default_rng(seed)

    def side(columns: int):
        lengths = np.sort(rng.integers(1, columns + 1, ROWS))
        lengths[-4:] = 0
        segments = (np.arange(columns) < lengths[:, None]).astype(np.int32)
        ids = rng.integers(3, MODEL.vocab_size, (ROWS, columns)).astype(np.int32)
        return ids * segments, segments

    return batch.Batch(*side(12), *side(8))


BATCHES = [ragged_batch(seed) for seed in range(UPDATES)]


@functools.cache
def made(name: str = "adamw"):
    """(loss, optimizer, first state) of the tiny model, with every optional field of a state."""
    optimizer, _ = optimizers.make_optimizer(
        optimizers.OptimizerConfig(
            name=name, learning_rate=1e-2, warmup={"steps": 0}, weight_decay=0.1
        ),
        10,
        transformer.param_shapes(MODEL),
        optimizers.RunLength(1.0, 1),
    )
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32)
    params = jax.tree.map(draw, transformer.param_shapes(MODEL))
    zero = np.zeros([], np.int32)
    state = steps.State(zero, params, optimizer.init(params), zero, params)
    return loss_of(), optimizer, jax.device_get(state)


def loss_of(place=transformer.no_constraint):
    """The loss of the tiny model, its activations placed so."""
    model = transformer.Transformer(MODEL, place)
    config = steps.LossConfig(z_loss=1e-3, label_smoothing=0.1)
    return steps.make_language_loss(model, config, np.arange(MODEL.vocab_size) % 5)


def step_of(
    step_config: steps.StepConfig, optimizer: str = "adamw", place=transformer.no_constraint
):
    """The update of the tiny model."""
    optimizer = made(optimizer)[1]
    return functools.partial(
        steps.train_step, loss=loss_of(place), optimizer=optimizer, config=step_config
    )


def make(name: str) -> parallel.Pmap | parallel.Mesh:
    count, options = LAYOUTS[name]
    return parallel.make_strategy(parallel.ParallelConfig(**options), jax.devices()[:count])
