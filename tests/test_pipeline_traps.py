"""Traps of input pipelines: each test shows a common design failing, and ours passing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from lm import pipeline, runs, shards

STEPS = 30


@pytest.fixture(scope="module")
def train(tiny_config, tiny_tokens, tmp_path_factory) -> pipeline.Examples:
    """The training text of the tiny corpus."""
    run = runs.make_run(tiny_config(), tmp_path_factory.mktemp("train"))
    return runs.make_examples(run, tiny_tokens)[0]


def batches(examples, count: int, start: int = 0, **options) -> list[np.ndarray]:
    iterator = pipeline.train_batches(examples, 7, start=start, **options)
    return [rows.inputs for rows in itertools.islice(iterator, count)]


def same(actual, expected) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(actual, expected, strict=True))


def through_json(state):
    return json.loads(json.dumps(state))


def test_a_position_is_exact_through_json_at_every_step(train):
    """grain's ConcatThenSplit keeps a tuple in its state, and JSON gives a list back."""
    import grain

    lengths = np.random.default_rng(0).integers(1, 12, 200)
    documents = [{"x": np.arange(n) + 100 * i} for i, n in enumerate(lengths)]

    def naive():
        source = grain.MapDataset.source(documents).to_iter_dataset()
        packed = grain.experimental.ConcatThenSplitIterDataset(source, length_struct={"x": 10})
        return iter(packed)

    unbroken, wrong = list(naive()), 0
    whole, states = naive(), []
    for _ in unbroken:
        states.append(through_json(whole.get_state()))
        next(whole)
    for step, state in enumerate(states):
        resumed = naive()
        resumed.set_state(state)
        actual = list(itertools.islice(resumed, 5))
        expected = unbroken[step : step + 5]
        wrong += len(actual) != len(expected) or not same(
            [rows["x"] for rows in actual], [rows["x"] for rows in expected]
        )
    assert wrong > 0, "grain is fixed: consider ConcatThenSplit"

    expected = batches(train, STEPS + 2)
    for step in range(STEPS):
        position = through_json({"next_index": step})
        assert same(batches(train, 2, start=position["next_index"]), expected[step : step + 2])


def test_a_position_of_another_pipeline_is_refused(tiny_config, tiny_tokens, tmp_path):
    """grain's state is a number that any pipeline takes."""
    import grain

    def naive(seed: int, size: int):
        source = grain.MapDataset.source(range(size)).seed(seed).shuffle().batch(4)
        return iter(source.to_iter_dataset())

    small, large = naive(1, 100), naive(2, 200)
    first = [next(small) for _ in range(4)]
    large.set_state(small.get_state())  # without an error
    assert not same([next(large)], [first[0]])

    shutil.copytree(tiny_tokens.directory, tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    for change in ({"seed": 1}, {"data.batch_size": 16}, {"data.task": "pydocs"}):
        with pytest.raises(ValueError, match=f"another config: {next(iter(change))}"):
            runs.check_workdir(runs.make_run(tiny_config(**change), tmp_path))


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_mask_as_one_host_does(train, hosts):
    """With the random map after the host's slice, each number of hosts masks in its own way."""
    import grain

    def rows(dataset) -> set[float]:
        return {float(dataset[i]) for i in range(len(dataset))}

    mask = lambda index, rng: index + rng.random()
    source = grain.MapDataset.source(range(64)).seed(0).shuffle()
    shares = [rows(source[host::hosts].random_map(mask)) for host in range(hosts)]
    assert set.union(*shares) != rows(source.random_map(mask))

    expected = batches(train, 6)
    shares = [batches(train, 6, host=host, hosts=hosts) for host in range(hosts)]
    for step, whole in enumerate(expected):
        merged = np.empty_like(whole)
        for host in range(hosts):
            merged[host::hosts] = shares[host][step]
        np.testing.assert_array_equal(merged, whole)


def test_hosts_partition_each_epoch(train):
    """No row on two hosts, none twice in an epoch, none left out."""
    order, size = pipeline.row_order(train, 0), len(train)
    for epoch in range(3):
        shares = [
            {order[i] for i in range(epoch * size, (epoch + 1) * size) if i % 4 == host}
            for host in range(4)
        ]
        assert sum(len(rows) for rows in shares) == size
        assert set.union(*shares) == set(range(size))


def test_worker_processes_make_whole_batches(train):
    """Each process of grain's prefetch makes batches of every n-th record only."""
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # or grain's processes do not start
    naive = grain.MapDataset.source(range(32)).seed(0).shuffle().to_iter_dataset().batch(8)
    several = naive.mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    actual = [np.array(rows) for rows in itertools.islice(several, 2)]
    assert not same(actual, list(itertools.islice(naive, 2)))
    data = dataclasses.replace(train.data, num_workers=2)
    (split,) = train.splits
    examples = pipeline.Examples((dataclasses.replace(split, data=data),))
    assert same(batches(examples, 7), batches(train, 7))


def test_row_numbers_are_plain_integers(train, monkeypatch):
    """numpy's own integers keep their width: a window far into a corpus would wrap to its start."""
    far, raw = np.int32(10**7), 568
    with np.errstate(over="ignore"):
        assert far * raw != 10**7 * raw
    assert type(pipeline.row_order(train, 0)[5]) is int
    indices, read = [], pipeline.TaskSplit.text
    own_split = dataclasses.replace(
        train.splits[0]
    )  # threads of other tests may still read the shared one

    def spy(self, index):
        indices.extend([index] if self is own_split else [])
        return read(self, index)

    monkeypatch.setattr(pipeline.TaskSplit, "text", spy)
    pipeline.Examples((own_split,)).batch(np.arange(4, dtype=np.int32), np.arange(4), 0)
    assert indices == [0, 1, 2, 3] and {type(index) for index in indices} == {int}


@pytest.mark.parametrize("start", [0, 10, 10**6, 10**12])
def test_seeking_costs_the_same_reads_at_any_position(train, start, monkeypatch):
    """Reads are counted, not timed: an iterator that skips would read everything before."""
    reads, read = [], shards.Stream.read
    monkeypatch.setattr(
        shards.Stream, "read", lambda self, *span: reads.append(span) or read(self, *span)
    )
    iterator = pipeline.train_batches(train, 7, start=start)
    next(iterator)
    iterator.close() if hasattr(iterator, "close") else None
    ahead = 16 + 1 + 2  # batches of the prefetch buffer and its threads
    assert 0 < len(reads) <= ahead * train.data.batch_size


def test_a_seed_does_not_repeat_the_epochs_of_the_next_seed(train):
    """grain shuffles epoch e by seed + e: seed 0's second epoch would be seed 1's first."""
    import grain

    def naive(seed: int) -> list[int]:
        dataset = grain.MapDataset.source(range(50)).shuffle(seed=seed).repeat()
        return [dataset[i] for i in range(100)]

    assert naive(0)[50:] == naive(1)[:50]
    size = len(train)
    first, second = (pipeline.row_order(train, seed) for seed in (0, 1))
    assert [first[size + i] for i in range(size)] != [second[i] for i in range(size)]
