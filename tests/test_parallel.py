"""Laws of the layouts: the same step on all of them, everything placed comes back."""

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
    """(last state, sums of each update) on one device, by jit alone."""
    state, found = made(optimizer)[2], []
    step = jax.jit(step_of(steps.StepConfig(ema_decay=AVERAGE), optimizer))
    for examples in BATCHES:
        state, sums = step(state, examples)
        found.append(jax.device_get(sums))
    return jax.device_get(state), found


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
        found = jax.device_get(strategy.fetch(sums))
        assert found.keys() == expected.keys()
        for key in found:
            np.testing.assert_allclose(found[key], expected[key], rtol=2e-5, err_msg=key)
    ours = jax.device_get(strategy.fetch(state))
    assert int(ours.step) == UPDATES
    close = functools.partial(np.testing.assert_allclose, atol=5e-4)
    jax.tree.map(close, ours, plain(optimizer)[0])
    assert strategy.find_disagreement(state) is None
    # The old state is used up, and the new one lies as it did.
    assert any(x.is_deleted() for x in jax.tree.leaves(first))
    placed = strategy.place_state(made(optimizer)[2])
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), state, placed)
    assert all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def evaluate():
    """(params, batch) -> sums, on one device by jit alone."""
    return jax.jit(functools.partial(steps.eval_step, loss=made()[0]))


def test_the_batch_is_ragged_enough_to_tell_a_mean_of_means_from_the_mean(evaluate):
    whole, means, total = evaluate(made()[2].params, BATCHES[0]), [], 0.0
    for start in range(0, ROWS - 4, 4):
        ours = (np.arange(ROWS) // 4 == start // 4)[:, None]
        part = evaluate(made()[2].params, jax.tree.map(lambda x, ours=ours: x * ours, BATCHES[0]))
        total += float(part["loss"])
        means.append(float(part["loss"] / part["weight"]))
    np.testing.assert_allclose(total, whole["loss"], rtol=2e-5)
    assert abs(np.mean(means) / float(whole["loss"] / whole["weight"]) - 1) > 100 * 2e-5


@pytest.mark.parametrize("name", ["pmap 4", "data 2, fsdp 2, tensor 2"])
def test_every_layout_sums_the_same_held_out_loss(name, evaluate):
    loss, _, state = made()
    strategy = make(name)
    step = strategy.compile(functools.partial(steps.eval_step, loss=loss))
    params, examples = strategy.place_state(state.params), strategy.place_batch(BATCHES[0])
    expected = evaluate(state.params, BATCHES[0])
    for _ in range(2):  # nothing is used up
        found = strategy.fetch(step(params, examples))
        for key, value in expected.items():
            np.testing.assert_allclose(float(found[key]), float(value), rtol=2e-5, err_msg=key)
    assert float(expected["weight"]) == np.sum(BATCHES[0].targets_segment_ids > 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_placed_comes_back_to_the_bit(name):
    strategy, state = make(name), made()[2]
    for tree in (state, state.params):
        found = strategy.fetch(strategy.place_state(tree))
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), tree)
    rows = strategy.fetch_rows(strategy.place_batch(BATCHES[0]))
    assert jax.tree.structure(rows) == jax.tree.structure(BATCHES[0])
    for array, expected in zip(*map(jax.tree.leaves, (rows, BATCHES[0])), strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_dealt_over_the_data_shards_and_to_no_one_twice(name):
    strategy = make(name)
    numbers = np.arange(ROWS * 3).reshape(ROWS, 3)
    placed = strategy.place_batch(numbers)
    held = {tuple(np.unique(shard.data)) for shard in placed.addressable_shards}
    assert len(held) == strategy.shards
    assert sorted(x for rows in held for x in rows) == list(range(ROWS * 3))
    if isinstance(strategy, parallel.Pmap):  # like cards, so that hosts and devices may change
        for device, rows in enumerate(np.asarray(placed)):
            np.testing.assert_array_equal(rows, numbers[device :: strategy.shards])


@pytest.mark.parametrize("name", ["pmap 4", "data 2, fsdp 2, tensor 2"])
def test_the_abstract_state_is_what_fetch_gives(name):
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
def test_a_state_is_used_up_exactly_when_it_is_donated(name, donate):
    strategy = make(name)
    step = strategy.compile(lambda state, axis=None: (state + 1, {}), donate=donate)
    state = jax.tree.map(jnp.copy, strategy.place_batch(np.zeros((ROWS, 4))))
    new, _ = step(state)
    assert state.is_deleted() == donate
    assert np.asarray(new).min() == 1


# Where parameters lie. -----------------------------------------------------------------------


def shard_shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {parallel.path_of(path): x.addressable_shards[0].data.shape for path, x in leaves}


def test_fsdp_and_tensor_cut_each_kind_of_parameter_along_its_own_axes():
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
    held = sum(np.prod(shape) for shape in shapes.values() if len(shape) > 2 or 24 in shape)
    assert held * 8 == whole


def test_the_optimizer_state_lies_like_its_parameter():
    placed = mesh(data=2, fsdp=2, tensor=2).place_state(made()[2])
    params, kept = shard_shapes(placed.params), shard_shapes(placed.opt_state)
    for path, shape in params.items():
        moments = [s for p, s in kept.items() if re.search(rf"/(mu|nu)/{path}$", p)]
        assert moments == [shape, shape], path
    # Adafactor's rows and columns lie like the axes that they keep.
    big, config = {"head": jnp.ones((128, 256))}, optimizers.OptimizerConfig(name="adafactor")
    optimizer, _ = optimizers.make_optimizer(config, 10, big, optimizers.RunLength(1.0, 1))
    state = steps.State(
        jnp.zeros([], jnp.int32), big, optimizer.init(big), jnp.zeros([], jnp.int32)
    )
    kept = shard_shapes(mesh(data=2, fsdp=2, tensor=2).place_state(state))
    assert kept["params/head"] == (64, 128)
    assert {(64,), (128,)} <= set(kept.values())  # of 128 rows over fsdp, 256 columns over tensor


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
    ruled = mesh(data=2, fsdp=2, tensor=2).shardings(shapes)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(ruled), strict=True
    ):
        used = [axis for axis in sharding.spec if axis]
        small = re.search("scale|bias", parallel.path_of(path))
        assert used == [] if small else sorted(used) == ["fsdp", "tensor"], parallel.path_of(path)
        assert len(sharding.spec) in (0, len(leaf.shape))


def test_no_rule_is_dead_and_none_is_hidden_by_one_before():
    everywhere = lora.LoraConfig(rank=2, target_pattern="kernel$")
    shapes = lora.shapes(everywhere, transformer.param_shapes(MODEL))
    wide = dataclasses.replace(MODEL, d_model=24)
    shapes["projections"] = features.shapes(distill.loss_terms({"hidden": {}}), MODEL, wide)
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
def test_a_size_that_does_not_divide_is_a_sentence(sizes, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        mesh(**sizes).shardings(transformer.param_shapes(MODEL.replace(change)))


@pytest.mark.parametrize("name", ["pmap 4", "data 2, fsdp 2, tensor 2"])
def test_a_state_is_made_where_it_lies_and_as_on_one_device(name):
    strategy, params = make(name), made()[2].params
    fresh = lambda _: {"head": jax.random.normal(jax.random.key(0), (16, 32))}
    random = strategy.init(fresh, None)
    expected = jax.jit(fresh)(None)["head"]
    np.testing.assert_array_equal(strategy.fetch(random)["head"], expected)
    doubled = strategy.init(lambda tree: jax.tree.map(lambda x: 2 * x, tree), params)
    placed = strategy.place_state(params)
    for ours, theirs in zip(jax.tree.leaves(doubled), jax.tree.leaves(placed), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
        np.testing.assert_array_equal(ours, 2 * theirs)


def flipped(placed, device: int):
    """The array with the lowest bit of its last element turned in the copy of one device."""
    parts = [np.array(shard.data) for shard in placed.addressable_shards]
    parts[device].view(np.uint32).reshape(-1)[-1] ^= 1
    devices = [shard.device for shard in placed.addressable_shards]
    parts = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
    return jax.make_array_from_single_device_arrays(placed.shape, placed.sharding, parts)


@pytest.mark.parametrize("device", [0, 3])
@pytest.mark.parametrize("name", ["pmap 4", "data 2, fsdp 2, tensor 2"])
def test_one_bit_turned_in_one_copy_is_found_and_named(name, device):
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


# What cannot be laid out. --------------------------------------------------------------------


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
            "deterministic_reduction=True orders .* use parallel.strategy='pmap', or",
        ),
    ],
)
def test_an_impossible_layout_is_a_sentence(count, options, sentence):
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


def test_a_run_is_read_in_its_own_layout_where_that_fits_and_by_pmap_elsewhere():
    read = lambda **sizes: parallel.reading_strategy(parallel.ParallelConfig("mesh", **sizes))
    assert read(fsdp=2, tensor=2).mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert isinstance(read(fsdp=3), parallel.Pmap)
    fixed = parallel.reading_strategy(parallel.ParallelConfig(deterministic_reduction=True, data=1))
    assert fixed.shards == len(jax.devices())


def test_fewer_devices_than_there_are_may_be_named():
    devices = jax.devices()[:8]
    for options in ({"data": 2}, {"strategy": "mesh", "data": 2}):
        strategy = parallel.make_strategy(parallel.ParallelConfig(**options), devices)
        assert strategy.devices == devices[:2] and strategy.shards == 2
    assert mesh(data=2, fsdp=2).mesh.shape == {"data": 2, "fsdp": 2, "tensor": 1}
    assert mesh(fsdp=2, tensor=2).place_batch(np.ones((8, 1))).sharding.spec == PartitionSpec(
        ("data", "fsdp")
    )


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2}], ids=str)
def test_what_is_sent_between_devices_does_not_grow_with_the_batch(sizes):
    strategy = mesh(**sizes)
    step = step_of(steps.StepConfig(), place=strategy.shard_activations)
    state = jax.eval_shape(lambda: made()[2])

    def sent(rows: int) -> int:
        given = strategy.global_shapes(
            state, jax.eval_shape(lambda: transformer.dummy_batch(64, 32, rows))
        )
        compiled = strategy.compile(step, donate=True).lower(*given).compile()
        return hlo.collective_traffic(compiled.as_text()).network_bytes

    assert sent(64) < 1.05 * sent(8)
