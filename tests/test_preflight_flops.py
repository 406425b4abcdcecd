"""Executed FLOPs: closed forms, the model's formula, XLA's count, recomputation."""

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
from tests import models

ROWS, INPUTS, TARGETS = 4, 24, 16


def count_flops(function, *shapes):
    """Counts the FLOPs of a function of float32 arrays."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flops.executed_flops(jax.make_jaxpr(function)(*arrays))


# Closed forms. --------------------------------------------------------------------------------

PRODUCT = 2 * 8 * 16 * 8  # of [8, 16] and its transpose


def square(x):
    return x @ x.T


def test_a_matrix_product_takes_two_flops_per_multiplication():
    assert count_flops(jnp.matmul, (8, 16), (16, 4)) == 2 * 8 * 16 * 4
    assert (
        count_flops(functools.partial(jnp.einsum, "bij,bkj->bik"), (3, 8, 16), (3, 4, 16))
        == 3 * 1024
    )
    assert count_flops(jnp.outer, (8,), (4,)) == 0  # a broadcast multiplication, no product


def test_a_convolution_is_a_product_at_each_position():
    conv = lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME")
    assert count_flops(conv, (2, 3, 10, 10), (5, 3, 3, 3)) == 2 * (2 * 5 * 10 * 10) * (3 * 3 * 3)


def test_a_scan_counts_its_body_once_per_iteration():
    inner = lambda c, w: (c @ w, None)
    assert (
        count_flops(lambda x, w: jax.lax.scan(inner, x, w)[0], (8, 16), (5, 16, 16))
        == 5 * 2 * 8 * 256
    )
    outer = lambda c, w: (jax.lax.scan(inner, c, w)[0], None)
    twice = lambda x, w: jax.lax.scan(outer, x, w)[0]
    assert count_flops(twice, (8, 16), (3, 5, 16, 16)) == 15 * 2 * 8 * 256


def test_a_cond_counts_its_largest_branch_and_platform_dependent_that_of_the_platform():
    larger = lambda x: square(x) @ square(x)
    cond = lambda x: jax.lax.cond(x.sum() > 0, square, larger, x)
    assert count_flops(cond, (8, 16)) == 2 * PRODUCT + 2 * 8**3
    either = functools.partial(jax.lax.platform_dependent, cpu=larger, default=square)
    jaxpr = jax.make_jaxpr(either)(jnp.ones((8, 16)))
    assert flops.executed_flops(jaxpr) == PRODUCT
    assert flops.executed_flops(jaxpr, "cpu") == 2 * PRODUCT + 2 * 8**3


def test_functions_inside_jit_custom_vjp_and_remat_count():
    custom = jax.custom_vjp(square)
    custom.defvjp(lambda x: (square(x), x), lambda x, g: (2 * g @ x,))
    assert count_flops(jax.jit(square), (8, 16)) == PRODUCT
    assert count_flops(custom, (8, 16)) == PRODUCT
    assert count_flops(jax.grad(lambda x: custom(x).sum()), (8, 16)) == 2 * PRODUCT
    assert count_flops(jax.remat(square), (8, 16)) == PRODUCT


def test_work_under_pmap_and_shard_map_counts_once_per_device():
    assert count_flops(jax.pmap(square), (8, 8, 16)) == 8 * PRODUCT
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = PartitionSpec("x")
    sharded = jax.shard_map(square, mesh=mesh, in_specs=rows, out_specs=rows)
    assert count_flops(sharded, (32, 16)) == 8 * PRODUCT
    assert count_flops(jax.jit(square), (32, 16)) == 16 * PRODUCT


def test_recomputation_counts_again():
    chain = lambda x: jnp.sin(square(x)) @ jnp.ones((8, 8))
    total = lambda f: count_flops(jax.grad(lambda x: f(x).sum()), (8, 16))
    assert total(jax.checkpoint(chain)) == total(chain) + PRODUCT


# The model's formula. --------------------------------------------------------------------------


@functools.cache
def step_and_shapes(config, rows=ROWS, inputs=INPUTS, targets=TARGETS, num_microbatches=1):
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
    step, *shapes = step_and_shapes(config, **sizes)
    return flops.executed_flops(jax.make_jaxpr(step)(*shapes))


def formula(config, rows=ROWS, inputs=INPUTS, targets=TARGETS):
    return rows * transformer.forward_flops(config, inputs, targets)


MODELS = ("t5_1_1", "t5_1_0", "t5gemma_unequal", "five_local", "prefix_t5gemma", "language_umt5")


@pytest.mark.parametrize("name", MODELS)
def test_a_train_step_executes_three_times_the_forward_flops(name):
    config = models.model_of(name)
    assert executed(config) == 3 * formula(config)


@pytest.mark.parametrize(
    "fields", [dict(scan_layers=True), {"attention.implementation": "einsum"}], ids=str
)
def test_scan_and_attention_implementation_change_no_count(fields):
    assert executed(models.model_of("t5_1_1", **fields)) == 3 * formula(models.model_of("t5_1_1"))


def test_micro_batches_change_no_count():
    config = models.model_of("t5_1_1")
    assert executed(config, num_microbatches=2) == 3 * formula(config)


@pytest.mark.parametrize("layers", [True, False])
def test_rematerialization_recomputes_only_what_the_backward_pass_needs(layers):
    config = models.model_of("t5_1_1", scan_layers=layers)
    recomputed = lambda remat: (
        executed(dataclasses.replace(config, remat_policy=remat)) - 3 * formula(config)
    )
    depths = {"inputs": config.num_encoder_layers, "targets": config.num_decoder_layers}
    tokens = depths["inputs"] * INPUTS + depths["targets"] * TARGETS
    head = 2 * ROWS * config.d_model * config.vocab_size * TARGETS
    last = 2 * ROWS * config.d_model * config.d_ff * tokens  # a block's last product is not needed
    assert recomputed("full") == formula(config) - head - last
    pairs = depths["inputs"] * INPUTS**2 + depths["targets"] * (TARGETS**2 + INPUTS * TARGETS)
    assert recomputed("dots") == 4 * ROWS * config.num_heads * config.head_dim * pairs
    assert 0 < recomputed("dots") < recomputed("full") < formula(config)


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
    step, *shapes = step_and_shapes(config, **batch)
    compiled = jax.jit(step, compiler_options=models.QUICK).lower(*shapes).compile()
    xla = compiled.cost_analysis()["flops"]
    assert executed(config, **batch) == 3 * formula(config, **batch)
    assert xla == pytest.approx(executed(config, **batch), rel=0.02)
