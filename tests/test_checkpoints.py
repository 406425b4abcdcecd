"""Laws of checkpoints: what comes back has the bits that were saved, or something is said."""

from __future__ import annotations

import functools
import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm import checkpoints, optimizers, steps

# Orbax leaves readers unfinished where a file is damaged; Python says so when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

FACTS = {"config": {"steps": 3, "peak": 0.1}, "tokenizer": "é", "position": {"next_index": 2}}
OPTIMIZERS = ("adafactor", "adamw")


@functools.cache
def updater(name: str):
    optimizer, _ = optimizers.make_optimizer(optimizers.OptimizerConfig(name=name), 10)
    return jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params))


@functools.cache
def make_state(step: int, name: str = "adamw") -> steps.State:
    """A state after `step` updates with random gradients; its bits depend on the step."""
    rng = np.random.default_rng(step)
    shapes = {"head": (130, 140), "scale": (7,), "layers": (2, 129, 3)}
    normal = lambda: {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    params = jax.tree.map(jnp.asarray, normal())
    _, opt_state = updater(name)(normal(), params)
    return steps.State(
        jnp.asarray(step, jnp.int32), {"tower": params}, opt_state, jnp.asarray(0, jnp.int32)
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def bits(tree) -> list[tuple]:
    """Structure and bits: equal for equal trees, -0.0 and every NaN told apart."""
    leaves = [(x.dtype.name, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]
    return [jax.tree.structure(tree), *leaves]


def save(directory, *states, facts=FACTS) -> None:
    with checkpoints.Checkpoints(directory) as saved:
        for state in states:
            saved.save(state, facts)


def restore(directory, like=None, **options):
    with checkpoints.Checkpoints(directory, **options) as saved:
        return saved.restore(abstract(make_state(0)) if like is None else like)


def names(directory) -> list[str]:
    return sorted(path.name for path in pathlib.Path(directory).iterdir())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A directory with good checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("pair") / "checkpoints"
    save(directory, make_state(1), make_state(2))
    return directory


@pytest.fixture
def copied(pair, tmp_path):
    """A copy of them that a test may damage."""
    return pathlib.Path(shutil.copytree(pair, tmp_path / "checkpoints"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_saved_is_restored_to_the_bit(name, tmp_path):
    state = make_state(5, name)
    save(tmp_path, state)
    found, facts = restore(tmp_path, abstract(state))
    assert bits(found) == bits(state)
    assert facts == FACTS | {"step": 5}


def test_every_kind_of_leaf_and_every_odd_number_is_restored_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 300, np.uint32)  # NaNs with payloads and denormals among them
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


def test_the_newest_is_restored_and_only_the_newest_are_kept(tmp_path):
    with checkpoints.Checkpoints(tmp_path, keep=2) as saved:
        for step in (1, 2, 10, 9 + 2):
            saved.save(make_state(step), FACTS)
        saved.wait()
        assert saved.steps() == [11, 10]
    assert int(restore(tmp_path)[0].step) == 11


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path / "new") is None
    with (
        checkpoints.Checkpoints(tmp_path / "new", read_only=True) as saved,
        pytest.raises(ValueError, match="no checkpoint in .*new; train that run first"),
    ):
        saved.restore_params(make_state(0).params)


def test_parameters_alone_are_restored_without_the_optimizer(copied):
    shutil.rmtree(copied / "2" / "opt_state")
    with checkpoints.Checkpoints(copied, read_only=True) as saved:
        params, facts = saved.restore_params(abstract(make_state(0).params))
    assert bits(params) == bits(make_state(2).params)
    assert facts["step"] == 2


# Damage. -------------------------------------------------------------------------------------


def flip(path: pathlib.Path, rng) -> None:
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def truncate(path: pathlib.Path, rng) -> None:
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def empty(path: pathlib.Path, rng) -> None:
    path.write_bytes(b"")


def zero(path: pathlib.Path, rng) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def remove(path: pathlib.Path, rng) -> None:
    path.unlink()


def files(step: pathlib.Path) -> list[pathlib.Path]:
    """The files of a step, the greatest first."""
    found = [path for path in step.rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: (-path.stat().st_size, str(path)))


def check_fallback(directory: pathlib.Path) -> bool:
    """Restore after damage to step 2: True where it fell back, and then step 2 is saved anew."""
    found, facts = restore(directory)
    step = int(found.step)
    assert bits(found) == bits(make_state(step)), f"silently wrong at step {step}"
    assert facts == FACTS | {"step": step}
    if step == 2:
        assert names(directory) == ["1", "2"]
        return False
    aside, rest = names(directory)[1], names(directory)[:1]
    assert rest == ["1"] and aside.startswith("2.corrupt-")
    return True


@pytest.mark.parametrize("trial", range(16))
def test_a_flipped_bit_in_array_data_falls_back_to_the_step_before(trial, copied):
    rng = np.random.default_rng(trial)
    item = ("params", "opt_state")[trial % 2]
    data = files(copied / "2" / item)[0]
    assert data.parent.name == "d" and data.stat().st_size > 3000
    flip(data, rng)
    assert check_fallback(copied)


@pytest.mark.parametrize("damage", [flip, truncate, empty, zero, remove], ids=lambda f: f.__name__)
def test_no_damage_to_any_file_is_silently_wrong(damage, pair, tmp_path):
    count = len(files(pair / "2"))
    chosen = np.random.default_rng(count).permutation(count)[:5]
    found = []
    for index in [0, *chosen]:  # the array data, and five others
        directory = tmp_path / str(index) / "checkpoints"
        shutil.copytree(pair, directory, dirs_exist_ok=True)
        damage(files(directory / "2")[index], np.random.default_rng(index))
        # A step that lost its commit file is no longer a step: nothing is to be set aside.
        if names(directory) == ["1", "2"] and not (directory / "2/commit_success.txt").exists():
            assert int(restore(directory)[0].step) == 1
        else:
            found.append(check_fallback(directory))
    assert found[0], "damage to the array data was not seen"


@pytest.mark.parametrize("item", ["params", "opt_state", "facts"])
def test_a_missing_item_falls_back(item, copied):
    shutil.rmtree(copied / "2" / item)
    assert check_fallback(copied)


def test_after_a_fallback_the_bad_step_is_saved_again_and_again(copied):
    for _ in range(3):
        flip(files(copied / "2")[0], np.random.default_rng(0))
        assert int(restore(copied)[0].step) == 1
        save(copied, make_state(2))
        assert bits(restore(copied)[0]) == bits(make_state(2))
    assert sum(name.startswith("2.corrupt-") for name in names(copied)) == 3


def facts_file(step: pathlib.Path) -> pathlib.Path:
    (path,) = (p for p in (step / "facts").iterdir() if b"tokenizer" in p.read_bytes())
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["position"].update(next_index=3),
        lambda facts: facts["config"].update(peak=0.2),
        lambda facts: facts.update(extra=1),
        lambda facts: facts.pop("tokenizer"),
        lambda facts: facts.pop("seal"),
        lambda facts: facts["leaves"]["params"]["tower.scale"].update(sum=1),
    ],
)
def test_altered_facts_are_found(change, copied):
    path = facts_file(copied / "2")
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    assert check_fallback(copied)


def test_where_none_is_good_no_call_ever_starts_afresh(copied):
    for step in ("1", "2"):
        flip(files(copied / step)[0], np.random.default_rng(0))
    for _ in range(2):  # a second try must not find an empty directory
        with pytest.raises(ValueError, match=r"none of the checkpoints \[2, 1\] in .* can be read"):
            restore(copied)


def test_read_only_falls_back_with_a_warning_but_renames_nothing(copied, caplog):
    flip(files(copied / "2")[0], np.random.default_rng(0))
    before = {path: path.read_bytes() for path in files(copied)}
    with caplog.at_level(logging.WARNING, "lm.checkpoints"):
        found, _ = restore(copied, read_only=True)
    assert "checkpoint 2 in" in caplog.text and "is damaged: checksum of" in caplog.text
    assert bits(found) == bits(make_state(1))
    assert names(copied) == ["1", "2"]
    assert {path: path.read_bytes() for path in files(copied)} == before


def test_what_is_no_checkpoint_is_not_taken_for_one(copied):
    (copied / "9").mkdir()
    shutil.copytree(copied / "2", copied / "8")
    (copied / "8" / "commit_success.txt").unlink()  # killed before it was whole
    (copied / "notes.txt").write_text("7")
    with checkpoints.Checkpoints(copied, read_only=True) as saved:
        assert saved.steps() == [2, 1]
    found, _ = restore(copied)
    assert bits(found) == bits(make_state(2))
    assert not [name for name in names(copied) if "corrupt" in name]
    save(copied, make_state(8), make_state(9))
    assert bits(restore(copied)[0]) == bits(make_state(9))


def test_a_copy_under_another_number_is_not_that_step(copied):
    shutil.copytree(copied / "2", copied / "7")
    found, _ = restore(copied)
    assert bits(found) == bits(make_state(2))
    save(copied, make_state(7))
    assert bits(restore(copied)[0]) == bits(make_state(7))


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
            r"params tower.scale is float32 \[7\] .* but bfloat16 \[7\] here",
        ),
        ({"scale": jnp.zeros(7, jnp.int32)}, r"float32 \[7\] .* but int32 \[7\] here"),
        ({"scale": jnp.zeros(8)}, r"tower.scale is float32 \[7\] .* but float32 \[8\] here"),
        ({"scale": jnp.zeros((7, 1))}, r"float32 \[7\] .* but float32 \[7, 1\] here"),
        ({"scale": None}, r"tower.scale is float32 \[7\] in checkpoint 2 .* but absent here"),
        ({"bias": jnp.zeros(7)}, r"tower.bias is absent in checkpoint 2 .* but float32 \[7\] here"),
    ],
)
def test_another_model_is_refused_by_leaf_and_costs_no_checkpoint(leaves, sentence, copied):
    with pytest.raises(ValueError, match=sentence):
        restore(copied, changed(**leaves))
    assert names(copied) == ["1", "2"]
    assert bits(restore(copied)[0]) == bits(make_state(2))


def test_another_optimizer_is_refused(copied):
    with pytest.raises(ValueError, match="opt_state .* use the config and code that made it"):
        restore(copied, abstract(make_state(0, "adafactor")))
    assert names(copied) == ["1", "2"]


# Saving while training goes on. --------------------------------------------------------------


def test_what_happens_to_the_state_after_save_does_not_reach_the_disk(tmp_path):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    compute = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    with checkpoints.Checkpoints(tmp_path) as saved:
        for step in (1, 2, 3):
            state = compute(make_state(step))
            host = np.full(20_000, step, np.float32)
            state = state._replace(params=state.params | {"host": host})
            saved.save(state, FACTS)
            host[:] = -1
            spoil((state.params["tower"], state.opt_state))
    expected = make_state(3)
    params = expected.params | {"host": jnp.full(20_000, 3, jnp.float32)}
    expected = expected._replace(params=params)
    assert bits(restore(tmp_path, abstract(expected))[0]) == bits(expected)


def test_a_step_that_is_there_is_never_silently_not_saved(copied):
    with pytest.raises((ValueError, RuntimeError), match="2"):
        save(copied, make_state(2))


# The checksum. -------------------------------------------------------------------------------


def exact_sum(words: np.ndarray) -> int:
    """The checksum's formula in Python's integers."""
    total = 0
    for index, word in enumerate(map(int, words)):
        total += (word ^ (word >> 15)) * ((index * 2654435761 % 2**32) | 1)
    return total % 2**32


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "uint8", "bool"])
def test_the_checksum_is_its_formula_in_exact_arithmetic(dtype):
    rng = np.random.default_rng(1)
    word = {4: np.uint32, 2: np.uint16, 1: np.uint8}[jnp.dtype(dtype).itemsize]
    words = rng.integers(0, np.iinfo(word).max, (5, 61), word, endpoint=True)
    words = words % 2 if dtype == "bool" else words
    found = checkpoints.leaf_sum(jnp.asarray(words.view(jnp.dtype(dtype))))
    assert int(found) == exact_sum(words.ravel())


def test_any_one_flipped_bit_changes_the_checksum():
    rng = np.random.default_rng(2)
    words = rng.integers(0, 2**32, 1000, np.uint32)
    sums = jax.jit(jax.vmap(lambda x: checkpoints.leaf_sum(x)))
    places = rng.integers(0, 1000, 640)
    flipped = np.tile(words, (640, 1))
    flipped[np.arange(640), places] ^= np.uint32(1) << (np.arange(640) % 32).astype(np.uint32)
    whole = checkpoints.leaf_sum(jnp.asarray(words))
    assert not (np.asarray(sums(jnp.asarray(flipped))) == int(whole)).any()


@pytest.mark.parametrize("spec", [("a", "b"), ("b", None), (None, "a"), (("a", "b"), None), ()])
def test_the_checksum_is_the_same_for_any_sharding(spec):
    axes = {"axis_types": (AxisType.Auto,) * 2, "devices": jax.devices()[:8]}
    mesh = jax.make_mesh((4, 2), ("a", "b"), **axes)
    x = np.random.default_rng(4).normal(size=(16, 24)).astype(np.float32)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert int(checkpoints.checksums(sharded)) == exact_sum(x.view(np.uint32).ravel())


def test_a_sharded_state_is_restored_into_its_shardings(tmp_path):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    place = functools.partial(NamedSharding, mesh)
    x = np.random.default_rng(5).normal(size=(16, 24)).astype(np.float32)
    params = {"x": jax.device_put(x, place(PartitionSpec("a", "b")))}
    state = steps.State(
        jnp.asarray(1, jnp.int32), params, {"count": jnp.asarray(1)}, jnp.asarray(0, jnp.int32)
    )
    save(tmp_path, state)
    for spec in (PartitionSpec("b", "a"), PartitionSpec()):
        like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(spec))}
        found, _ = restore(tmp_path, state._replace(params=like))
        assert found.params["x"].sharding == place(spec)
        assert bits(found.params) == bits({"x": x})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
@pytest.mark.parametrize("shape", [(), (3, 0), (5,), (2, 3, 7), (1, 300)])
def test_a_sum_taken_in_parts_on_the_host_is_the_sum_on_the_device(dtype, shape):
    x = np.random.default_rng(0).normal(0, 9, shape).astype(jnp.dtype(dtype))
    assert checkpoints.host_sum(x, chunk=4) == int(checkpoints.leaf_sum(jnp.asarray(x)))


def test_a_device_takes_an_empty_array_over_without_copying_it():
    x = checkpoints.empty((3, 1000, 7))
    x[:] = 1
    taken = jax.device_put(x, jax.devices("cpu")[0])
    assert taken.unsafe_buffer_pointer() == x.ctypes.data
    np.testing.assert_array_equal(taken, np.ones((3, 1000, 7), np.float32))


def test_parameters_alone_are_read_and_not_continued(tmp_path):
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
