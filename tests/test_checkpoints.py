"""Laws of checkpoints: a restored state has the saved bits, or the restore is an error."""

from __future__ import annotations

import functools
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments import damage
from lm import checkpoints, steps
from lm.checkpoints import retention
from tests.states import FACTS, abstract, bits, facts_of, files, make_state, names, restore, save

# Orbax does not close readers of damaged files; Python warns when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A directory with good checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("pair") / "checkpoints"
    save(directory, make_state(1), make_state(2))
    return directory


@pytest.fixture
def copied(pair, tmp_path):
    """A copy of the two checkpoints that a test may damage."""
    return pathlib.Path(shutil.copytree(pair, tmp_path / "checkpoints"))


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_a_saved_state_is_restored_bit_for_bit(name, tmp_path):
    state = make_state(5, name)
    save(tmp_path, state)
    actual, facts = restore(tmp_path, abstract(state))
    assert bits(actual) == bits(state)
    assert facts == facts_of(5)


def test_every_kind_of_leaf_and_number_is_restored_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 300, np.uint32)  # includes NaNs with payloads and denormals
    leaves = {
        "float32": jnp.asarray(words.view(np.float32)),
        "bfloat16": jnp.asarray((words >> 16).astype(np.uint16)).view(jnp.bfloat16),
        "bool": jnp.asarray(words % 2 == 1),
        "int32": jnp.asarray(words.view(np.int32)),
        "uint8": jnp.asarray(words.astype(np.uint8)),
        "odd": jnp.asarray([-0.0, 0.0, np.inf, -np.inf, np.nan, 1e-45], jnp.float32),
        "scalar": jnp.asarray(7, jnp.int32),
    }
    state = steps.State(
        jnp.asarray(1, jnp.int32), leaves, {"same": leaves["bool"]}, jnp.asarray(0, jnp.int32)
    )
    save(tmp_path, state)
    assert bits(restore(tmp_path, abstract(state))[0]) == bits(state)


def test_an_empty_directory_restores_none(tmp_path):
    assert restore(tmp_path / "new") is None
    with (
        checkpoints.Checkpoints(tmp_path / "new", read_only=True) as saved,
        pytest.raises(ValueError, match="no checkpoint in .*new; train that run first"),
    ):
        saved.restore_params(make_state(0).params)


def test_restore_params_reads_no_optimizer_state(copied):
    shutil.rmtree(copied / "2" / "opt_state")
    with checkpoints.Checkpoints(copied, read_only=True) as saved:
        params, facts = saved.restore_params(abstract(make_state(0).params))
    assert bits(params) == bits(make_state(2).average)
    assert facts["step"] == 2


# Retention. ----------------------------------------------------------------------------------


def run_of(directory, figures: dict, **options) -> list[int]:
    """Save the steps of {step: held-out metrics or None}, each in a session; the steps on disk."""
    for step, had in figures.items():
        with checkpoints.Checkpoints(directory, **options) as saved:
            saved.save(make_state(step), FACTS, had)
    return saved.steps()


def test_the_newest_is_restored_and_the_oldest_are_deleted(tmp_path):
    assert run_of(tmp_path, dict.fromkeys([0, 1, 2, 10, 11]), max_to_keep=3) == [11, 10, 2]
    assert int(restore(tmp_path)[0].step) == 11
    assert run_of(tmp_path, {12: None}, max_to_keep=1) == [12, 11]  # the newest could be damaged


def test_multiples_of_keep_period_are_preserved(tmp_path):
    steps = dict.fromkeys(range(0, 9, 2))
    assert run_of(tmp_path, steps, max_to_keep=2, keep_period=4) == [8, 6, 4, 0]


NATS = {1: 3.0, 2: 1.5, 3: None, 4: math.nan, 5: 1.5, 6: 2.0, 7: 9.0}


@pytest.mark.parametrize(("figure", "best"), [("nats", 2), ("rougeL", 7)])
def test_the_best_is_preserved_over_restarts(figure, best, tmp_path):
    figures = {step: None if x is None else {figure: x, "other": 0} for step, x in NATS.items()}
    options = dict(max_to_keep=2, best_metric=figure)
    assert run_of(tmp_path, figures, **options) == sorted({7, 6, best}, reverse=True)
    assert run_of(tmp_path, {8: None, 9: {figure: 4.0}}, **options) == [9, 8, best]
    params = abstract(make_state(0).params)
    with checkpoints.Checkpoints(tmp_path, read_only=True, best_metric=figure) as saved:
        for which, step in (("best", best), ("newest", 9), (8, 8)):
            actual, facts = saved.restore_params(params, which)
            assert (bits(actual), facts["step"]) == (bits(make_state(step).average), step)
        with pytest.raises(ValueError, match=f"no checkpoint 5 in .* newest or one of {best}, 8"):
            saved.restore_params(params, 5)
    with (
        checkpoints.Checkpoints(tmp_path, read_only=True) as saved,
        pytest.raises(
            ValueError, match="has no checkpoint.best_metric, so no checkpoint is the best in"
        ),
    ):
        saved.restore_params(params, "best")


def test_rank_steps_orders_losses_and_scores_and_skips_non_finite():
    values = {1: math.nan, 2: 2.0, 3: -math.inf, 4: 1.0, 5: math.inf, 6: 1.0, 7: 3.0}
    figures = {step: {"nats": x, "accuracy": x} for step, x in values.items()} | {8: {}}
    assert retention.rank_steps("nats", figures) == [4, 6, 2, 7]
    assert retention.rank_steps("accuracy", figures) == [7, 2, 4, 6]


def test_an_unknown_best_metric_is_an_error_at_the_first_evaluation(tmp_path):
    with checkpoints.Checkpoints(tmp_path, best_metric="natz") as saved:
        saved.save(make_state(0), FACTS)
        with pytest.raises(
            ValueError, match="checkpoint.best_metric='natz' is no held-out .* of loss, nats, or"
        ):
            saved.save(make_state(1), FACTS, {"nats": 1.0, "loss": 2.0})
    assert names(tmp_path) == ["0"]


# Roll-back. ----------------------------------------------------------------------------------


def test_newer_steps_that_are_not_accepted_are_deleted(tmp_path):
    save(tmp_path, *map(make_state, (1, 2, 3, 4)), max_to_keep=4)
    damage.flip(files(tmp_path / "3")[0], np.random.default_rng(0))
    steps_seen = []

    def accept(facts: dict) -> bool:
        steps_seen.append(facts["step"])
        assert facts == facts_of(facts["step"])
        return facts["step"] < 4

    actual, facts = restore(tmp_path, accept=accept, max_to_keep=4)
    assert (bits(actual), facts) == (bits(make_state(2)), facts_of(2))
    assert steps_seen == [4, 3, 2]
    assert [name[:9] for name in names(tmp_path)] == ["1", "2", "3.corrupt"]
    save(tmp_path, make_state(3), make_state(4), max_to_keep=4)
    assert bits(restore(tmp_path)[0]) == bits(make_state(4))


def test_if_no_step_is_accepted_none_is_deleted(copied):
    with pytest.raises(
        checkpoints.Mismatch, match=r"no roll-back to any of the checkpoints \[2, 1\]"
    ):
        restore(copied, accept=lambda facts: False)
    assert names(copied) == ["1", "2"]
    assert bits(restore(copied)[0]) == bits(make_state(2))


# The average of weights. ---------------------------------------------------------------------


def test_a_missing_average_is_the_parameters_and_an_extra_one_is_ignored(tmp_path):
    without = make_state(1)._replace(average=None)
    save(tmp_path, without, make_state(2))
    actual, _ = restore(tmp_path, abstract(without))
    assert bits(actual) == bits(make_state(2)._replace(average=None))
    actual, _ = restore(tmp_path, accept=lambda facts: facts["step"] == 1)
    assert bits(actual.average) == bits(actual.params) == bits(without.params)
    leaf, average_leaf = actual.params["tower"]["head"], actual.average["tower"]["head"]
    assert (
        leaf.unsafe_buffer_pointer() != average_leaf.unsafe_buffer_pointer()
    )  # both may be donated
    with checkpoints.Checkpoints(tmp_path, read_only=True) as saved:
        assert bits(saved.restore_params(abstract(without.params))[0]) == bits(without.params)


# Another model. ------------------------------------------------------------------------------


def changed(**leaves) -> steps.State:
    state = make_state(0)
    params = {k: v for k, v in (state.params["tower"] | leaves).items() if v is not None}
    return abstract(state._replace(params={"tower": params}))


@pytest.mark.parametrize(
    ("leaves", "sentence"),
    [
        (
            {"scale": jnp.zeros(7, jnp.bfloat16)},
            r"params tower.scale is float32 \[7\] .* but bfloat16 \[7\] in this config",
        ),
        ({"scale": jnp.zeros(7, jnp.int32)}, r"float32 \[7\] .* but int32 \[7\] in this config"),
        (
            {"scale": jnp.zeros(8)},
            r"tower.scale is float32 \[7\] .* but float32 \[8\] in this config",
        ),
        ({"scale": jnp.zeros((7, 1))}, r"float32 \[7\] .* but float32 \[7, 1\] in this config"),
        (
            {"scale": None},
            r"tower.scale is float32 \[7\] in checkpoint 2 .* but absent in this config",
        ),
        ({"layers": None}, r"tower.layers is float32 \[2, 129, 3\] .* but absent in this config"),
        (
            {"scale": None, "gain": jnp.zeros(7)},
            r"tower.gain is absent in checkpoint 2 .* but float32 \[7\] in this config",
        ),
        (
            {"teacher": {"head": jnp.zeros(2)}},
            r"tower.teacher.head is absent .* float32 \[2\] in this config",
        ),
        (
            {"bias": jnp.zeros(7)},
            r"tower.bias is absent in checkpoint 2 .* but float32 \[7\] in this config",
        ),
    ],
)
def test_another_model_is_an_error_and_deletes_nothing(leaves, sentence, copied):
    with pytest.raises(ValueError, match=sentence):
        restore(copied, changed(**leaves))
    assert names(copied) == ["1", "2"]
    assert bits(restore(copied)[0]) == bits(make_state(2))


def test_a_leaf_of_another_dtype_is_an_error(copied):
    spoiled = jax.tree.map(lambda x: x.astype(jnp.float32), make_state(0).opt_state)
    with pytest.raises(
        ValueError, match=r"opt_state .*count is int32 \[\] .* but float32 \[\] in this config"
    ):
        restore(copied, abstract(make_state(0)._replace(opt_state=spoiled)))


def test_another_optimizer_is_an_error(copied):
    with pytest.raises(ValueError, match="opt_state .* use the config and code that wrote"):
        restore(copied, abstract(make_state(0, "adafactor")))
    assert names(copied) == ["1", "2"]


# Saving in the background. -------------------------------------------------------------------


def test_changes_of_the_state_after_save_are_not_written(tmp_path):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    compute = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    with checkpoints.Checkpoints(tmp_path) as saved:
        for step in (1, 2, 3):
            state = compute(make_state(step))
            host = np.full(2_000_000, step, np.float32)  # still being written when it changes
            state = state._replace(params=state.params | {"host": host})
            saved.save(state, FACTS)
            host[:] = -1
            spoil((state.params["tower"], state.opt_state))
    expected = make_state(3)
    params = expected.params | {"host": jnp.full(2_000_000, 3, jnp.float32)}
    expected = expected._replace(params=params)
    assert bits(restore(tmp_path, abstract(expected))[0]) == bits(expected)


def test_saving_an_existing_step_is_an_error(copied):
    with pytest.raises((ValueError, RuntimeError), match="2"):
        save(copied, make_state(2))


# The checksum. -------------------------------------------------------------------------------


def exact_sum(words: np.ndarray) -> int:
    """The formula of the checksum with Python integers."""
    total = 0
    for index, word in enumerate(map(int, words)):
        total += (word ^ (word >> 15)) * ((index * 2654435761 % 2**32) | 1)
    return total % 2**32


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "uint8", "bool"])
def test_the_checksum_equals_its_formula_in_exact_arithmetic(dtype):
    rng = np.random.default_rng(1)
    word = {4: np.uint32, 2: np.uint16, 1: np.uint8}[jnp.dtype(dtype).itemsize]
    words = rng.integers(0, np.iinfo(word).max, (5, 61), word, endpoint=True)
    words = words % 2 if dtype == "bool" else words
    actual = checkpoints.leaf_checksum(jnp.asarray(words.view(jnp.dtype(dtype))))
    assert int(actual) == exact_sum(words.ravel())


def test_any_flipped_bit_changes_the_checksum():
    rng = np.random.default_rng(2)
    words = rng.integers(0, 2**32, 1000, np.uint32)
    sums = jax.jit(jax.vmap(lambda x: checkpoints.leaf_checksum(x)))
    places = rng.integers(0, 1000, 640)
    flipped = np.tile(words, (640, 1))
    flipped[np.arange(640), places] ^= np.uint32(1) << (np.arange(640) % 32).astype(np.uint32)
    whole = checkpoints.leaf_checksum(jnp.asarray(words))
    assert not (np.asarray(sums(jnp.asarray(flipped))) == int(whole)).any()


@pytest.mark.parametrize("spec", [("a", "b"), ("b", None), (None, "a"), (("a", "b"), None), ()])
def test_the_checksum_is_the_same_for_any_sharding(spec):
    axes = {"axis_types": (AxisType.Auto,) * 2, "devices": jax.devices()[:8]}
    mesh = jax.make_mesh((4, 2), ("a", "b"), **axes)
    x = np.random.default_rng(4).normal(size=(16, 24)).astype(np.float32)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert int(checkpoints.tree_checksums(sharded)) == exact_sum(x.view(np.uint32).ravel())


def test_a_sharded_state_is_restored_into_its_shardings(tmp_path):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    shard = functools.partial(NamedSharding, mesh)
    x = np.random.default_rng(5).normal(size=(16, 24)).astype(np.float32)
    params = {"x": jax.device_put(x, shard(PartitionSpec("a", "b")))}
    state = steps.State(
        jnp.asarray(1, jnp.int32), params, {"count": jnp.asarray(1)}, jnp.asarray(0, jnp.int32)
    )
    save(tmp_path, state)
    for spec in (PartitionSpec("b", "a"), PartitionSpec()):
        like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shard(spec))}
        actual, _ = restore(tmp_path, state._replace(params=like))
        assert actual.params["x"].sharding == shard(spec)
        assert bits(actual.params) == bits({"x": x})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
@pytest.mark.parametrize("shape", [(), (3, 0), (5,), (2, 3, 7), (1, 300)])
def test_the_host_checksum_equals_the_device_checksum(dtype, shape):
    x = np.random.default_rng(0).normal(0, 9, shape).astype(jnp.dtype(dtype))
    assert checkpoints.host_checksum(x, chunk=4) == int(checkpoints.leaf_checksum(jnp.asarray(x)))


def test_device_put_of_aligned_empty_copies_nothing():
    x = checkpoints.aligned_empty((3, 1000, 7))
    x[:] = 1
    on_device = jax.device_put(x, jax.devices("cpu")[0])
    assert on_device.unsafe_buffer_pointer() == x.ctypes.data
    np.testing.assert_array_equal(on_device, np.ones((3, 1000, 7), np.float32))


def test_a_checkpoint_without_optimizer_state_is_read_but_not_restored(tmp_path):
    params = {"a": jnp.arange(6.0), "b": {"c": jnp.ones((2, 3))}}
    with checkpoints.Checkpoints(tmp_path, background=False) as saved:
        saved.save(steps.State(0, params, None, 0), {"x": 1})
        read, facts = saved.restore_params(params)
        jax.tree.map(np.testing.assert_array_equal, read, params)
        assert facts["x"] == 1 and facts["step"] == 0
        with pytest.raises(ValueError, match="opt_state .* is absent in checkpoint 0"):
            saved.restore(
                steps.State(
                    jnp.zeros([], jnp.int32), params, {"m": params["a"]}, jnp.asarray(0, jnp.int32)
                )
            )
