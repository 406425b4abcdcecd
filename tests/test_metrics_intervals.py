"""Laws of the bootstrap: draws, widths, paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from lm import metrics

WORDS = ["dog", "cat", "man", "woman", "red", "blue"]
WORDS += ["runs", "sits", "on", "street", "grass", "ball"]


def texts(count, seed, wrong=0.0):
    """Return (predictions, references): random sentences; `wrong`: share of replaced words."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 15, size=count)
    references = [[WORDS[n] for n in rng.integers(len(WORDS), size=length)] for length in lengths]
    predictions = [
        [WORDS[rng.integers(6)] if rng.random() < wrong else word for word in words]
        for words in references
    ]
    return list(map(" ".join, predictions)), list(map(" ".join, references))


def width(interval):
    return interval[1] - interval[0]


@pytest.mark.parametrize("name", metrics.METRICS)
def test_a_draw_is_the_score_of_the_drawn_examples(name):
    predictions, references = texts(23, seed=1, wrong=0.2)
    rows = np.random.default_rng(7).integers(23, size=23)
    expected = metrics.score(name, [predictions[n] for n in rows], [references[n] for n in rows])
    actual = metrics.confidence_intervals(name, predictions, references, draws=1, seed=7)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], (value, value), rtol=1e-12)


def test_the_interval_of_an_accuracy_equals_the_binomial_one():
    from scipy import stats

    predictions, references = ["yes"] * 60 + ["no"] * 140, ["yes"] * 200
    (actual,) = metrics.confidence_intervals(
        "accuracy", predictions, references, draws=4000
    ).values()
    expected = stats.binom.ppf([0.025, 0.975], 200, 60 / 200) / 2  # in percent
    np.testing.assert_allclose(actual, expected, atol=0.5)  # one example


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_the_interval_is_as_wide_as_that_of_sacrebleus_bootstrap(name):
    from sacrebleu.metrics import BLEU, CHRF

    predictions, references = texts(150, seed=2, wrong=0.3)
    metric = {"bleu": BLEU, "chrf": CHRF}[name]()
    expected = metric.corpus_score(predictions, [references], n_bootstrap=1000)
    actual = metrics.confidence_intervals(name, predictions, references)[name]
    np.testing.assert_allclose(width(actual) / 2, expected._ci, rtol=0.1)
    np.testing.assert_allclose(np.mean(actual), expected._mean, atol=0.1 * expected._ci)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_the_score_is_in_its_interval_and_the_seed_decides_the_draws(name):
    pair = texts(80, seed=3, wrong=0.1)
    scores = metrics.score(name, *pair)
    intervals = metrics.confidence_intervals(name, *pair, draws=200)
    assert scores.keys() == intervals.keys()
    assert all(low < scores[key] < high for key, (low, high) in intervals.items())
    assert intervals == metrics.confidence_intervals(name, *pair, draws=200, seed=0)
    assert intervals != metrics.confidence_intervals(name, *pair, draws=200, seed=1)


def test_four_times_as_many_examples_halve_the_interval():
    predictions, references = texts(100, seed=4, wrong=0.3)
    once = metrics.confidence_intervals("chrf", predictions, references)["chrf"]
    four_times = metrics.confidence_intervals("chrf", predictions * 4, references * 4)["chrf"]
    np.testing.assert_allclose(width(four_times), width(once) / 2, rtol=0.1)


def test_the_interval_of_a_single_example_is_its_score():
    for name in metrics.METRICS:
        for key, value in metrics.score(name, ["a b c d"], ["a b c e"]).items():
            intervals = metrics.confidence_intervals(name, ["a b c d"], ["a b c e"], draws=3)
            np.testing.assert_allclose(intervals[key], value, rtol=1e-12)


def test_differences_are_antisymmetric_and_0_for_equal_predictions():
    predictions, references = texts(60, seed=5, wrong=0.1)
    baselines = [text.replace("dog", "cat") for text in predictions]
    for name in metrics.METRICS:
        same = metrics.difference_intervals(name, predictions, predictions, references, draws=50)
        assert set(same.values()) == {(0.0, 0.0)}
        forward = metrics.difference_intervals(name, predictions, baselines, references, draws=50)
        backward = metrics.difference_intervals(name, baselines, predictions, references, draws=50)
        for key, (low, high) in forward.items():
            assert low <= high and width((low, high)) > 0
            np.testing.assert_allclose(backward[key], (-high, -low))


def test_a_paired_interval_is_narrower_than_two_separate_ones():
    baselines, references = texts(200, seed=6, wrong=0.1)
    better = references[:20] + baselines[20:]  # no example is worse
    difference = metrics.difference_intervals("accuracy", better, baselines, references)["accuracy"]
    a, b = (
        metrics.confidence_intervals("accuracy", texts, references)["accuracy"]
        for texts in (better, baselines)
    )
    gain = np.sum([x != y for x, y in zip(better, baselines, strict=True)]) / 2  # in percent
    assert 0 < difference[0] < gain < difference[1]
    assert a[0] < b[1], "the separate intervals must overlap"
    assert width(difference) < 0.7 * min(width(a), width(b))


def test_the_difference_of_complementary_predictions_has_twice_the_width():
    references = ["yes"] * 100
    predictions, opposite = ["yes"] * 60 + ["no"] * 40, ["no"] * 60 + ["yes"] * 40
    difference = metrics.difference_intervals("accuracy", predictions, opposite, references)
    single = metrics.confidence_intervals("accuracy", predictions, references)["accuracy"]
    np.testing.assert_allclose(difference["accuracy"], [2 * bound - 100 for bound in single])


def test_the_bootstrap_of_any_statistics_uses_the_draws_of_the_metrics():
    predictions, references = texts(40, seed=8, wrong=0.1)
    pairs = zip(predictions, references, strict=True)
    statistics = np.array([[text == expected, len(expected.split())] for text, expected in pairs])
    rates = lambda total, count: [100 * total[0] / count, total[1] / count]
    samples = metrics.bootstrap(statistics, rates, draws=100, seed=3)
    assert samples.shape == (100, 2)
    actual = metrics.percentile_intervals(["hits", "words"], samples)
    expected = metrics.confidence_intervals("accuracy", predictions, references, draws=100, seed=3)
    assert actual["hits"] == expected["accuracy"]
    assert actual["words"] == tuple(np.percentile(samples[:, 1], [2.5, 97.5]))


def test_zero_draws_are_refused():
    with pytest.raises(ValueError, match="draws=0 gives no interval; use 1 or more"):
        metrics.confidence_intervals("bleu", ["a"], ["a"], draws=0)
