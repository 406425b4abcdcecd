"""Mixtures: exact rates, each task once per epoch of its own, any number of hosts."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest

from lm import batch, evaluate, objectives, parallel, pipeline, runs, shards, show, tasks
from lm.evaluate import heldout
from lm.inference import generate, loading

BOTH = (("wikipedia", None), ("docstring_summary", None))


def examples_of(config: dict, tokens, workdir) -> tuple[pipeline.Examples, pipeline.Examples]:
    return runs.make_examples(runs.make_run(config, workdir), tokens)


@pytest.fixture(scope="module")
def mixed(tiny_config, tiny_tokens, tmp_path_factory):
    """(training, held-out) examples of text and pairs mixed three to one."""
    config = tiny_config(**{"data.mixture": (("wikipedia", 3.0), ("docstring_summary", 1.0))})
    return examples_of(config, tiny_tokens, tmp_path_factory.mktemp("mixed"))


def take(examples: pipeline.Examples, count: int, **options) -> list:
    return list(itertools.islice(pipeline.train_batches(examples, 4, **options), count))


# Rates. ----------------------------------------------------------------------------------------

SIZES = [100, 700, 40_000, 3]


def test_rates_are_proportional_at_temperature_one():
    assert pipeline.mixing_rates([100, 700, 150], [None] * 3) == [100, 700, 150]
    assert pipeline.mixing_rates([3, 9], [None] * 2) == [100, 300]


def test_rates_are_equal_at_an_infinite_temperature():
    assert pipeline.mixing_rates(SIZES, [None] * 4, temperature=1e9) == [100] * 4


def test_a_limit_below_all_sizes_makes_them_equal_and_one_above_changes_nothing():
    assert pipeline.mixing_rates(SIZES, [None] * 4, limit=3) == [100] * 4
    without = pipeline.mixing_rates(SIZES, [None] * 4)
    assert pipeline.mixing_rates(SIZES, [None] * 4, limit=40_000) == without
    assert pipeline.mixing_rates(SIZES, [None] * 4, limit=700) == pipeline.mixing_rates(
        [100, 700, 700, 3], [None] * 4
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
def test_rates_are_those_of_the_paper(temperature):
    limit = 2**10
    raised = np.minimum(SIZES, limit) ** (1 / temperature)
    expected = raised / raised.sum()
    actual = np.array(
        pipeline.mixing_rates(SIZES, [None] * 4, limit=limit, temperature=temperature)
    )
    np.testing.assert_allclose(actual / actual.sum(), expected, rtol=0.01)


def test_a_higher_temperature_never_widens_the_rates():
    spread = [
        max(pipeline.mixing_rates(SIZES, [None] * 4, temperature=t))
        for t in (0.9, 1.0, 2.0, 4.0, 1e6)
    ]
    assert spread == sorted(spread, reverse=True)


@pytest.mark.parametrize(
    ("sizes", "fixed", "temperature"),
    [((1, 1), (1e-308, 1e308), 1.0), ((10, 1000), (None, None), 0.01), ((1, 10**7), (None,), 1.0)],
)
def test_rates_too_far_apart_are_an_error(sizes, fixed, temperature):
    with pytest.raises(ValueError, match="more than 1,000,000 times as often .* use closer rates"):
        pipeline.mixing_rates(sizes, fixed, temperature=temperature)


def test_fixed_rates_do_not_depend_on_sizes():
    assert pipeline.mixing_rates([5, 10**6], [3.0, 1.5]) == [200, 100]


# The config. ----------------------------------------------------------------------------------


def test_the_pairs_of_a_mixture_are_its_tasks_in_order():
    assert tasks.check_mixture(()) == ()
    mixture = tasks.check_mixture([["wikipedia", 3], ["runs/c", 0.5]])
    assert mixture == (("wikipedia", 3.0), ("runs/c", 0.5))
    data = pipeline.DataConfig(mixture=(("wikipedia", None), ("pydocs", None)))
    assert data.task_rates == {"wikipedia": None, "pydocs": None}
    assert pipeline.DataConfig(task="pydocs").task_rates == {"pydocs": None}


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ([("wikipedia", None), ("wikipedai", None)], "='wikipedai' is unknown; .* 'wikipedia'"),
        ([("wikipedia", None), ("", None)], "data.task='' is unknown"),
        ([("pydocs", None), ("pydocs", None)], "names pydocs twice; give it one higher rate"),
        ([("wikipedia", 3), ("pydocs", None)], "gives some tasks a rate; give all of them one, or"),
        ([("wikipedia", 3)], "gives a rate to a single task; use data.task='wikipedia'"),
        ([("wikipedia", 0), ("pydocs", 1)], "gives wikipedia the rate 0; use a number above 0"),
        ([("wikipedia", math.nan), ("pydocs", 1)], "the rate nan; use a number above 0"),
        ([("wikipedia", "much"), ("pydocs", 1)], "the rate 'much'; use a number above 0"),
        ([("a/b", 1), ("./a/b/", 2)], "names ./a/b/ twice"),
        (
            ["pydocs", "wikipedia"],
            "data.mixture has 'pydocs', which is not a pair of a task and its",
        ),
        (
            [("tests", None)],
            "data.task='tests' is not a task; if you mean the directory, use ./tests",
        ),
    ],
)
def test_invalid_mixtures_are_an_error(pairs, sentence):
    with pytest.raises(ValueError, match=sentence):
        tasks.check_mixture(pairs)


# Batches. --------------------------------------------------------------------------------------


def tasks_of(examples: pipeline.Examples, numbers) -> list[str]:
    return [examples.locate(int(number))[0].name for number in numbers]


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"data.mixture": (("wikipedia", 3.0), ("docstring_summary", 1.0))}, [300, 100]),
        ({"data.mixture": BOTH, "data.max_examples_per_task": 20}, [100, 100]),
        ({"data.mixture": BOTH, "data.mixing_temperature": 1e6}, [100, 100]),
        ({"data.mixture": BOTH}, None),
    ],
)
def test_any_run_of_rows_has_each_task_at_its_rate(
    changes, rates, tiny_config, tiny_tokens, tmp_path
):
    train, _ = examples_of(tiny_config(**changes), tiny_tokens, tmp_path)
    sizes = [len(split) for split in train.splits]
    rates = rates or pipeline.mixing_rates(sizes, [None, None])
    assert train.rates == rates
    order, whole = pipeline.row_order(train, seed=1), sum(rates)
    for start in (0, 17, 10**6):
        names = tasks_of(train, [order[i] for i in range(start, start + whole)])
        actual = collections.Counter(names)
        assert [actual[split.name] for split in train.splits] == rates


def test_each_task_comes_once_an_epoch_of_its_own(mixed):
    train, _ = mixed
    order, seen = pipeline.row_order(train, seed=0), collections.defaultdict(list)
    for index in range(2000):
        split, number = train.locate(order[index])
        seen[split.name].append(number)
    for split in train.splits:
        numbers, size = seen[split.name], len(split)
        epochs = [numbers[i : i + size] for i in range(0, len(numbers) - size, size)]
        assert len(epochs) > 2
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1] != list(range(size))


def test_tasks_of_one_size_are_not_shuffled_alike(mixed):
    (text, _), _ = mixed[0].splits, mixed[1]
    twice = dataclasses.replace(mixed[0], splits=(text, dataclasses.replace(text)))
    order, size = pipeline.row_order(twice, seed=0), len(text)
    orders = [[], []]
    for index in range(2 * size):
        number = int(order[index])
        orders[number // size].append(number % size)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_mixture_resumes_anywhere_and_hosts_partition_it(mixed, hosts):
    train, _ = mixed
    whole = take(train, 6)
    shares = [take(train, 3, start=3, host=host, hosts=hosts) for host in range(hosts)]
    for step, expected in enumerate(whole[3:]):
        for column, array in enumerate(expected[:4]):
            merged = np.empty_like(array)
            for host in range(hosts):
                merged[host::hosts] = shares[host][step][column]
            np.testing.assert_array_equal(merged, array)


def test_columns_are_those_of_the_longest_task(mixed):
    train, heldout = mixed
    assert train.columns == heldout.columns == (32, 16)  # 16 of pairs, 9 of running text
    assert all(
        array.shape == (8, width)
        for rows in take(train, 2)
        for array, width in zip(rows[:4], (32, 32, 16, 16), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "task", "columns"),
    [
        ("language_model", "wikipedia", (1, 32)),
        ("language_model", BOTH, (32, 32)),
        ("span_corruption", "docstring_summary", (32, 16)),
    ],
)
def test_a_column_is_as_long_as_any_task_needs_and_no_longer(name, task, columns, tiny_config):
    key = "data.task" if isinstance(task, str) else "data.mixture"
    data = pipeline.DataConfig(**tiny_config(**{key: task})["data"])
    assert data.lengths(objectives.ObjectiveConfig(name=name)) == columns


def test_every_held_out_example_of_every_task_comes_once(mixed):
    heldout = pipeline.Examples(mixed[1].splits[::-1])  # with masks in the second
    for limit in (0, 5):
        batches = list(pipeline.heldout_batches(heldout, 0, limit))
        sizes = [min(limit, len(split)) if limit else len(split) for split in heldout.splits]
        assert len(batches) == pipeline.num_heldout_batches(heldout, limit)
        rows = np.concatenate([rows.targets_segment_ids.any(axis=1) for rows in batches])
        assert rows.sum() == sum(sizes)
        # A task alone has the same batches.
        alone = [pipeline.Examples((split,)) for split in heldout.splits]
        again = [rows for task in alone for rows in pipeline.heldout_batches(task, 0, limit)]
        for actual, expected in zip(batches, again, strict=True):
            np.testing.assert_array_equal(actual.inputs, expected.inputs)


def test_frequencies_weight_each_task_by_its_rate(mixed):
    train, _ = mixed
    text, pairs = (np.load(f"{split.directory}/{shards.COUNTS}") for split in train.splits)
    expected = 0.75 * text / text.sum() + 0.25 * pairs / pairs.sum()
    np.testing.assert_allclose(train.frequencies / train.frequencies.sum(), expected)
    alone = pipeline.Examples(train.splits[:1])
    np.testing.assert_allclose(alone.frequencies, text)


def test_show_names_the_task_of_each_row(tiny_config, tiny_tokens, tmp_path):
    run = runs.make_run(tiny_config(**{"data.mixture": BOTH}), tmp_path)
    output = show.rows(run, "train", 8)
    train, _ = runs.make_examples(run, tiny_tokens)
    names = tasks_of(train, [pipeline.row_order(train, 0)[i] for i in range(8)])
    actual = [line.split()[1] for line in output.splitlines() if "encoder sees" in line]
    assert actual == [f"{name}:" for name in names] and len(set(names)) == 2
    output = show.rows(run, "heldout", 2)
    actual = [line.split()[1] for line in output.splitlines() if "encoder sees" in line]
    assert actual == ["wikipedia:"] * 2 + ["docstring_summary:"] * 2


def test_texts_for_a_tokenizer_are_of_every_task(tiny_config, tmp_path):
    run = runs.make_run(tiny_config(**{"data.mixture": BOTH}), tmp_path)
    texts = runs.Texts(run, runs.splits(run)[0], 10)
    actual = list(texts)
    assert len(texts) == 10 and len(actual) == 5 + 2 * 5  # of pairs, both halves
    assert sum(text.startswith("summarize: ") for text in actual) == 5


# Finished corpora. -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_tfds, tiny_tokens, tmp_path_factory):
    """The directory of a finished corpus: the tiny wikipedia's text, with the tiny tokenizer."""
    out = tmp_path_factory.mktemp("finished") / "corpus"
    for split in ("train", "validation"):
        task = tasks.TASKS["wikipedia"]
        shards.prepare(task, split, str(tiny_tfds), tiny_tokens, None, out / split)
    shutil.copytree(tiny_tokens.directory, out / "tokenizer")
    (out / shards.MANIFEST).write_text(json.dumps({"identity": {}}))
    return out


def test_a_corpus_is_trained_on_by_its_directory_with_its_own_tokenizer(
    finished, tiny_config, tiny_tokens, tmp_path
):
    named = tiny_config(**{"data.task": str(finished), "tokenizer.dir": ""})
    run = runs.make_run(named, tmp_path)
    tokens = runs.make_tokenizer(run)
    assert tokens.directory == finished / "tokenizer"
    plain = examples_of(tiny_config(), tiny_tokens, tmp_path / "plain")
    for examples, reference in zip(runs.make_examples(run, tokens), plain, strict=True):
        assert examples.splits[0].manifest["files"] == reference.splits[0].manifest["files"]
        for rows, expected in zip(take(examples, 3), take(reference, 3), strict=True):
            for array, expected_array in zip(rows, expected, strict=True):
                np.testing.assert_array_equal(array, expected_array)
    assert not (tmp_path / "shards").exists()
    texts = list(runs.Texts(run, runs.splits(run)[1], 4))
    assert len(texts) == 4 and all(texts)


def test_a_corpus_and_a_task_are_mixed(finished, tiny_config, tmp_path):
    names = [str(finished), "docstring_summary"]
    mixture = {"data.mixture": tuple((name, None) for name in names), "tokenizer.dir": ""}
    run = runs.make_run(tiny_config(**mixture), tmp_path)
    train, heldout = runs.make_examples(run, runs.make_tokenizer(run))
    assert [split.name for split in train.splits] == names
    assert train.columns == (32, 16)
    assert heldout.splits[1].directory == str(tmp_path / "shards" / "docstring_summary" / "heldout")


def test_a_corpus_of_another_tokenizer_or_a_slice_of_one_is_refused(
    finished, tiny_config, tmp_path
):
    from lm import tokenizer

    tokens = tokenizer.write_byte_tokenizer(tmp_path / "bytes", 10)
    changes = {"data.task": str(finished), "tokenizer.dir": str(tokens.directory)}
    run = runs.make_run(tiny_config(**changes), tmp_path)
    with pytest.raises(ValueError, match="was encoded with another tokenizer than .*bytes; leave"):
        runs.make_examples(run, tokens)
    absent = {"data.mixture": ((str(finished), None), (f"{tmp_path}/absent", None))}
    with pytest.raises(ValueError, match="absent holds no finished corpus .* build one with"):
        runs.splits(runs.make_run(tiny_config(**absent), tmp_path))
    with pytest.raises(ValueError, match="absent holds no finished corpus .* build one with"):
        mistyped = {"data.task": f"{tmp_path}/absent", "tokenizer.dir": ""}
        runs.make_run(tiny_config(**mistyped), tmp_path)
    with pytest.raises(ValueError, match="are both 'train'; leave them at train and validation"):
        same_split = {"data.task": str(finished), "data.heldout_split": "train"}
        runs.splits(runs.make_run(tiny_config(**same_split), tmp_path))
    sliced = tiny_config(**{"data.task": str(finished), "data.train_split": "train[:50%]"})
    with pytest.raises(ValueError, match="without slices"):
        runs.make_examples(
            runs.make_run(sliced, tmp_path), tokenizer.Tokenizer(finished / "tokenizer")
        )


def test_a_corpus_too_short_for_one_row_is_an_error(finished, tiny_config, tiny_tokens, tmp_path):
    long = tiny_config(**{"data.task": str(finished), "data.input_length": 10**5})
    objective = runs.make_run(tiny_config(), tmp_path).objective
    data = pipeline.DataConfig(**long["data"])
    directories = {str(finished): finished / "train"}
    with pytest.raises(ValueError, match="makes not one example of .* tokens; use a wider split"):
        pipeline.make_examples(data, objective, tiny_tokens, {str(finished): "train"}, directories)


def test_task_texts_are_those_of_the_named_task(tiny_config, tmp_path):
    run = runs.make_run(tiny_config(**{"data.mixture": BOTH}), tmp_path)
    pairs = evaluate.task_texts(run, "docstring_summary")
    assert len(pairs) == 4 and all(set(pair) == {"inputs", "targets"} for pair in pairs)


def test_evaluate_reports_each_task_by_itself_and_all_together(
    tiny_config, tiny_tokens, tmp_path, monkeypatch
):
    """The loss is faked as the number of tokens, so that no model is compiled."""
    run = runs.make_run(tiny_config(**{"data.mixture": BOTH}), tmp_path)

    class HeldOut(evaluate.HeldOut):
        def __init__(self, run, strategy, examples, tokens):
            self._examples, self._seed, self._limit = examples, 0, 20

        def by_example(self, params, label=""):
            each = [batch.loss_weights(rows).sum(1) for rows in self.batches()]
            keys = ("nats", "hits", "weight", "text_nats", "text_weight", "bytes")
            return dict.fromkeys(keys, np.concatenate(each))

    def shouted(texts, task, **_):
        return [generate.Answer([text.upper()], [0.0], False) for text in texts]

    opened = run, parallel.make_strategy(parallel.ParallelConfig(data=1)), tiny_tokens
    monkeypatch.setattr(loading, "open_workdir", lambda _: opened)
    monkeypatch.setattr(loading, "read_params", lambda *_: ({}, 7))
    monkeypatch.setattr(heldout, "HeldOut", HeldOut)
    monkeypatch.setattr(generate.Generator, "with_params", lambda *_: shouted)
    figures = evaluate.evaluate(tmp_path)
    by_task = figures["tasks"]
    assert list(by_task) == [name for name, _ in BOTH]
    assert figures["intervals"].keys() == by_task["wikipedia"]["intervals"].keys()
    assert sum(row["tokens"] for row in by_task.values()) == figures["tokens"]
    assert "rouge1" in by_task["docstring_summary"] and "rouge1" not in by_task["wikipedia"]
    baselines = {name: row["unigram_nats"] for name, row in by_task.items()}
    assert len({*baselines.values(), figures["unigram_nats"]}) == 3
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert [row["task"] for row in rows] == ["docstring_summary"] * 4
    assert all(row["prediction"] == row["inputs"].upper() for row in rows)
    # A task alone has the same baseline.
    alone = runs.make_run(tiny_config(), tmp_path / "alone")
    train, heldout_examples = runs.make_examples(alone, tiny_tokens)
    text_bytes = tiny_tokens.piece_bytes(run.model.vocab_size)
    expected = evaluate.unigram_baselines(
        HeldOut(alone, None, heldout_examples, None), train.frequencies, text_bytes
    )
    assert baselines["wikipedia"] == pytest.approx(expected["unigram_nats"])
