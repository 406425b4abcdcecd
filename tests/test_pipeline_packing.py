"""Packing: every pair is in one row, no row overflows, and segments equal their pairs."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from lm import batch, pipeline, runs, shards, show
from lm.pipeline import packing


def lengths_of(seed: int, count: int, capacity: tuple[int, int]) -> np.ndarray:
    """Random lengths: many short ones, long ones truncated."""
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(np.minimum(4 / np.array(capacity), 0.9), (count, 2))
    return np.minimum(lengths, capacity)


def plan(lengths: np.ndarray, capacity: tuple[int, int]) -> list[list[int]]:
    """The pairs of each row."""
    row_of = pipeline.first_fit(lengths, capacity)
    rows = [[] for _ in range(row_of.max(initial=-1) + 1)]
    for pair, row in enumerate(row_of.tolist()):
        rows[row].append(pair)
    return rows


@pytest.mark.parametrize("capacity", [(32, 16), (512, 128), (5, 3)])
@pytest.mark.parametrize("count", [0, 1, 7, 3000])
def test_every_pair_is_in_one_row_and_no_row_overflows(capacity, count):
    lengths = lengths_of(count, count, capacity)
    rows = plan(lengths, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(count))
    for row in rows:
        assert len(row) and (lengths[row].sum(axis=0) <= capacity).all()


def test_the_plan_is_a_function_of_the_lengths_alone():
    lengths = lengths_of(0, 500, (32, 16))
    first, again = (pipeline.first_fit(lengths, (32, 16)) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_each_pair_is_in_the_first_row_with_space():
    """Against a direct implementation with all rows open."""
    lengths, capacity = lengths_of(1, 100, (32, 16)), np.array((32, 16))
    rows: list[list[int]] = []
    for pair in np.random.default_rng(0).permutation(len(lengths)):
        for row in rows:
            if (lengths[[*row, pair]].sum(axis=0) <= capacity).all():
                row.append(pair)
                break
        else:
            rows.append([pair])
    assert plan(lengths, (32, 16)) == [sorted(row) for row in rows]


def test_the_limit_of_open_rows_hardly_matters(monkeypatch):
    lengths, capacity = lengths_of(2, 3000, (512, 128)), (512, 128)
    filled = {}
    for most in (1, 4, 128, 3000):
        monkeypatch.setattr(packing, "MAX_OPEN_ROWS", most)
        rows = plan(lengths, capacity)
        assert sorted(itertools.chain(*rows)) == list(range(3000))
        filled[most] = len(rows)
    assert filled[1] > filled[4] > filled[128] >= filled[3000]
    assert filled[128] < 1.02 * filled[3000]


def test_a_pair_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match=r"pair 1 of \(33, 1\) tokens is longer than a row of"):
        pipeline.first_fit(np.array([[1, 1], [33, 1]]), (32, 16))


def test_rows_are_as_full_as_grains():
    """As many rows as grain needs for the same pairs in the same order."""
    import grain

    capacity = (64, 32)
    lengths = lengths_of(3, 2000, capacity)
    order = np.random.default_rng(0).permutation(len(lengths))
    pairs = [{"inputs": np.ones(a), "targets": np.ones(b)} for a, b in lengths[order].tolist()]
    reference = grain.experimental.FirstFitPackIterDataset(
        grain.MapDataset.source(pairs).to_iter_dataset(),
        length_struct={"inputs": capacity[0], "targets": capacity[1]},
        num_packing_bins=packing.MAX_OPEN_ROWS,
    )
    assert len(plan(lengths, capacity)) <= 1.01 * sum(1 for _ in reference)


# In the pipeline. ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tiny_config, tiny_tokens, tmp_path_factory):
    """(training, held-out) examples of packed pairs; rows hold two and more."""
    changes = {"data.task": "docstring_summary", "data.packing": "first_fit"}
    changes |= {"data.input_length": 200, "data.target_length": 40}
    run = runs.make_run(tiny_config(**changes), tmp_path_factory.mktemp("packed"))
    return runs.make_examples(run, tiny_tokens)


def pairs_of(rows: batch.Batch) -> list[tuple[bytes, bytes]]:
    """Every segment of every row, as the bytes of its inputs and targets."""
    pairs = []
    for inputs, inputs_segments, targets, targets_segments in zip(*rows[:4], strict=True):
        assert set(inputs_segments) - {0} == set(targets_segments) - {0}
        for segment in range(1, inputs_segments.max() + 1):
            ids = inputs[inputs_segments == segment], targets[targets_segments == segment]
            pairs.append(tuple(x.tobytes() for x in ids))
    return pairs


def stored(examples: pipeline.Examples) -> list[tuple[bytes, bytes]]:
    pairs = examples.splits[0].stored
    return [tuple(x.tobytes() for x in pairs[i]) for i in range(len(pairs))]


def test_no_pair_is_lost_or_doubled_in_an_epoch(packed):
    train, _ = packed
    everything = train.batch(np.arange(len(train)), np.arange(len(train)), seed=0)
    expected = collections.Counter(stored(train))
    assert collections.Counter(pairs_of(everything)) == expected
    assert len(train) < 0.7 * len(train.splits[0].stored)
    order = pipeline.row_order(train, seed=0)
    for epoch in range(3):
        rows = [order[epoch * len(train) + i] for i in range(len(train))]
        assert sorted(rows) == list(range(len(train)))
        assert rows != sorted(rows)


def test_segments_are_consecutive_and_the_rest_is_padding(packed):
    for rows in itertools.islice(pipeline.train_batches(packed[0], 0), 4):
        for ids, segments in ((rows.inputs, rows.inputs_segment_ids), (rows.targets, rows[3])):
            for row, numbers in zip(ids, segments, strict=True):
                real = numbers[numbers > 0]
                np.testing.assert_array_equal(real, np.sort(real))
                assert (numbers[: len(real)] > 0).all()
                assert not row[len(real) :].any() and set(real) == set(range(1, max(real) + 1))
        assert rows.inputs_segment_ids.max() > 1


def test_held_out_pairs_are_not_packed(packed):
    _, heldout = packed
    batches = list(pipeline.heldout_batches(heldout, 0))
    assert max(rows.inputs_segment_ids.max() for rows in batches) == 1
    assert [pair for rows in batches for pair in pairs_of(rows)] == stored(heldout)


def test_a_packed_stream_resumes_at_any_step(packed):
    whole = list(itertools.islice(pipeline.train_batches(packed[0], 3), 12))
    for start in range(11):
        for array, expected in zip(
            next(pipeline.train_batches(packed[0], 3, start=start)), whole[start], strict=True
        ):
            np.testing.assert_array_equal(array, expected)


def test_targets_are_shifted_and_weighted_within_their_segment(packed):
    """The decoder's inputs and the loss of packed pairs are those of each pair alone."""
    rows = next(pipeline.train_batches(packed[0], 0))
    shifted = batch.shift_right(rows.targets, rows.targets_segment_ids, start=0)
    weights = batch.loss_weights(rows)
    for row in range(len(rows.targets)):
        for segment in range(1, rows.targets_segment_ids[row].max() + 1):
            is_segment = rows.targets_segment_ids[row] == segment
            alone = rows.targets[row][is_segment]
            np.testing.assert_array_equal(shifted[row][is_segment], [0, *alone[:-1]])
            assert weights[row][is_segment].all()
    assert weights.sum() == sum(len(targets) // 4 for _, targets in pairs_of(rows))


def test_show_prints_each_segment(tiny_config, tiny_tokens, tmp_path):
    changes = {"data.task": "docstring_summary", "data.packing": "first_fit"}
    changes |= {"data.input_length": 200, "data.target_length": 40}
    run = runs.make_run(tiny_config(**changes), tmp_path)
    lines = show.rows(run, "train", 3).splitlines()
    first = next(pipeline.train_batches(runs.make_examples(run, tiny_tokens)[0], 0))
    count = first.inputs_segment_ids[:3].max(axis=1).sum()
    assert sum("encoder sees" in line for line in lines) == count > 3
    assert any(line.startswith("--- segment 2: encoder sees") for line in lines)
    assert [line.count("summarize: ") for line in lines if "summarize" in line] == [1] * count


def test_lengths_are_those_of_the_stored_pairs(packed):
    pairs = packed[0].splits[0].stored
    assert isinstance(pairs, shards.Pairs)
    sizes = [[len(inputs), len(targets)] for inputs, targets in (pairs[i] for i in range(60))]
    assert pairs.lengths.tolist() == sizes
