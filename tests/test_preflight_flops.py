"""Laws of executed FLOPs: closed forms, the model's own count, XLA's count, recomputation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lm import steps, transformer
from lm.preflight import flops
from tests import models as words

ROWS, INPUTS, TARGETS = 4, 24, 16


def of(function, *shapes):
    """The FLOPs of a function of arrays of these shapes."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flops.executed_flops(jax.make_jaxpr(function)(*arrays))


# Closed forms. --------------------------------------------------------------------------------

PRODUCT = 2 * 8 * 16 * 8  # of [8, 16] and its transpose


def square(x):
    return x @ x.T


def test_a_product_is_two_flops_for_each_of_its_multiplications():
    assert of(jnp.matmul, (8, 16), (16, 4)) == 2 * 8 * 16 * 4
    assert of(functools.partial(jnp.einsum, "bij,bkj->bik"), (3, 8, 16), (3, 4, 16)) == 3 * 1024
    assert of(jnp.outer, (8,), (4,)) == 0  # a broadcast multiplication, no product


def test_a_convolution_is_a_product_at_each_place():
    conv = lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME")
    assert of(conv, (2, 3, 10, 10), (5, 3, 3, 3)) == 2 * (2 * 5 * 10 * 10) * (3 * 3 * 3)


def test_a_scan_runs_its_body_as_often_as_it_is_long():
    inner = lambda c, w: (c @ w, None)
    assert of(lambda x, w: jax.lax.scan(inner, x, w)[0], (8, 16), (5, 16, 16)) == 5 * 2 * 8 * 256
    outer = lambda c, w: (jax.lax.scan(inner, c, w)[0], None)
    twice = lambda x, w: jax.lax.scan(outer, x, w)[0]
    assert of(twice, (8, 16), (3, 5, 16, 16)) == 15 * 2 * 8 * 256


def test_of_branches_the_largest_counts_and_of_platforms_the_one_asked_for():
    more = lambda x: square(x) @ square(x)
    cond = lambda x: jax.lax.cond(x.sum() > 0, square, more, x)
    assert of(cond, (8, 16)) == 2 * PRODUCT + 2 * 8**3
    either = functools.partial(jax.lax.platform_dependent, cpu=more, default=square)
    made = jax.make_jaxpr(either)(jnp.ones((8, 16)))
    assert flops.executed_flops(made) == PRODUCT
    assert flops.executed_flops(made, "cpu") == 2 * PRODUCT + 2 * 8**3


def test_what_is_wrapped_is_counted():
    own = jax.custom_vjp(square)
    own.defvjp(lambda x: (square(x), x), lambda x, g: (2 * g @ x,))
    assert of(jax.jit(square), (8, 16)) == PRODUCT
    assert of(own, (8, 16)) == PRODUCT
    assert of(jax.grad(lambda x: own(x).sum()), (8, 16)) == 2 * PRODUCT
    assert of(jax.remat(square), (8, 16)) == PRODUCT


def test_what_every_device_does_counts_for_every_device():
    assert of(jax.pmap(square), (8, 8, 16)) == 8 * PRODUCT
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = PartitionSpec("x")
    cut = jax.shard_map(square, mesh=mesh, in_specs=rows, out_specs=rows)
    assert of(cut, (32, 16)) == 8 * PRODUCT
    assert of(jax.jit(square), (32, 16)) == 16 * PRODUCT


def test_what_is_computed_again_counts_again():
    chain = lambda x: jnp.sin(square(x)) @ jnp.ones((8, 8))
    total = lambda f: of(jax.grad(lambda x: f(x).sum()), (8, 16))
    assert total(jax.checkpoint(chain)) == total(chain) + PRODUCT


# The model's own count. -----------------------------------------------------------------------


@functools.cache
def shapes_of(config, rows=ROWS, inputs=INPUTS, targets=TARGETS, num_microbatches=1):
    """A train step of a model, and the shapes of its arguments."""
    model, optimizer = transformer.Transformer(config), optax.sgd(1e-3)
    step_config = steps.StepConfig(num_microbatches=num_microbatches)
    loss = steps.make_language_loss(model, steps.LossConfig(), np.ones(config.vocab_size, np.int32))
    init = functools.partial(steps.init_state, model, optimizer, step_config)
    state = jax.eval_shape(init, transformer.param_shapes(config))
    examples = jax.eval_shape(lambda: transformer.dummy_batch(inputs, targets, rows))
    step = functools.partial(steps.train_step, loss=loss, optimizer=optimizer, config=step_config)
    return step, state, examples


def executed(config, **sizes):
    step, *shapes = shapes_of(config, **sizes)
    return flops.executed_flops(jax.make_jaxpr(step)(*shapes))


def counted(config, rows=ROWS, inputs=INPUTS, targets=TARGETS):
    return rows * transformer.forward_flops(config, inputs, targets)


MODELS = ("t5_1_1", "t5_1_0", "t5gemma_unequal", "five_local", "prefix_t5gemma", "language_umt5")


@pytest.mark.parametrize("name", MODELS)
def test_a_train_step_executes_three_times_the_models_own_count(name):
    config = words.model_of(name)
    assert executed(config) == 3 * counted(config)


@pytest.mark.parametrize(
    "fields", [dict(scan_layers=True), {"attention.implementation": "einsum"}], ids=str
)
def test_how_layers_and_attention_are_computed_changes_no_count(fields):
    assert executed(words.model_of("t5_1_1", **fields)) == 3 * counted(words.model_of("t5_1_1"))


def test_micro_batches_change_no_count():
    config = words.model_of("t5_1_1")
    assert executed(config, num_microbatches=2) == 3 * counted(config)


@pytest.mark.parametrize("layers", [True, False])
def test_recomputation_costs_what_the_backward_pass_needs_of_the_layers(layers):
    config = words.model_of("t5_1_1", scan_layers=layers)
    again = lambda remat: (
        executed(dataclasses.replace(config, remat_policy=remat)) - 3 * counted(config)
    )
    depths = {"inputs": config.num_encoder_layers, "targets": config.num_decoder_layers}
    tokens = depths["inputs"] * INPUTS + depths["targets"] * TARGETS
    head = 2 * ROWS * config.d_model * config.vocab_size * TARGETS
    last = 2 * ROWS * config.d_model * config.d_ff * tokens  # a block's last product: none asks
    assert again("full") == counted(config) - head - last
    pairs = depths["inputs"] * INPUTS**2 + depths["targets"] * (TARGETS**2 + INPUTS * TARGETS)
    assert again("dots") == 4 * ROWS * config.num_heads * config.head_dim * pairs
    assert 0 < again("dots") < again("full") < counted(config)


# XLA's count. ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        {
            "position.kind": "rotary",
            "num_kv_heads": 1,
            "norm.placement": "both",
            "shared_params": "none",
        },
        dict(architecture="prefix_lm", num_encoder_layers=0, num_decoder_layers=2),
    ],
    ids=["t5", "t5gemma", "prefix_lm"],
)
def test_executed_flops_of_an_unrolled_step_are_xlas_within_two_per_cent(fields):
    sizes = dict(vocab_size=2048, d_model=512, d_ff=1024, num_heads=2, num_kv_heads=2, head_dim=512)
    depth = {"num_encoder_layers": 1, "num_decoder_layers": 1, "attention.implementation": "einsum"}
    config = transformer.ModelConfig.from_flat(sizes | depth | fields)
    batch = dict(rows=16, inputs=128, targets=64)
    step, *shapes = shapes_of(config, **batch)
    compiled = jax.jit(step, compiler_options=words.QUICK).lower(*shapes).compile()
    xla = compiled.cost_analysis()["flops"]
    assert executed(config, **batch) == 3 * counted(config, **batch)
    assert xla == pytest.approx(executed(config, **batch), rel=0.02)
