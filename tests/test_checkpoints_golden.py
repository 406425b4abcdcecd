"""Law of formats: a checkpoint of every format that was ever released is still read, to the bit.

python -m tests.test_checkpoints_golden writes that of the current format, if it is missing.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import batch, checkpoints, steps, transformer
from tests.states import abstract, bits

GOLDEN = pathlib.Path(__file__).parent / "golden"
FORMATS = ("checkpoint_1",)
FACTS = {"config": {"steps": 9}, "tokenizer": "0" * 64, "position": {"next_index": 8}}
CONFIG = transformer.ModelConfig(
    vocab_size=40,
    d_model=8,
    d_ff=12,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


def make_state() -> steps.State:
    """A state of random numbers: parameters, every kind of optimizer leaf, average."""
    rng = np.random.default_rng(11)
    normal = lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape).astype(np.float32))
    shapes = transformer.param_shapes(CONFIG)
    params, mu, average = (jax.tree.map(normal, shapes) for _ in range(3))
    opt_state = {"count": jnp.asarray(7, jnp.int32), "mu": mu, "nothing": jnp.zeros((1,))}
    return steps.State(jnp.asarray(8, jnp.int32), params, opt_state, jnp.asarray(1), average)


def logits(params) -> np.ndarray:
    """Of two fixed rows: float32 [2, 4, 40]."""
    inputs = np.asarray([[5, 6, 7, 8, 1, 0], [9, 10, 1, 11, 12, 1]], np.int32)
    segments = np.asarray([[1, 1, 1, 1, 1, 0], [1, 1, 1, 2, 2, 2]], np.int32)
    targets = np.asarray([[13, 14, 1, 0], [15, 1, 16, 1]], np.int32)
    target_segments = np.asarray([[1, 1, 1, 0], [1, 1, 2, 2]], np.int32)
    examples = batch.Batch(inputs, segments, targets, target_segments)
    return np.asarray(steps.apply_model(transformer.Transformer(CONFIG), params, examples, None))


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_of_every_released_format_is_restored(name):
    folder = GOLDEN / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 200_000
    with checkpoints.Checkpoints(folder, read_only=True) as saved:
        actual, facts = saved.restore(abstract(make_state()))
        average, _ = saved.restore_params(abstract(make_state().params), 8)
    assert facts == FACTS | {"step": 8, "skipped": 1, "figures": {"nats": 2.5}}
    assert (int(actual.step), int(actual.skipped)) == (8, 1)
    stored = np.load(folder / "numbers.npz")
    plain = lambda tree: {k: np.asarray(v) for k, v in checkpoints.flatten(tree).items()}
    trees = {"params": actual.params, "opt_state": actual.opt_state, "average": actual.average}
    leaves = {f"{item}:{k}": x for item, tree in trees.items() for k, x in plain(tree).items()}
    assert sorted([*leaves, "logits"]) == sorted(stored.files)
    for key, leaf in leaves.items():
        assert bits(leaf) == bits(stored[key]), key
    assert bits(average) == bits(actual.average)
    np.testing.assert_allclose(logits(actual.params), stored["logits"], rtol=1e-5, atol=1e-5)


def make(name: str) -> None:
    """Write a golden checkpoint, and beside it its numbers by numpy alone; never over another."""
    folder, state = GOLDEN / name, make_state()
    folder.mkdir()
    trees = {"params": state.params, "opt_state": state.opt_state, "average": state.average}
    numbers = {
        f"{item}:{path}": np.asarray(leaf)
        for item, tree in trees.items()
        for path, leaf in checkpoints.flatten(tree).items()
    }
    np.savez_compressed(folder / "numbers.npz", logits=logits(state.params), **numbers)
    with checkpoints.Checkpoints(folder) as saved:
        saved.save(state, FACTS, {"nats": 2.5})
    for mark in folder.rglob("commit_success.txt"):  # it would name this machine's folders
        mark.write_text("whole\n")


if __name__ == "__main__":
    make(FORMATS[-1])
