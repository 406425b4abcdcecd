"""Laws of the scores: equal to the reference package, in percent, and refused where undefined."""

from __future__ import annotations

import numpy as np
import pytest

from lm import metrics

PREDICTIONS = ["The cats sat on the mat.", "nothing alike", "It was running fast", "", "a b c"]
REFERENCES = ["A cat sits on a mat", "quite different words", "It runs fastest!", "empty", "a b c"]


def test_rouge_equals_the_reference_package():
    from rouge_score import rouge_scorer, scoring

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    aggregator = scoring.BootstrapAggregator(n_samples=1)
    singles = []
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        singles.append(scorer.score(target=reference, prediction=prediction))
        aggregator.add_scores(singles[-1])
    ours = metrics.rouge(PREDICTIONS, REFERENCES)
    assert set(ours) == {"rouge1", "rouge2", "rougeL"} == set(aggregator.aggregate())
    for name, value in ours.items():
        np.testing.assert_allclose(value, 100 * np.mean([s[name].fmeasure for s in singles]))


def test_rouge_of_a_worked_example():
    # 3 of 4 words shared of 3 and 4; 2 of 2 and 3 pairs; the subsequence "cat sat mat".
    scores = metrics.rouge(["cat sat mat"], ["the cat sat mat"])
    np.testing.assert_allclose(scores["rouge1"], 100 * 2 * 1.0 * 0.75 / 1.75)
    np.testing.assert_allclose(scores["rouge2"], 100 * 2 * 1.0 * (2 / 3) / (5 / 3))
    np.testing.assert_allclose(scores["rougeL"], scores["rouge1"])


def test_rouge_stems_its_words():
    assert metrics.rouge(["the cats were jumping"], ["the cat were jumps"])["rouge1"] == 100


@pytest.mark.parametrize("name", metrics.METRICS)
def test_a_perfect_prediction_scores_100_and_an_alien_one_0(name):
    references = ["one two three", "four five six"]
    assert set(metrics.METRICS[name](references, references).values()) == {100.0}
    assert set(metrics.METRICS[name](["x y z", "u v w"], references).values()) == {0.0}


@pytest.mark.parametrize("name", metrics.METRICS)
def test_the_score_of_a_list_is_the_mean_of_its_examples(name):
    score = metrics.METRICS[name]
    whole = score(PREDICTIONS, REFERENCES)
    each = [score([p], [r]) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    for key, value in whole.items():
        assert isinstance(value, float)
        np.testing.assert_allclose(value, np.mean([single[key] for single in each]))


def test_exact_match_forgives_outer_white_space_and_nothing_else():
    predictions = [" yes\n", "Yes", "yes.", "y es", "yes"]
    references = ["yes", "yes", "yes", "yes", "Yes"]
    assert metrics.exact_match(predictions, references) == {"exact_match": 20.0}
    assert metrics.exact_match(references, predictions) == {"exact_match": 20.0}


@pytest.mark.parametrize("name", metrics.METRICS)
@pytest.mark.parametrize("predictions, references", [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_lists_that_do_not_pair_are_refused(name, predictions, references):
    counts = f"{len(predictions)} predictions and {len(references)} references cannot be scored"
    with pytest.raises(ValueError, match=counts):
        metrics.METRICS[name](predictions, references)


@pytest.mark.parametrize(
    "text, words, expected",
    [
        ("Return the sum. It is fast.", 20, "Return the sum."),
        ("Return the sum. It is fast.", 2, "Return the"),
        ("\n  A title\nand a body. ", 20, "A title"),
        ("Costs 3.5 dollars! Really?", 20, "Costs 3.5 dollars!"),
        ('He said "stop." Then he left.', 20, 'He said "stop.'),
        ("no end", 20, "no end"),
        ("", 20, ""),
    ],
)
def test_the_lead_is_the_first_sentence_up_to_some_words(text, words, expected):
    assert metrics.lead(text, words) == expected
