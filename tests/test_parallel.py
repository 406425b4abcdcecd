"""Laws of the layouts: all of them take the same step, and placed arrays can be fetched."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm import distill, layers, optimizers, parallel, steps, transformer
from lm.distill import features
from lm.preflight import hlo
from lm.transformer import lora
from tests.layouts import (  # noqa: F401
    BATCHES,
    LAYOUTS,
    MESH,
    MODEL,
    ROWS,
    UPDATES,
    made,
    make,
    step_of,
)

TAKEN = [(name, "adamw") for name in LAYOUTS]
TAKEN += [("pmap 4", "adafactor"), ("data 2, fsdp 2, tensor 2", "adafactor")]
AVERAGE = 0.9


def mesh(**sizes) -> parallel.Mesh:
    config = parallel.ParallelConfig(strategy="mesh", **sizes)
    return parallel.make_strategy(config, jax.devices()[:8])


@functools.cache
def plain(optimizer: str):
    """(last state, sums of each update) on one device, with jit only."""
    state, actual = made(optimizer)[2], []
    step = jax.jit(step_of(steps.StepConfig(ema_decay=AVERAGE), optimizer))
    for examples in BATCHES:
        state, sums = step(state, examples)
        actual.append(jax.device_get(sums))
    return jax.device_get(state), actual


@pytest.mark.parametrize("name, optimizer", TAKEN, ids=str)
def test_every_layout_takes_the_step_of_one_device(name, optimizer):
    strategy = make(name)
    step_config = steps.StepConfig(
        0, LAYOUTS[name][1].get("num_microbatches", 1), ema_decay=AVERAGE
    )
    step = strategy.compile(
        step_of(step_config, optimizer, strategy.shard_activations), donate=True
    )
    state = first = strategy.place_state(made(optimizer)[2])
    for examples, expected in zip(BATCHES, plain(optimizer)[1], strict=True):
        state, sums = step(state, strategy.place_batch(examples))
        actual = jax.device_get(strategy.fetch(sums))
        assert actual.keys() == expected.keys()
        for key in actual:
            np.testing.assert_allclose(actual[key], expected[key], rtol=2e-5, err_msg=key)
    result = jax.device_get(strategy.fetch(state))
    assert int(result.step) == UPDATES
    close = functools.partial(np.testing.assert_allclose, atol=5e-4)
    jax.tree.map(close, result, plain(optimizer)[0])
    assert strategy.find_disagreement(state) is None
    # The old state is deleted, and the new one has the same layout.
    assert any(x.is_deleted() for x in jax.tree.leaves(first))
    placed = strategy.place_state(made(optimizer)[2])
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), state, placed)
    assert all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def evaluate():
    """(params, batch) -> sums, on one device with jit only."""
    return jax.jit(functools.partial(steps.eval_step, loss=made()[0]))


def test_the_mean_of_the_batch_differs_from_a_mean_of_means(evaluate):
    whole, means, total = evaluate(made()[2].params, BATCHES[0]), [], 0.0
    for start in range(0, ROWS - 4, 4):
        mask = (np.arange(ROWS) // 4 == start // 4)[:, None]
        rows = jax.tree.map(lambda x, mask=mask: x * mask, BATCHES[0])
        sums = evaluate(made()[2].params, rows)
        total += float(sums["loss"])
        means.append(float(sums["loss"] / sums["weight"]))
    np.testing.assert_allclose(total, whole["loss"], rtol=2e-5)
    assert abs(np.mean(means) / float(whole["loss"] / whole["weight"]) - 1) > 100 * 2e-5


@pytest.mark.parametrize("name", ["pmap 4", "data 2, fsdp 2, tensor 2"])
def test_every_layout_sums_the_same_held_out_loss(name, evaluate):
    loss, _, state = made()
    strategy = make(name)
    step = strategy.compile(functools.partial(steps.eval_step, loss=loss))
    params, examples = strategy.place_state(state.params), strategy.place_batch(BATCHES[0])
    expected = evaluate(state.params, BATCHES[0])
    for _ in range(2):  # nothing is donated
        actual = strategy.fetch(step(params, examples))
        for key, value in expected.items():
            np.testing.assert_allclose(float(actual[key]), float(value), rtol=2e-5, err_msg=key)
    assert float(expected["weight"]) == np.sum(BATCHES[0].targets_segment_ids > 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_placed_arrays_are_fetched_bit_for_bit(name):
    strategy, state = make(name), made()[2]
    for tree in (state, state.params):
        actual = strategy.fetch(strategy.place_state(tree))
        assert jax.tree.structure(actual) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), tree)
    rows = strategy.fetch_rows(strategy.place_batch(BATCHES[0]))
    assert jax.tree.structure(rows) == jax.tree.structure(BATCHES[0])
    for array, expected in zip(*map(jax.tree.leaves, (rows, BATCHES[0])), strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_data_shard_has_different_rows(name):
    strategy = make(name)
    numbers = np.arange(ROWS * 3).reshape(ROWS, 3)
    placed = strategy.place_batch(numbers)
    shard_rows = {tuple(np.unique(shard.data)) for shard in placed.addressable_shards}
    assert len(shard_rows) == strategy.shards
    assert sorted(x for rows in shard_rows for x in rows) == list(range(ROWS * 3))
    if isinstance(strategy, parallel.Pmap):  # in turns, so that the number of hosts may change
        for device, rows in enumerate(np.asarray(placed)):
            np.testing.assert_array_equal(rows, numbers[device :: strategy.shards])


@pytest.mark.parametrize("name", ["pmap 4", "data 2, fsdp 2, tensor 2"])
def test_the_abstract_state_has_the_shapes_of_the_fetched_state(name):
    strategy, state = make(name), made()[2]
    fetched = strategy.fetch(strategy.place_state(state))
    for shape, leaf in zip(
        jax.tree.leaves(strategy.abstract_state(jax.eval_shape(lambda: state))),
        jax.tree.leaves(fetched),
        strict=True,
    ):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        assert shape.sharding is None or shape.sharding == leaf.sharding


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ["pmap 4", "data 4, fsdp 2"])
def test_a_state_is_deleted_exactly_if_it_is_donated(name, donate):
    strategy = make(name)
    step = strategy.compile(lambda state, axis=None: (state + 1, {}), donate=donate)
    state = jax.tree.map(jnp.copy, strategy.place_batch(np.zeros((ROWS, 4))))
    new, _ = step(state)
    assert state.is_deleted() == donate
    assert np.asarray(new).min() == 1


# Sharding rules. -----------------------------------------------------------------------------


def shard_shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {parallel.path_of(path): x.addressable_shards[0].data.shape for path, x in leaves}


def test_fsdp_and_tensor_shard_each_kind_of_parameter():
    placed = mesh(data=1, fsdp=2, tensor=4).place_state(made()[2].params)
    shapes = shard_shapes(placed)
    # L D N H, L N H D, L D F, L F D, V D, D V with D = 16, N = H = 4, F = 32, V = 96
    assert shapes["encoder/layers/self_attention/query/kernel"] == (2, 8, 1, 4)
    assert shapes["decoder/layers/cross_attention/key/kernel"] == (2, 8, 1, 4)
    assert shapes["decoder/layers/self_attention/out/kernel"] == (2, 1, 4, 8)
    assert shapes["encoder/layers/feed_forward/gate/kernel"] == (2, 8, 8)
    assert shapes["encoder/layers/feed_forward/down/kernel"] == (2, 8, 8)
    assert shapes["embed/embedding"] == (24, 8)
    assert shapes["head"] == (8, 24)
    assert shapes["decoder/layers/cross_norm/scale"] == (2, 16)
    whole = sum(x.size for x in jax.tree.leaves(placed) if x.ndim > 2 or 96 in x.shape)
    shard_rows = sum(np.prod(shape) for shape in shapes.values() if len(shape) > 2 or 24 in shape)
    assert shard_rows * 8 == whole


def test_the_optimizer_state_is_sharded_like_its_parameter():
    placed = mesh(data=2, fsdp=2, tensor=2).place_state(made()[2])
    params, opt_shapes = shard_shapes(placed.params), shard_shapes(placed.opt_state)
    for path, shape in params.items():
        moments = [s for p, s in opt_shapes.items() if re.search(rf"/(mu|nu)/{path}$", p)]
        assert moments == [shape, shape], path
    # Adafactor's rows and columns are sharded like their axes of the parameter.
    big, config = {"head": jnp.ones((128, 256))}, optimizers.OptimizerConfig(name="adafactor")
    optimizer, _ = optimizers.make_optimizer(config, 10, big, optimizers.RunLength(1.0, 1))
    state = steps.State(
        jnp.zeros([], jnp.int32), big, optimizer.init(big), jnp.zeros([], jnp.int32)
    )
    opt_shapes = shard_shapes(mesh(data=2, fsdp=2, tensor=2).place_state(state))
    assert opt_shapes["params/head"] == (64, 128)
    assert {(64,), (128,)} <= set(
        opt_shapes.values()
    )  # of 128 rows over fsdp, 256 columns over tensor


VARIANTS = {
    "untied": {},
    "tied": {"lm_head": "tied"},
    "grouped": {"num_kv_heads": 2},
    **{name: {"activation": name} for name in layers.ACTIVATIONS},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_rules_cover_every_parameter_of_every_model(name):
    config = MODEL.replace(VARIANTS[name])
    shapes = transformer.param_shapes(config)
    layout = mesh(data=2, fsdp=2, tensor=2).shardings(shapes)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(layout), strict=True
    ):
        used = [axis for axis in sharding.spec if axis]
        small = re.search("scale|bias", parallel.path_of(path))
        assert used == [] if small else sorted(used) == ["fsdp", "tensor"], parallel.path_of(path)
        assert len(sharding.spec) in (0, len(leaf.shape))


def test_every_rule_is_the_first_match_of_a_parameter():
    everywhere = lora.LoraConfig(rank=2, target_pattern="kernel$")
    shapes = lora.shapes(everywhere, transformer.param_shapes(MODEL))
    wide = dataclasses.replace(MODEL, d_model=24)
    shapes["projections"] = features.projection_shapes(
        distill.loss_terms({"hidden": {}}), MODEL, wide
    )
    paths = [parallel.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    for pattern, spec in parallel.RULES:
        matched = [path for path in paths if re.search(pattern, path)]
        assert matched, pattern
        assert all(parallel.sharding.spec_for_path(path) == spec for path in matched)


def test_an_uncovered_parameter_is_an_error_that_names_it():
    params = made()[2].params | {"extra": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match="parameter extra/kernel is covered by no sharding rule"):
        mesh(fsdp=2).place_state(params)


@pytest.mark.parametrize(
    ("sizes", "change", "sentence"),
    [
        (
            {"tensor": 8},
            {},
            r"key/kernel \(2, 16, 4, 4\): axis of 4 does not divide over tensor=8; change ",
        ),
        ({"tensor": 2}, {"vocab_size": 97}, r"embed/embedding \(97, 16\): axis of 97 does not"),
        ({"fsdp": 8}, {"d_model": 20}, "axis of 20 does not divide over fsdp=8; change parallel.f"),
    ],
)
def test_an_indivisible_axis_is_an_error(sizes, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        mesh(**sizes).shardings(transformer.param_shapes(MODEL.replace(change)))


@pytest.mark.parametrize("name", ["pmap 4", "data 2, fsdp 2, tensor 2"])
def test_init_makes_a_sharded_state_equal_to_that_of_one_device(name):
    strategy, params = make(name), made()[2].params
    fresh = lambda _: {"head": jax.random.normal(jax.random.key(0), (16, 32))}
    random = strategy.init(fresh, None)
    expected = jax.jit(fresh)(None)["head"]
    np.testing.assert_array_equal(strategy.fetch(random)["head"], expected)
    doubled = strategy.init(lambda tree: jax.tree.map(lambda x: 2 * x, tree), params)
    placed = strategy.place_state(params)
    for result, original in zip(jax.tree.leaves(doubled), jax.tree.leaves(placed), strict=True):
        assert result.sharding.is_equivalent_to(original.sharding, result.ndim)
        np.testing.assert_array_equal(result, 2 * original)


def flipped(placed, device: int):
    """The array with the lowest bit of its last element flipped in the copy on one device."""
    parts = [np.array(shard.data) for shard in placed.addressable_shards]
    parts[device].view(np.uint32).reshape(-1)[-1] ^= 1
    devices = [shard.device for shard in placed.addressable_shards]
    parts = [jax.device_put(sums, device) for sums, device in zip(parts, devices, strict=True)]
    return jax.make_array_from_single_device_arrays(placed.shape, placed.sharding, parts)


@pytest.mark.parametrize("device", [0, 3])
@pytest.mark.parametrize("name", ["pmap 4", "data 2, fsdp 2, tensor 2"])
def test_a_flipped_bit_in_one_copy_is_named(name, device):
    strategy = make(name)
    state = strategy.place_state(made()[2])
    assert strategy.find_disagreement(state) is None
    for leaf in ("head", "embed/embedding"):
        params = dict(state.params)
        if leaf == "head":
            params["head"] = flipped(params["head"], device)
        else:
            params["embed"] = {"embedding": flipped(params["embed"]["embedding"], device)}
        assert strategy.find_disagreement(state._replace(params=params)) == f"params/{leaf}"


# Errors. -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "options", "sentence"),
    [
        (8, {"fsdp": 2}, "parallel.fsdp=2 .* pmap replicates; use parallel.strategy='mesh'"),
        (8, {"tensor": 2}, "parallel.tensor=2 shard parameters, .* use parallel.strategy='mesh'"),
        (
            4,
            {"data": 5},
            "parallel.data=5 is more than the 4 devices; use at most that, or -1",
        ),
        (
            8,
            {"strategy": "mesh", "data": 3, "fsdp": 3},
            "data x fsdp x tensor = 3 x 3 x 1 does not fit on 8 devices",
        ),
        (4, {"strategy": "mesh", "tensor": 8}, "= -1 x 1 x 8 does not fit on 4 devices"),
        (8, {"strategy": "mash"}, "parallel.strategy='mash' is unknown; choose one of mesh, pmap"),
        (
            8,
            {"reduction_shards": 6},
            "parallel.reduction_shards=6 is no power of 2",
        ),
        (8, {"reduction_shards": 0}, "parallel.reduction_shards=0 is too small; use 1"),
        (
            8,
            {"deterministic_reduction": True, "reduction_shards": 4},
            "parallel.reduction_shards=4 do not divide over 8 devices",
        ),
        (
            6,
            {"deterministic_reduction": True},
            "parallel.reduction_shards=8 do not divide over 6 devices; set parallel.data",
        ),
        (
            8,
            MESH | {"deterministic_reduction": True},
            "deterministic_reduction=True is unsupported .* use parallel.strategy='pmap'",
        ),
    ],
)
def test_an_impossible_layout_is_an_error(count, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        parallel.make_strategy(parallel.ParallelConfig(**options), jax.devices()[:count])


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_batch_passes_exactly_when_it_divides(shards, parts):
    for size in range(1, 50):
        if size % (shards * parts) == 0:
            parallel.check_batch_size(size, shards, parts)
        else:
            advice = f"data.batch_size={size} does not divide .* a multiple of {shards * parts}"
            with pytest.raises(ValueError, match=advice):
                parallel.check_batch_size(size, shards, parts)


def test_a_run_is_read_in_its_layout_if_it_fits_else_with_pmap():
    read = lambda **sizes: parallel.reading_strategy(parallel.ParallelConfig("mesh", **sizes))
    assert read(fsdp=2, tensor=2).mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert isinstance(read(fsdp=3), parallel.Pmap)
    fixed = parallel.reading_strategy(parallel.ParallelConfig(deterministic_reduction=True, data=1))
    assert fixed.shards == len(jax.devices())


def test_a_strategy_may_use_fewer_devices():
    devices = jax.devices()[:8]
    for options in ({"data": 2}, {"strategy": "mesh", "data": 2}):
        strategy = parallel.make_strategy(parallel.ParallelConfig(**options), devices)
        assert strategy.devices == devices[:2] and strategy.shards == 2
    assert mesh(data=2, fsdp=2).mesh.shape == {"data": 2, "fsdp": 2, "tensor": 1}
    assert mesh(fsdp=2, tensor=2).place_batch(np.ones((8, 1))).sharding.spec == PartitionSpec(
        ("data", "fsdp")
    )


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2}], ids=str)
def test_communication_does_not_grow_with_the_batch(sizes):
    strategy = mesh(**sizes)
    step = step_of(steps.StepConfig(), place=strategy.shard_activations)
    state = jax.eval_shape(lambda: made()[2])

    def sent(rows: int) -> int:
        placed_shapes = strategy.global_shapes(
            state, jax.eval_shape(lambda: transformer.dummy_batch(64, 32, rows))
        )
        compiled = strategy.compile(step, donate=True).lower(*placed_shapes).compile()
        return sum(hlo.collective_traffic(compiled.as_text()).sent.values())

    assert sent(64) < 1.05 * sent(8)
