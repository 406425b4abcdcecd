"""Laws of init_from: rows of equal pieces are copied, other rows are random, the rest is whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lm import checkpoints, initialization, transformer
from tests import models

CONFIG = transformer.ModelConfig(
    vocab_size=8,
    d_model=4,
    d_ff=6,
    num_heads=2,
    num_kv_heads=2,
    head_dim=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


def drawn(config, seed):
    """Random parameters of this config, as {path: array}."""
    rng = np.random.default_rng(seed)
    shapes = checkpoints.flatten(transformer.param_shapes(config))
    return {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}


def test_rows_are_matched_by_name():
    rows = initialization.rows_by_name(["pad", "b", "new", "a"], ["pad", "a", "b"], 6)
    assert rows.tolist() == [0, 2, -1, 1, -1, -1]


def test_the_same_vocabulary_copies_everything():
    theirs, names = drawn(CONFIG, 0), [str(row) for row in range(8)]
    carried, _ = initialization.carry_over(
        drawn(CONFIG, 1), theirs, initialization.rows_by_name(names, names, 8)
    )
    assert carried.keys() == theirs.keys()
    for path, leaf in carried.items():
        np.testing.assert_array_equal(leaf, theirs[path])


@pytest.mark.parametrize("shared", ["embeddings", "none"])
def test_matched_rows_and_other_parameters_are_copied_and_new_rows_random(shared):
    small = dataclasses.replace(CONFIG, shared_params=shared)
    fresh = drawn(dataclasses.replace(small, vocab_size=11), 0)
    theirs, rows = drawn(small, 1), np.array([3, -1, 0, 1, 2, -1, 7, 6, 5, 4, -1])
    carried, account = initialization.carry_over(fresh, theirs, rows)
    vocabulary = {"embed.embedding", "head"}
    if shared == "none":
        vocabulary.add("encoder_embed.embedding")
    for path, leaf in carried.items():
        assert leaf.shape == fresh[path].shape
        if path not in vocabulary:
            np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
            continue
        ours, new, old = (x.T if path == "head" else x for x in (leaf, fresh[path], theirs[path]))
        for row, source in enumerate(rows):
            np.testing.assert_array_equal(ours[row], new[row] if source < 0 else old[source])
        assert f"{path}: 8 of 11 rows by piece, 3 new" in account
    assert account.startswith(f"{len(carried) - len(vocabulary)} parameters whole")


def test_the_random_parameters_are_not_modified():
    fresh, rows = drawn(CONFIG, 0), np.arange(8)
    kept = {path: leaf.copy() for path, leaf in fresh.items()}
    initialization.carry_over(fresh, drawn(CONFIG, 1), rows)
    for path, leaf in kept.items():
        np.testing.assert_array_equal(leaf, fresh[path])


def test_vocabulary_axes_covers_every_parameter_with_a_vocabulary_axis():
    larger = dataclasses.replace(CONFIG, vocab_size=9)
    for shared in ("embeddings", "none"):
        ours, theirs = (
            checkpoints.flatten(
                transformer.param_shapes(dataclasses.replace(config, shared_params=shared))
            )
            for config in (CONFIG, larger)
        )
        for path, leaf in ours.items():
            axis = initialization.VOCABULARY_AXES.get(path.split(".")[-1])
            changed = [i for i, n in enumerate(leaf.shape) if n != theirs[path].shape[i]]
            assert changed == ([] if axis is None else [axis]), path


@pytest.mark.parametrize("field", CONFIG.to_flat())
def test_init_from_rejects_another_model_but_not_another_dtype_or_vocabulary(field):
    other = {
        "num_kv_heads": 1,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "encoder.d_model": 4,
        "encoder.d_ff": 5,
        "encoder.num_heads": 4,
        "encoder.num_kv_heads": 1,
        "encoder.head_dim": 5,
        "architecture": "prefix_lm",
        "dtype": "bfloat16",
        "scan_layers": True,
    }
    words = models.CHOICES.get(field)
    now = CONFIG.to_flat()[field]
    value = other.get(field) or (
        next(word for word in words if word != now) if words else now * 2 or 0.5
    )
    if field == "architecture":
        theirs = dataclasses.replace(CONFIG, architecture=value, num_encoder_layers=0)
    elif field == "decoder_start_token_id":
        theirs = dataclasses.replace(CONFIG, decoder_start_token_id=2)
    else:
        theirs = CONFIG.replace({field: value})
    if field in ("vocab_size", *transformer.COMPUTE_KEYS):
        initialization.check_init_from(CONFIG, theirs, "runs/x")
    else:
        cure = r"use .*, or the folder as the config's preset"
        with pytest.raises(ValueError, match=rf"runs/x's .*{cure}"):
            initialization.check_init_from(CONFIG, theirs, "runs/x")
