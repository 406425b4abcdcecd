"""Laws of the batch: segments shift separately, weights count targets, numpy and jax agree."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lm import batch


def packed_rows(rng, rows=6, length=14):
    """Random rows of 0 to 4 segments and padding: int32 targets and segment ids [B, T]."""
    targets = rng.integers(2, 99, (rows, length), dtype=np.int32)
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        ends = np.sort(rng.choice(np.arange(1, length + 1), rng.integers(0, 5), replace=False))
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=False), start=1):
            row[start:end] = number
    return np.where(segments > 0, targets, 0), segments


def batch_of(targets, segments):
    return batch.Batch(targets, segments, targets, segments)


@pytest.mark.parametrize("start", [0, 2])
def test_each_segment_is_shifted_separately(start):
    targets, segments = packed_rows(np.random.default_rng(0))
    shifted = batch.shift_right(targets, segments, start)
    for row in range(len(targets)):
        for number in range(1, segments[row].max() + 1):
            mine = segments[row] == number
            alone = [start, *targets[row][mine][:-1]]
            np.testing.assert_array_equal(shifted[row][mine], alone)


@pytest.mark.parametrize("start", [0, 2])
def test_padding_is_shifted_to_padding(start):
    targets, segments = packed_rows(np.random.default_rng(1))
    assert not batch.shift_right(targets, segments, start)[segments == 0].any()


def test_equal_tokens_in_adjacent_segments_do_not_mix():
    targets, segments = np.array([[5, 6, 5, 6, 7]]), np.array([[1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(batch.shift_right(targets, segments), [[0, 5, 0, 5, 6]])


def test_weights_are_one_on_targets_and_zero_on_padding():
    targets, segments = packed_rows(np.random.default_rng(2))
    weights = batch.loss_weights(batch_of(targets, segments))
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.minimum(segments, 1))
    unnamed = batch.loss_weights(batch_of(0 * targets, segments))  # the segment decides, no token
    np.testing.assert_array_equal(weights, unnamed)


@pytest.mark.parametrize("seed", range(3))
def test_numpy_and_jax_agree(seed):
    targets, segments = packed_rows(np.random.default_rng(seed))
    from_numpy = batch.shift_right(targets, segments, seed)
    from_jax = batch.shift_right(jnp.asarray(targets), jnp.asarray(segments), seed)
    np.testing.assert_array_equal(from_numpy, from_jax)
    assert isinstance(from_numpy, np.ndarray) and from_numpy.dtype == from_jax.dtype == np.int32
    weights = batch.loss_weights(batch_of(jnp.asarray(targets), jnp.asarray(segments)))
    np.testing.assert_array_equal(batch.loss_weights(batch_of(targets, segments)), weights)
