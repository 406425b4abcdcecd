"""Batches are a function of (seed, step), with each example once per epoch."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from lm import batch, objectives, pipeline, runs

BATCH = 8


def take(iterator, count: int) -> list[batch.Batch]:
    return [batch.Batch(*rows) for rows in itertools.islice(iterator, count)]


def assert_same(actual, expected) -> None:
    assert len(actual) == len(expected)
    for actual_batch, expected_batch in zip(actual, expected, strict=True):
        for array, reference in zip(actual_batch[:4], expected_batch[:4], strict=True):
            np.testing.assert_array_equal(array, reference)
            assert array.dtype == np.int32


@pytest.fixture(scope="module")
def examples_of(tiny_config, tiny_tokens, tmp_path_factory):
    """{objective or "pairs": (training examples, held-out examples)}."""
    changes = {name: {"objective.name": name} for name in objectives.OBJECTIVES}
    changes["pairs"] = {"data.task": "docstring_summary"}
    examples = {}
    for name, change in changes.items():
        run = runs.make_run(tiny_config(**change), tmp_path_factory.mktemp(name))
        examples[name] = runs.make_examples(run, tiny_tokens)
    return examples


@pytest.fixture(scope="module")
def train(examples_of) -> pipeline.Examples:
    return examples_of["span_corruption"][0]


def restored(examples: pipeline.Examples, inputs, targets) -> np.ndarray:
    """The stored text of a row, restored from its inputs and targets."""
    (split,) = examples.splits
    return objectives.uncorrupt(split.objective, inputs, targets, split.vocabulary)


def texts(examples: pipeline.Examples, batches) -> list[tuple[int, ...]]:
    rows = (row for rows in batches for row in zip(rows.inputs, rows.targets, strict=True))
    return [tuple(restored(examples, *row)) for row in rows]


def stored_texts(examples: pipeline.Examples) -> list[tuple[int, ...]]:
    (split,) = examples.splits
    return [tuple(split.text(index)) for index in range(len(split))]


def test_an_example_is_a_window_of_the_stream_and_only_the_tail_is_unused(train):
    (split,) = train.splits
    stream = split.stored.read(0, len(split.stored))
    np.testing.assert_array_equal(np.concatenate(stored_texts(train)), stream[: len(train) * 33])
    assert split.window == 33 and len(stream) - len(train) * 33 < 33


def test_a_stream_resumed_at_any_step_is_the_unbroken_one(train):
    whole = take(pipeline.train_batches(train, seed=3), 43)
    for start in range(41):  # two epochs and the seam between them
        assert_same(take(pipeline.train_batches(train, seed=3, start=start), 2), whole[start:][:2])


@pytest.mark.parametrize(("host", "hosts"), [(0, 3), (2, 2), (-1, 2), (0, 16)])
def test_hosts_without_an_equal_share_of_a_batch_are_an_error(train, host, hosts):
    with pytest.raises(ValueError, match=f"host {host} of {hosts} has no equal share"):
        pipeline.train_batches(train, seed=1, host=host, hosts=hosts)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_partition_each_global_batch(train, hosts):
    whole = take(pipeline.train_batches(train, seed=1), 25)
    shares = [
        take(pipeline.train_batches(train, seed=1, host=host, hosts=hosts), 25)
        for host in range(hosts)
    ]
    for step, expected in enumerate(whole):
        assert all(len(share[step].inputs) == BATCH // hosts for share in shares)
        merged = [np.concatenate([share[step][i] for share in shares]) for i in range(4)]
        order = np.argsort(np.arange(BATCH) % hosts, kind="stable")
        assert_same([batch.Batch(*merged)], [batch.Batch(*(x[order] for x in expected[:4]))])


def test_the_order_and_the_masks_depend_on_the_seed_and_the_step_alone(train):
    first = take(pipeline.train_batches(train, seed=5), 6)
    again = pipeline.train_batches(dataclasses.replace(train), seed=5)
    assert_same(take(again, 6), first)
    # Two interleaved readers share no state.
    first_reader, second_reader = (pipeline.train_batches(train, seed=seed) for seed in (5, 6))
    turns = [(next(first_reader), next(second_reader)) for _ in range(6)]
    assert_same([batch.Batch(*a) for a, _ in turns], first)
    assert set(texts(train, first)) != set(texts(train, [batch.Batch(*b) for _, b in turns]))


def test_an_epoch_holds_every_example_once_and_the_next_in_another_order(train):
    epochs, length = 3, len(train)
    batches = take(pipeline.train_batches(train, seed=0), -(-epochs * length // BATCH))
    seen = texts(train, batches)
    expected = stored_texts(train)
    orders = [seen[e * length : (e + 1) * length] for e in range(epochs)]
    for order in orders:
        assert sorted(order) == sorted(expected)
    assert expected != orders[0] != orders[1] != orders[2] != orders[0]


def test_an_example_has_new_masks_in_every_epoch(train):
    epochs, length = 3, len(train)
    batches = take(pipeline.train_batches(train, seed=0), -(-epochs * length // BATCH))
    inputs = np.concatenate([rows.inputs for rows in batches])
    seen = np.array(texts(train, batches))
    masks = {}
    for text, row in zip(map(bytes, seen[: epochs * length]), inputs, strict=False):
        masks.setdefault(text, set()).add(bytes(row))
    assert len(masks) == length
    again = sum(len(rows) < epochs for rows in masks.values())
    # Two spans among 30 tokens fall on more than 400 places: a repeat in three is rare.
    assert again < 0.05 * length


# drop loses the positions; tests/test_objectives.py covers the other objectives.
@pytest.mark.parametrize("name", ["span_corruption", "token_masking", "mass", "prefix_lm"])
def test_filling_the_blanks_of_a_batch_restores_the_stored_text(examples_of, name):
    for examples in examples_of[name]:
        batches = list(pipeline.heldout_batches(examples, seed=7))
        expected = stored_texts(examples)
        assert texts(examples, batches)[: len(expected)] == expected


@pytest.mark.parametrize("name", [*sorted(objectives.OBJECTIVES), "pairs"])
def test_a_row_is_its_tokens_in_segment_one_then_padding_in_segment_zero(examples_of, name):
    examples = examples_of[name][0]
    (split,) = examples.splits
    rows = examples.batch(np.arange(20), np.arange(100, 120), seed=3)
    for index in range(20):
        rng = np.random.Generator(np.random.Philox(key=np.array([3, 100 + index], np.uint64)))
        inputs, targets = (
            split.stored[index]
            if name == "pairs"
            else objectives.corrupt(split.objective, split.text(index), rng, split.vocabulary)
        )
        for ids, stored, segments, length in (
            (inputs, rows.inputs, rows.inputs_segment_ids, examples.columns[0]),
            (targets, rows.targets, rows.targets_segment_ids, examples.columns[1]),
        ):
            padding = [0] * (length - len(ids))
            np.testing.assert_array_equal(stored[index], [*ids, *padding])
            np.testing.assert_array_equal(segments[index], [1] * len(ids) + padding)


# Of 33 raw tokens 5 are hidden, in 2 or 3 pieces: 5 + 3 + eos; of 31, 5 behind masks: 5 + eos.
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("span_corruption", (32, 9)),
        ("token_masking", (32, 6)),
        ("language_model", (1, 32)),
        ("pairs", (32, 16)),
    ],
)
def test_a_batch_is_as_wide_as_its_longest_row_can_be(examples_of, name, columns):
    rows = take(pipeline.train_batches(examples_of[name][0], seed=0), 1)[0]
    assert (rows.inputs.shape, rows.targets.shape) == tuple((BATCH, length) for length in columns)
    assert examples_of[name][0].columns == columns


@pytest.mark.parametrize("name", ["token_masking", "mass", "language_model", "deshuffling"])
def test_no_column_of_running_text_is_wasted(examples_of, name):
    rows = take(pipeline.train_batches(examples_of[name][0], seed=0), 1)[0]
    assert rows.inputs_segment_ids.all() and rows.targets_segment_ids.all()


@pytest.mark.parametrize("limit", [0, 1, 8, 13, 10**6])
@pytest.mark.parametrize("name", ["span_corruption", "pairs"])
def test_each_held_out_example_counts_once_and_padding_never(examples_of, name, limit):
    heldout = examples_of[name][1]
    batches = list(pipeline.heldout_batches(heldout, seed=0, limit=limit))
    count = min(limit or len(heldout), len(heldout))
    assert len(batches) == pipeline.num_heldout_batches(heldout, limit) == -(-count // BATCH)
    assert all(x.shape[0] == BATCH for rows in batches for x in rows[:4])
    weights = np.concatenate([batch.loss_weights(rows) for rows in batches])
    assert weights[:count].any(axis=1).all() and not weights[count:].any()
    if name == "pairs":
        assert weights.sum() == heldout.splits[0].stored.lengths[:count, 1].sum()
    else:
        assert set(weights[:count].sum(axis=1)) <= {8, 9}  # a span cut in two is one more


def test_held_out_batches_are_the_same_at_every_call(examples_of):
    heldout = examples_of["span_corruption"][1]
    first, again = (list(pipeline.heldout_batches(heldout, seed=2)) for _ in range(2))
    assert_same(first, again)
    # and a limit takes the first of them
    limited = list(pipeline.heldout_batches(heldout, seed=2, limit=BATCH))
    assert_same(limited, first[:1])


@pytest.mark.parametrize("count", [0, 1, 8, 11, 40])
def test_each_input_to_decode_comes_once_in_a_batch_as_wide_as_its_bucket(count):
    rng = np.random.default_rng(count)
    inputs = [rng.integers(3, 400, rng.integers(1, 49)) for _ in range(count)]
    batches = list(pipeline.input_batches(inputs, BATCH, 48))
    assert len(batches) == -(-count // BATCH)
    for numbers, rows in batches:
        longest = max(len(inputs[number]) for number in numbers)
        assert rows.inputs.shape == rows.inputs_segment_ids.shape == (BATCH, rows.inputs.shape[1])
        assert rows.inputs.shape[1] == min(w for w in (16, 32, 48) if w >= longest)
        for number, row, segment in zip(numbers, *rows[:2], strict=False):
            np.testing.assert_array_equal(row[segment == 1], inputs[number])
            assert not row[segment == 0].any()
        assert not rows.inputs_segment_ids[len(numbers) :].any()
        assert not batch.loss_weights(rows).any()
    met = [number for numbers, _ in batches for number in numbers]
    assert sorted(met) == list(range(count))
    lengths = [len(inputs[number]) for number in met]
    assert lengths == sorted(lengths)[::-1], "rows of a batch are of like lengths"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 0}, "data.batch_size=0 is too small; use 1 or more"),
        ({"input_length": 7}, "data.input_length=7 is too small; use 8 or more"),
        ({"target_length": 1}, "data.target_length=1 is too small; use 2 or more"),
        (
            {"max_examples_per_task": -1},
            "data.max_examples_per_task=-1 is too small; use 0 or more",
        ),
        ({"num_workers": -1}, "data.num_workers=-1 is too small; use 0 or more"),
        ({"packing": "firstfit"}, "data.packing='firstfit' is unknown; .* 'first_fit'"),
        (
            {"task": "pydocs", "packing": "first_fit"},
            "packing='first_fit' has no effect on pydocs.* use none",
        ),
        (
            {"task": "pydocs", "max_examples_per_task": 5},
            "data.max_examples_per_task=5 has no effect with one task alone",
        ),
        (
            {"mixture": (("pydocs", 1.0), ("wikipedia", 2.0)), "mixing_temperature": 2.0},
            "data.mixing_temperature=2.0 has no effect with .*rates",
        ),
        ({"mixing_temperature": 0.0}, "data.mixing_temperature=0.0 is not a finite number above 0"),
        (
            {"mixing_temperature": float("nan")},
            "data.mixing_temperature=nan is not a finite number above 0",
        ),
        ({"task": "wikipedai"}, "data.task='wikipedai' is unknown; choose one of .*'wikipedia'"),
    ],
)
def test_invalid_data_sections_are_an_error(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        pipeline.DataConfig(**change)
