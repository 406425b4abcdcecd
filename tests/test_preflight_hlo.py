"""Bytes that a program sends: closed forms, and program texts in the form of TPU compilers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from lm import steps, transformer
from lm.preflight import hlo
from tests import models

FLOAT = 4  # bytes


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def traffic_of(function, *shapes):
    return hlo.collective_traffic(jax.jit(function).lower(*shapes).compile().as_text())


def test_a_loop_of_unknown_trip_count_is_reported():
    square = lambda x: x @ x
    loop = lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, square, x)
    assert traffic_of(loop, array(256, 256)).unknown_loops == 1


# Collectives on 8 devices. --------------------------------------------------------------------

SIZE = FLOAT * 64 * 32  # of the array that each device holds
# kind -> the exchange of each device's array, bytes that a device sends.
EXCHANGES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "x"), 2 * 7 / 8 * SIZE),
    "all-gather": (lambda x: jax.lax.all_gather(x, "x"), 7 * SIZE),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), 7 / 8 * SIZE),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), 7 / 8 * SIZE),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
        SIZE,
    ),
}


def sharded_traffic(function, *shapes, **axes):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    spec = PartitionSpec(tuple(axes))
    return traffic_of(
        jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), *shapes
    )


@pytest.mark.parametrize("kind", EXCHANGES)
def test_a_collective_sends_the_bytes_of_its_ring(kind):
    exchange, sent = EXCHANGES[kind]
    traffic = sharded_traffic(exchange, array(8 * 64, 32), x=8)
    assert traffic.sent == {kind: sent}


@pytest.mark.parametrize("kind", ["all-reduce", "collective-permute"])
def test_a_collective_in_a_loop_counts_once_per_iteration(kind):
    exchange, sent = EXCHANGES[kind]
    loop = lambda x: jax.lax.fori_loop(0, 5, lambda i, x: jnp.sin(exchange(x)), x)
    traffic = sharded_traffic(loop, array(8 * 64, 32), x=8)
    assert traffic.sent == {kind: 5 * sent}


def test_a_sum_over_one_mesh_axis_sends_among_the_chips_of_that_axis():
    traffic = sharded_traffic(lambda x: jax.lax.psum(x, "y"), array(8 * 64, 32), x=2, y=4)
    assert traffic.sent == {"all-reduce": 2 * 3 / 4 * SIZE}


def test_one_device_sends_nothing():
    assert traffic_of(jnp.matmul, array(8, 8), array(8, 8)).sent == {}


def test_data_parallel_training_sums_four_bytes_per_parameter_and_a_few_metrics():
    config = models.model_of("t5_1_1")
    model, optimizer, step_config = (
        transformer.Transformer(config),
        optax.sgd(0.1),
        steps.StepConfig(),
    )
    loss = steps.make_language_loss(model, steps.LossConfig(), np.ones(config.vocab_size, np.int32))
    axis = steps.Axis("devices", tuple(range(8)))
    step = functools.partial(
        steps.train_step, loss=loss, optimizer=optimizer, config=step_config, axis=axis
    )
    init = functools.partial(steps.init_state, model, optimizer, step_config)
    stacked = lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype)
    state = jax.tree.map(stacked, jax.eval_shape(init, transformer.param_shapes(config)))
    examples = jax.tree.map(stacked, jax.eval_shape(lambda: transformer.dummy_batch(8, 8, 1)))
    lowered = jax.pmap(step, "devices").lower(state, examples)
    traffic = hlo.collective_traffic(lowered.compile(compiler_options=models.QUICK).as_text())
    parameters = FLOAT * transformer.parameter_count(config)
    assert set(traffic.sent) == {"all-reduce"}
    payload = traffic.sent["all-reduce"] / (2 * 7 / 8)
    assert parameters < payload <= parameters + FLOAT * 16


# Program texts in the form of the TPU compiler. ----------------------------------------------

MAIN, FAST = "{1,0:T(8,128)}", "{1,0:T(8,128)S(1)}"


def text(*lines, computations="", header="HloModule jit_f, num_partitions=8"):
    """A program whose entry has the instructions `lines`; the last is its root."""
    lines = [f"  {line}" for line in lines]
    lines[-1] = "  ROOT" + lines[-1][1:]
    return "\n".join(
        [header, "", computations, "ENTRY %main (x: f32[8]) -> f32[8] {", *lines, "}", ""]
    )


LOOP = """
%condition (c: (s32[], f32[64,128])) -> pred[] {
  %end = s32[]{:T(128)} constant(7), metadata={op_name="jit(f)/while/cond"}
  %c = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %below = pred[]{:T(512)} compare(%index, %end), direction=LT
}
%body (b: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %b = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %shard = f32[64,128]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %sum = f32[64,128]{1,0:T(8,128)} all-reduce(%shard), replica_groups=GROUPS, to_apply=%add
  %old = s32[]{:T(128)S(6)} get-tuple-element(%b), index=0
  ROOT %next = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) tuple(%old, %sum)
}
"""


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{}", 8),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=2,'b'=1,'c'=4] {'c'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=8,'b'=1] {'a':(2)2}", 2),
    ],
)
def test_trip_counts_and_group_sizes_are_read_from_the_text(groups, chips):
    shape = "(s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)})"
    program = [
        f"%x = {shape} parameter(0)",
        f"%while.1 = {shape} while(%x), condition=%condition, body=%body",
    ]
    traffic = hlo.collective_traffic(text(*program, computations=LOOP.replace("GROUPS", groups)))
    assert traffic.unknown_loops == 0
    sent = 7 * 2 * (chips - 1) / chips * FLOAT * 64 * 128
    assert traffic.sent == {"all-reduce": sent}


ALL = "replica_groups={{0,1,2,3,4,5,6,7}}"
SCATTERED = f"""
%all-reduce-scatter.1 (i: bf16[128,512]) -> bf16[16,512] {{
  %i = bf16[128,512]{FAST} parameter(0)
  %sum = bf16[128,512]{MAIN} all-reduce(%i), {ALL}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = bf16[16,512]{FAST} dynamic-slice(%sum, %zero, %zero)
}}
"""


def test_an_all_reduce_sliced_in_a_fusion_is_a_reduce_scatter():
    program = [
        f"%x = bf16[128,512]{FAST} parameter(0)",
        f"%fusion.1 = bf16[16,512]{FAST} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1",
    ]
    traffic = hlo.collective_traffic(text(*program, computations=SCATTERED))
    assert traffic.sent == {"reduce-scatter": 7 / 8 * 2 * 128 * 512}


SHARD, WHOLE = f"bf16[16,512]{MAIN}", f"bf16[128,512]{MAIN}"
OVERLAPPED = f'channel_id=1, {ALL}, frontend_attributes={{chain_id="0"}}'
CHAIN = f"""
%first (p: bf16[16,512]) -> (bf16[16,512], bf16[128,512]) {{
  %p = {SHARD} parameter(0)
  %all-gather.1 = {WHOLE} all-gather(%p), {OVERLAPPED}
  ROOT %a = ({SHARD}, {WHOLE}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}
%second (q: bf16[16,512]) -> bf16[128,512] {{
  %q = {SHARD} parameter(0)
  ROOT %all-gather.2 = {WHOLE} all-gather(%q), {OVERLAPPED}
}}
"""


def test_a_gather_overlapped_by_several_fusions_counts_once():
    program = [
        f"%x = {SHARD} parameter(0)",
        f"%fusion.1 = ({SHARD}, {WHOLE}) fusion(%x), kind=kCustom, calls=%first",
        f"%shard = {SHARD} get-tuple-element(%fusion.1), index=0",
        f"%fusion.2 = {WHOLE} fusion(%shard), kind=kCustom, calls=%second",
    ]
    traffic = hlo.collective_traffic(text(*program, computations=CHAIN))
    assert traffic.sent == {"all-gather": 7 / 8 * 2 * 128 * 512}
