"""Laws of the intervals: a draw is a score, its spread is the truth's, pairs are drawn once."""

from __future__ import annotations

import numpy as np
import pytest

from lm import metrics

WORDS = (
    "dog",
    "cat",
    "man",
    "woman",
    "red",
    "blue",
    "runs",
    "sits",
    "on",
    "street",
    "grass",
    "ball",
)


def texts(count, seed, wrong=0.0):
    """Random sentences, and the same with a share of words replaced."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 15, size=count)
    right = [[WORDS[n] for n in rng.integers(len(WORDS), size=length)] for length in lengths]
    said = [[WORDS[rng.integers(6)] if rng.random() < wrong else w for w in one] for one in right]
    return [" ".join(one) for one in said], [" ".join(one) for one in right]


def width(bounds):
    return bounds[1] - bounds[0]


@pytest.mark.parametrize("word", metrics.METRICS)
def test_a_draw_is_the_score_of_the_examples_drawn(word):
    predictions, references = texts(23, seed=1, wrong=0.2)
    drawn = np.random.default_rng(7).integers(23, size=23)
    again = metrics.score(word, [predictions[n] for n in drawn], [references[n] for n in drawn])
    found = metrics.confidence_intervals(word, predictions, references, draws=1, seed=7)
    assert found.keys() == again.keys()
    for name, value in again.items():
        np.testing.assert_allclose(found[name], (value, value), rtol=1e-12)


def test_the_interval_of_an_accuracy_is_the_binomials():
    from scipy import stats

    predictions, references = ["yes"] * 60 + ["no"] * 140, ["yes"] * 200
    (found,) = metrics.confidence_intervals(
        "accuracy", predictions, references, draws=4000
    ).values()
    truth = stats.binom.ppf([0.025, 0.975], 200, 60 / 200) / 2  # in percent
    np.testing.assert_allclose(found, truth, atol=0.5)  # one example


@pytest.mark.parametrize("word", ["bleu", "chrf"])
def test_the_interval_is_as_wide_as_sacrebleus_own_bootstrap(word):
    from sacrebleu.metrics import BLEU, CHRF

    predictions, references = texts(150, seed=2, wrong=0.3)
    known = {"bleu": BLEU, "chrf": CHRF}[word]()
    theirs = known.corpus_score(predictions, [references], n_bootstrap=1000)
    found = metrics.confidence_intervals(word, predictions, references)[word]
    np.testing.assert_allclose(width(found) / 2, theirs._ci, rtol=0.1)
    np.testing.assert_allclose(np.mean(found), theirs._mean, atol=0.1 * theirs._ci)


@pytest.mark.parametrize("word", metrics.METRICS)
def test_the_score_lies_in_its_interval_and_the_seed_decides_the_draws(word):
    pair = texts(80, seed=3, wrong=0.1)
    score, found = metrics.score(word, *pair), metrics.confidence_intervals(word, *pair, draws=200)
    assert score.keys() == found.keys()
    assert all(low < score[name] < high for name, (low, high) in found.items())
    assert found == metrics.confidence_intervals(word, *pair, draws=200, seed=0)
    assert found != metrics.confidence_intervals(word, *pair, draws=200, seed=1)


def test_four_times_the_examples_halve_the_interval():
    predictions, references = texts(100, seed=4, wrong=0.3)
    once = metrics.confidence_intervals("chrf", predictions, references)["chrf"]
    often = metrics.confidence_intervals("chrf", predictions * 4, references * 4)["chrf"]
    np.testing.assert_allclose(width(often), width(once) / 2, rtol=0.1)


def test_one_example_leaves_nothing_to_draw():
    for word in metrics.METRICS:
        for name, value in metrics.score(word, ["a b c d"], ["a b c e"]).items():
            found = metrics.confidence_intervals(word, ["a b c d"], ["a b c e"], draws=3)[name]
            np.testing.assert_allclose(found, value, rtol=1e-12)


def test_the_difference_of_a_system_and_itself_is_0_and_it_changes_its_sign_with_their_order():
    ours, references = texts(60, seed=5, wrong=0.1)
    theirs = [said.replace("dog", "cat") for said in ours]
    for word in metrics.METRICS:
        same = metrics.difference_intervals(word, ours, ours, references, draws=50)
        assert set(same.values()) == {(0.0, 0.0)}
        forth = metrics.difference_intervals(word, ours, theirs, references, draws=50)
        back = metrics.difference_intervals(word, theirs, ours, references, draws=50)
        for name, (low, high) in forth.items():
            assert low <= high and width((low, high)) > 0
            np.testing.assert_allclose(back[name], (-high, -low))


def test_pairs_are_surer_than_two_intervals_side_by_side():
    theirs, references = texts(200, seed=6, wrong=0.1)
    ours = references[:20] + theirs[20:]  # no example is worse
    found = metrics.difference_intervals("accuracy", ours, theirs, references)["accuracy"]
    a, b = (
        metrics.confidence_intervals("accuracy", said, references)["accuracy"]
        for said in (ours, theirs)
    )
    gain = np.sum([o != t for o, t in zip(ours, theirs, strict=True)]) / 2  # in percent
    assert 0 < found[0] < gain < found[1]
    assert a[0] < b[1], "side by side they overlap"
    assert width(found) < 0.7 * min(width(a), width(b))


def test_systems_right_where_the_other_is_wrong_differ_twice_as_widely():
    references = ["yes"] * 100
    ours, theirs = ["yes"] * 60 + ["no"] * 40, ["no"] * 60 + ["yes"] * 40
    found = metrics.difference_intervals("accuracy", ours, theirs, references)["accuracy"]
    alone = metrics.confidence_intervals("accuracy", ours, references)["accuracy"]
    np.testing.assert_allclose(found, [2 * bound - 100 for bound in alone])


def test_the_bootstrap_of_any_sum_sees_the_draws_of_the_metrics():
    predictions, references = texts(40, seed=8, wrong=0.1)
    same = [said == right for said, right in zip(predictions, references, strict=True)]
    each = np.array(
        [[hit, len(right.split())] for hit, right in zip(same, references, strict=True)]
    )
    rates = lambda total, count: [100 * total[0] / count, total[1] / count]
    drawn = metrics.bootstrap(each, rates, draws=100, seed=3)
    assert drawn.shape == (100, 2)
    found = metrics.percentile_intervals(["hits", "words"], drawn)
    theirs = metrics.confidence_intervals("accuracy", predictions, references, draws=100, seed=3)
    assert found["hits"] == theirs["accuracy"]
    assert found["words"] == tuple(np.percentile(drawn[:, 1], [2.5, 97.5]))


def test_no_draws_are_no_interval():
    with pytest.raises(ValueError, match="draws=0 gives no interval; use 1 or more"):
        metrics.confidence_intervals("bleu", ["a"], ["a"], draws=0)
