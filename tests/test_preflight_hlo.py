"""Laws of the bytes that a program moves: XLA's own count, closed forms, a TPU's words."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from lm import steps, transformer
from lm.preflight import compiler, hlo
from tests import test_transformer_words as words

FLOAT = 4  # bytes


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled(function, *shapes, **options):
    return jax.jit(function, **options).lower(*shapes).compile()


def of(function, *shapes, **options):
    return hlo.traffic(compiled(function, *shapes, **options).as_text())


# Memory. --------------------------------------------------------------------------------------


def feed(kernels, x):
    return jnp.sum((jax.nn.gelu(x @ kernels[0]) @ kernels[1]) ** 2)


def attend(query, key, value):
    return jax.nn.softmax(query @ key.swapaxes(-1, -2)) @ value


def update(x, y, place):
    return jax.lax.dynamic_update_slice(x, y * 2, (place, 0))


PLACE = array(dtype=jnp.int32)
LOOP_FREE = {
    "product": (jnp.matmul, array(512, 256), array(256, 384)),
    "feed_forward": (jax.grad(feed), (array(128, 512), array(512, 128)), array(256, 128)),
    "attention": (attend, *[array(4, 128, 64)] * 3),
    "softmax": (jax.nn.log_softmax, array(256, 1000)),
    "slice": (lambda x, i: jax.lax.dynamic_slice(x, (i, 0), (64, 128)) * 2, array(999, 128), PLACE),
    "transpose": (lambda x: (x.T + 1, x.sum()), array(512, 256)),
    "convolution": (
        lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME"),
        array(4, 8, 32, 32),
        array(16, 8, 3, 3),
    ),
    "sort": (jnp.sort, array(64, 512)),
}


@pytest.mark.parametrize("name", LOOP_FREE)
def test_without_loops_memory_is_xlas_count_within_five_per_cent(name):
    made = compiled(*LOOP_FREE[name])
    counted = hlo.traffic(made.as_text()).memory_bytes
    assert counted == pytest.approx(made.cost_analysis()["bytes accessed"], rel=0.05)


def test_a_product_reads_two_matrices_and_writes_one():
    made = of(*LOOP_FREE["product"])
    assert made.memory_bytes == FLOAT * (512 * 256 + 256 * 384 + 512 * 384)
    assert made.alone_bytes == 0


def test_what_has_no_product_is_alone():
    shapes = array(512, 256), array(64, 64), array(64, 64)
    both = of(lambda x, y, z: (jnp.tanh(x).T + 1, y @ z), *shapes)
    assert both.memory_bytes - both.alone_bytes == FLOAT * 3 * 64 * 64
    assert both.alone_bytes >= FLOAT * 2 * 512 * 256


def test_an_update_in_place_moves_what_it_writes():
    made = of(update, array(4096, 128), array(64, 128), PLACE, donate_argnums=0)
    assert made.memory_bytes == pytest.approx(2 * FLOAT * 64 * 128, rel=0.01)


def test_a_gather_reads_its_rows_and_a_sum_into_rows_reads_and_writes_them():
    rows, ids = FLOAT * 64 * 128, array(64, dtype=jnp.int32)
    taken = of(lambda x, i: x[i], array(4096, 128), ids)
    assert taken.memory_bytes == pytest.approx(2 * rows, rel=0.05)
    add = lambda x, i, u: x.at[i].add(u)
    added = of(add, array(4096, 128), ids, array(64, 128), donate_argnums=0)
    assert added.memory_bytes == pytest.approx(3 * rows, rel=0.05)


def chain(x, kernels, unroll=1):
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    return jax.lax.scan(layer, x, kernels, unroll=unroll)[0]


@pytest.mark.parametrize("gradient", [False, True])
def test_a_loop_moves_as_much_in_every_round(gradient):
    total = lambda x, kernels: chain(x, kernels).sum()
    function = jax.grad(total, argnums=(0, 1)) if gradient else total
    counts = [of(function, array(64, 128), array(n, 128, 128)).memory_bytes for n in (4, 8, 12)]
    assert counts[1] - counts[0] == pytest.approx(counts[2] - counts[1], rel=0.01)
    products = 3 if gradient else 1
    assert counts[1] - counts[0] > 4 * products * FLOAT * (128 * 128 + 2 * 64 * 128)


def test_scanned_layers_move_what_unrolled_ones_do_and_one_copy_of_what_is_carried():
    shapes = array(512, 128), array(8, 128, 128)
    kernels, carried = 8 * FLOAT * 128 * 128, FLOAT * 512 * 128
    unrolled = of(functools.partial(chain, unroll=8), *shapes).memory_bytes
    # The product and the tanh each read and write x; a kernel is cut out, then read.
    assert unrolled == pytest.approx(8 * 4 * carried + 3 * kernels, rel=0.01)
    assert of(chain, *shapes).memory_bytes == pytest.approx(unrolled + 2 * carried, rel=0.01)


def test_of_branches_the_one_that_moves_most_counts():
    few, many = (lambda x: jnp.sort(x).sum()), (lambda x: jnp.sort(jnp.tanh(x.T) + 1).sum())
    either = lambda first, x: jax.lax.cond(first, few, many, x)
    most = of(many, array(256, 128)).memory_bytes
    made = of(either, array(dtype=bool), array(256, 128)).memory_bytes
    assert made == pytest.approx(most, rel=0.05)


def test_a_loop_of_unknown_length_is_told_and_counted_once():
    once = lambda x: x @ x
    loop = of(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, once, x), array(256, 256))
    assert loop.unknown_loops == 1
    assert loop.memory_bytes >= of(once, array(256, 256)).memory_bytes


# Collectives on 8 devices. --------------------------------------------------------------------

SIZE = FLOAT * 64 * 32  # of the array that each device holds
# kind -> what a device does with its array, bytes of the whole, bytes that a device sends.
EXCHANGES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "x"), SIZE, 2 * 7 / 8 * SIZE),
    "all-gather": (lambda x: jax.lax.all_gather(x, "x"), 8 * SIZE, 7 * SIZE),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), SIZE, 7 / 8 * SIZE),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), SIZE, 7 / 8 * SIZE),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
        SIZE,
        SIZE,
    ),
}


def across(function, *shapes, **axes):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    cut = PartitionSpec(tuple(axes))
    return of(
        jax.shard_map(function, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False), *shapes
    )


@pytest.mark.parametrize("kind", EXCHANGES)
def test_a_collective_moves_what_its_ring_does(kind):
    exchange, whole, sent = EXCHANGES[kind]
    made = across(exchange, array(8 * 64, 32), x=8)
    assert made.collectives == {kind: sent} and made.network_bytes == sent
    assert made.payload == {kind: whole} and made.counts == {kind: 1}


@pytest.mark.parametrize("kind", ["all-reduce", "collective-permute"])
def test_a_collective_in_a_loop_counts_as_often_as_it_runs(kind):
    exchange, _, sent = EXCHANGES[kind]
    rounds = lambda x: jax.lax.fori_loop(0, 5, lambda i, x: jnp.sin(exchange(x)), x)
    made = across(rounds, array(8 * 64, 32), x=8)
    assert made.collectives == {kind: 5 * sent} and made.counts == {kind: 5}


def test_a_sum_over_one_axis_of_a_mesh_is_among_its_chips_alone():
    made = across(lambda x: jax.lax.psum(x, "y"), array(8 * 64, 32), x=2, y=4)
    assert made.collectives == {"all-reduce": 2 * 3 / 4 * SIZE}


def test_one_device_sends_nothing():
    assert of(feed, (array(8, 8), array(8, 8)), array(8, 8)).network_bytes == 0


def test_data_parallel_training_sums_four_bytes_a_parameter_and_a_few_figures():
    config = words.model_of("t5_1_1")
    model, optimizer, plan = transformer.Transformer(config), optax.sgd(0.1), steps.StepConfig()
    loss = steps.make_language_loss(model, steps.LossConfig(), np.ones(config.vocab_size, np.int32))
    axis = steps.Axis("devices", tuple(range(8)))
    step = functools.partial(steps.train_step, loss=loss, optimizer=optimizer, plan=plan, axis=axis)
    init = functools.partial(steps.init_state, model, optimizer, plan)
    placed = lambda x: jax.ShapeDtypeStruct((8, *x.shape), x.dtype)
    state = jax.tree.map(placed, jax.eval_shape(init, transformer.param_shapes(config)))
    examples = jax.tree.map(placed, jax.eval_shape(lambda: transformer.dummy_batch(8, 8, 1)))
    lowered = jax.pmap(step, "devices").lower(state, examples)
    made = hlo.traffic(lowered.compile(compiler_options=words.QUICK).as_text())
    parameters = FLOAT * transformer.parameter_count(config)
    assert set(made.collectives) == {"all-reduce"}
    assert parameters < made.payload["all-reduce"] <= parameters + FLOAT * 16
    assert made.network_bytes == pytest.approx(made.payload["all-reduce"] * 7 / 4, abs=8)


# What a TPU's text says in other words. -------------------------------------------------------

MAIN, FAST = "{1,0:T(8,128)}", "{1,0:T(8,128)S(1)}"


def text(*lines, more="", header="HloModule jit_f, num_partitions=8"):
    """A program whose entry has these instructions, the last of them its root."""
    lines = [f"  {line}" for line in lines]
    lines[-1] = "  ROOT" + lines[-1][1:]
    return "\n".join([header, "", more, "ENTRY %main (x: f32[8]) -> f32[8] {", *lines, "}", ""])


def test_what_is_in_a_tpus_fast_memory_is_not_moved():
    at = lambda place: f"f32[64,128]{place}"
    program = [
        f"%x = {at(MAIN)} parameter(0)",
        f"%copy-start.1 = ({at(FAST)}, {at(MAIN)}, u32[]{{:S(2)}}) copy-start(%x)",
        f"%copy-done.1 = {at(FAST)} copy-done(%copy-start.1)",
        f"%negate.1 = {at(FAST)} negate(%copy-done.1)",
        f"%negate.2 = {at(MAIN)} negate(%negate.1)",
    ]
    made = hlo.traffic(text(*program))
    assert made.memory_bytes == 2 * FLOAT * 64 * 128  # read by the copy, written by the last
    assert made.alone_bytes == FLOAT * 64 * 128  # a copy goes on beside other instructions


def test_a_slice_in_the_background_reads_the_slice():
    program = [
        f"%x = bf16[16,128]{MAIN} parameter(0)",
        f"%slice-start.1 = ((bf16[16,128]{MAIN}), bf16[4,128]{FAST}, s32[]{{:S(2)}}) "
        "slice-start(%x), slice={[0:4], [0:128]}",
        f"%slice-done.1 = bf16[4,128]{FAST} slice-done(%slice-start.1)",
    ]
    assert hlo.traffic(text(*program)).memory_bytes == 2 * 4 * 128


def test_an_update_that_stands_alone_moves_itself_twice():
    program = [
        f"%x = f32[64,128]{MAIN} parameter(0)",
        f"%y = f32[8,128]{MAIN} parameter(1)",
        "%place = s32[] parameter(2)",
        f"%new = f32[64,128]{MAIN} dynamic-update-slice(%x, %y, %place, %place)",
    ]
    assert hlo.traffic(text(*program)).memory_bytes == 2 * FLOAT * 8 * 128 + 2 * FLOAT


LOOP = """
%condition (c: (s32[], f32[64,128])) -> pred[] {
  %end = s32[]{:T(128)} constant(7), metadata={op_name="jit(f)/while/cond"}
  %c = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %below = pred[]{:T(512)} compare(%index, %end), direction=LT
}
%body (b: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %b = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %part = f32[64,128]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %sum = f32[64,128]{1,0:T(8,128)} all-reduce(%part), replica_groups=GROUPS, to_apply=%add
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
def test_a_loop_is_as_long_as_its_condition_says_and_a_group_as_large_as_written(groups, chips):
    shape = "(s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)})"
    program = [
        f"%x = {shape} parameter(0)",
        f"%while.1 = {shape} while(%x), condition=%condition, body=%body",
    ]
    made = hlo.traffic(text(*program, more=LOOP.replace("GROUPS", groups)))
    assert made.unknown_loops == 0 and made.counts == {"all-reduce": 7}
    sent = 7 * 2 * (chips - 1) / chips * FLOAT * 64 * 128
    assert made.collectives == {"all-reduce": sent}


ALL = "replica_groups={{0,1,2,3,4,5,6,7}}"
SCATTERED = f"""
%all-reduce-scatter.1 (i: bf16[128,512]) -> bf16[16,512] {{
  %i = bf16[128,512]{FAST} parameter(0)
  %sum = bf16[128,512]{MAIN} all-reduce(%i), {ALL}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %own = bf16[16,512]{FAST} dynamic-slice(%sum, %zero, %zero)
}}
"""


def test_a_sum_of_which_each_chip_keeps_its_part_is_a_reduce_scatter():
    program = [
        f"%x = bf16[128,512]{FAST} parameter(0)",
        f"%fusion.1 = bf16[16,512]{FAST} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1",
    ]
    made = hlo.traffic(text(*program, more=SCATTERED))
    assert made.collectives == {"reduce-scatter": 7 / 8 * 2 * 128 * 512}


PART, WHOLE = f"bf16[16,512]{MAIN}", f"bf16[128,512]{MAIN}"
HIDDEN = f'channel_id=1, {ALL}, frontend_attributes={{chain_id="0"}}'
CHAIN = f"""
%first (p: bf16[16,512]) -> (bf16[16,512], bf16[128,512]) {{
  %p = {PART} parameter(0)
  %all-gather.1 = {WHOLE} all-gather(%p), {HIDDEN}
  ROOT %a = ({PART}, {WHOLE}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}
%second (q: bf16[16,512]) -> bf16[128,512] {{
  %q = {PART} parameter(0)
  ROOT %all-gather.2 = {WHOLE} all-gather(%q), {HIDDEN}
}}
"""


def test_a_gather_that_several_fusions_carry_on_counts_once():
    program = [
        f"%x = {PART} parameter(0)",
        f"%fusion.1 = ({PART}, {WHOLE}) fusion(%x), kind=kCustom, calls=%first",
        f"%part = {PART} get-tuple-element(%fusion.1), index=0",
        f"%fusion.2 = {WHOLE} fusion(%part), kind=kCustom, calls=%second",
    ]
    made = hlo.traffic(text(*program, more=CHAIN))
    assert made.collectives == {"all-gather": 7 / 8 * 2 * 128 * 512}
    assert made.counts == {"all-gather": 1}
    small, large = 2 * 16 * 512, 2 * 128 * 512
    assert made.memory_bytes == 3 * small + large  # the first reads one and gives both


PASSED = f"""
%fused (p: bf16[128,512], q: bf16[16,512]) -> (bf16[128,512], f32[16,512]) {{
  %p = {WHOLE} parameter(0)
  %q = {PART} parameter(1)
  %wide = f32[16,512]{MAIN} convert(%q)
  ROOT %both = ({WHOLE}, f32[16,512]{MAIN}) tuple(%p, %wide)
}}
"""


def test_what_a_fusion_only_hands_on_is_not_moved():
    program = [
        f"%x = {WHOLE} parameter(0)",
        f"%y = {PART} parameter(1)",
        f"%fusion.1 = ({WHOLE}, f32[16,512]{MAIN}) fusion(%x, %y), kind=kLoop, calls=%fused",
    ]
    assert hlo.traffic(text(*program, more=PASSED)).memory_bytes == (2 + 4) * 16 * 512


# A TPU's own program. -------------------------------------------------------------------------

CHILD = """
import json, sys, jax, jax.numpy as jnp
from jax.experimental import topologies
(chip,) = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=[1, 1, 1]).devices
here = jax.sharding.SingleDeviceSharding(chip)
x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=here)
made = jax.jit(lambda x, y: jax.nn.softmax(jnp.tanh(x @ y).T + 1)).lower(x, x).compile()
json.dump([made.as_text(), made.cost_analysis()["bytes accessed"]], open(sys.argv[1], "w"))
"""


def test_memory_of_a_program_for_a_tpu_is_xlas_count_within_five_per_cent(tmp_path):
    try:
        library = compiler.library()
    except ValueError as error:
        pytest.skip(str(error))
    here = {"TPU_LIBRARY_PATH": str(library), "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    here |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    path = tmp_path / "made.json"
    subprocess.run(
        [sys.executable, "-c", CHILD, str(path)],
        env=os.environ | here,
        check=True,
        capture_output=True,
        timeout=300,
    )
    program, xla = json.loads(path.read_text())
    assert "T(8,128)" in program
    assert hlo.traffic(program).memory_bytes == pytest.approx(xla, rel=0.05)
