"""Laws of the scores: equal to the reference packages, in percent; errors."""

from __future__ import annotations

import numpy as np
import pytest

from lm import metrics

PREDICTIONS = [
    "The cats sat on the mat, near the fire.",
    "nothing alike here at all",
    "It was running fast down the long road",
    "",
    "a b c d e f",
    "two lines.\nof one summary, said twice",
    "Ein Mann fährt über die Straße.",
]
REFERENCES = [
    "A cat sits on the mat, near the fires.",
    "quite different words in this one",
    "It runs fastest down the long road!",
    "empty",
    "a b c d e f",
    "one summary.\nsaid of two lines",
    "Ein Mann fährt auf der Straße.",
]
SEVERAL = [
    [text, "The cat sat on the mat, near a fire.", "a b c"][:count]
    for text, count in zip(REFERENCES, [3, 1, 2, 1, 1, 3, 2], strict=True)
]
MEANS = ["rouge", "exact_match", "f1", "accuracy"]


def sacrebleu_metric(name):
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU, "chrf": CHRF}[name]()


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_scores_equal_sacrebleus_to_the_last_digit(name):
    expected = sacrebleu_metric(name).corpus_score(PREDICTIONS, [REFERENCES]).score
    assert 10 < expected < 90
    assert metrics.score(name, PREDICTIONS, REFERENCES) == {name: expected}


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_scores_of_several_references_equal_sacrebleus(name):
    streams = [[(texts + [None, None])[n] for texts in SEVERAL] for n in range(3)]
    reference = sacrebleu_metric(name)
    expected = reference.corpus_score(PREDICTIONS, streams).score
    actual = metrics.score(name, PREDICTIONS, SEVERAL)
    assert actual == {name: expected} != metrics.score(name, PREDICTIONS, REFERENCES)
    assert metrics.signature(name, SEVERAL) == str(reference.get_signature())
    assert "nrefs:var|" in metrics.signature(name, SEVERAL)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_signatures_equal_sacrebleus(name):
    reference = sacrebleu_metric(name)
    reference.corpus_score(PREDICTIONS, [REFERENCES])
    assert metrics.signature(name) == str(reference.get_signature())
    assert metrics.signature(name, REFERENCES) == metrics.signature(name)
    pairs = [[text, text] for text in REFERENCES]
    assert metrics.signature(name, pairs) == metrics.signature(name).replace("nrefs:1", "nrefs:2")


def test_bleu_of_worked_examples():
    # Precisions 4/5, 3/4, 2/3, 1/2, whose product is 1/5; then perfect precisions, too short.
    scores = metrics.score("bleu", ["a b c d e"], ["a b c d f"])
    np.testing.assert_allclose(scores["bleu"], 100 * 0.2**0.25)
    scores = metrics.score("bleu", ["a b c d"], ["a b c d e"])
    np.testing.assert_allclose(scores["bleu"], 100 * np.exp(1 - 5 / 4))


def test_chrf_of_a_worked_example():
    # Precision 1; recall 2/3 of letters and 1/2 of pairs, 7/12 on average; F with beta 2.
    scores = metrics.score("chrf", ["ab"], ["abc"])
    np.testing.assert_allclose(scores["chrf"], 100 * 5 * (7 / 12) / (4 + 7 / 12))


def test_rouge_equals_the_reference_package():
    from rouge_score import rouge_scorer

    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
    singles = [scorer.score(*pair) for pair in zip(REFERENCES, PREDICTIONS, strict=True)]
    actual = metrics.score("rouge", PREDICTIONS, REFERENCES)
    assert list(actual) == names
    for name, value in actual.items():
        np.testing.assert_allclose(value, 100 * np.mean([s[name].fmeasure for s in singles]))


def test_rouge_of_a_worked_example():
    # Shared: 3 words of 3 and 4, 2 word pairs of 2 and 3, and the subsequence "cat sat mat".
    scores = metrics.score("rouge", ["cat sat mat"], ["the cat sat mat"])
    np.testing.assert_allclose(scores["rouge1"], 100 * 2 * 1.0 * 0.75 / 1.75)
    np.testing.assert_allclose(scores["rouge2"], 100 * 2 * 1.0 * (2 / 3) / (5 / 3))
    np.testing.assert_allclose(scores["rougeL"], scores["rouge1"])
    np.testing.assert_allclose(scores["rougeLsum"], scores["rouge1"])


def test_rougeLsum_ignores_the_order_of_lines_and_rougeL_does_not():
    scores = metrics.score("rouge", ["one two\nthree four"], ["three four\none two"])
    assert scores["rougeLsum"] == 100 and scores["rougeL"] == 50


def test_rouge_stems_words():
    scores = metrics.score("rouge", ["the cats were jumping"], ["the cat were jumps"])
    assert scores["rouge1"] == 100


def test_rouge_of_another_script_is_0():
    text = "Ночь, улица, фонарь, аптека"
    assert set(metrics.score("rouge", [text], [text]).values()) == {0.0}


@pytest.mark.parametrize(
    "prediction, reference, exact, f1",
    [
        ("The Eiffel Tower!", "eiffel tower", 100, 100),  # case, article, punctuation
        ("U.S.A.", "usa", 100, 100),  # punctuation is removed without a space
        ("an  answer\n", "answer", 100, 100),
        ("theory of a game", "theory of game", 100, 100),  # only whole words are articles
        ("theory", "ory", 0, 0),
        ("tower eiffel", "eiffel tower", 0, 100),  # F1 ignores the order
        ("in 1889", "1889", 0, 100 * 2 / 3),  # precision 1/2, recall 1
        ("no no no yes", "no yes yes", 0, 100 * 4 / 7),  # 2 shared of 4 and of 3
        ("no no yes", "no no way", 0, 100 * 2 / 3),  # repetition counts
        ("x–a–y", "x– –y", 100, 100),  # an article becomes a space
        ("", "", 100, 100),
        ("the", "...", 100, 100),  # no words at all
        ("", "word", 0, 0),
        ("word", "a", 0, 0),
    ],
)
def test_exact_match_and_f1_of_worked_answers(prediction, reference, exact, f1):
    for pair in ([prediction], [reference]), ([reference], [prediction]):
        assert metrics.score("exact_match", *pair) == {"exact_match": exact}
        np.testing.assert_allclose(metrics.score("f1", *pair)["f1"], f1)


def test_exact_match_and_f1_equal_torchmetrics_squad():
    squad = pytest.importorskip("torchmetrics.functional.text")
    predictions = [{"prediction_text": text, "id": str(n)} for n, text in enumerate(PREDICTIONS)]
    answers = [
        {"answers": {"text": texts, "answer_start": [0] * len(texts)}, "id": str(n)}
        for n, texts in enumerate(SEVERAL)
    ]
    expected = squad.squad(predictions, answers)
    for name in ("exact_match", "f1"):
        actual = metrics.score(name, PREDICTIONS, SEVERAL)[name]
        np.testing.assert_allclose(actual, expected[name].item(), rtol=1e-6)


def test_accuracy_ignores_white_space_at_the_ends_only():
    predictions = [" yes\n", "Yes", "yes.", "y es", "yes"]
    references = ["yes", "yes", "yes", "yes", "Yes"]
    assert metrics.score("accuracy", predictions, references) == {"accuracy": 20.0}
    assert metrics.score("accuracy", references, predictions) == {"accuracy": 20.0}


@pytest.mark.parametrize("name", metrics.METRICS)
def test_perfect_predictions_score_100_and_disjoint_ones_0(name):
    references = ["one two three four", "five six seven eight nine"]
    for value in metrics.score(name, references, references).values():
        np.testing.assert_allclose(value, 100, rtol=1e-12)  # sacrebleu's BLEU takes exp of log
    disjoint = ["X Y Z", "1 2 3"]  # no common letters
    assert set(metrics.score(name, disjoint, references).values()) == {0.0}


@pytest.mark.parametrize("name", MEANS)
def test_the_score_of_a_corpus_is_the_mean_over_examples(name):
    whole = metrics.score(name, PREDICTIONS, REFERENCES)
    each = [metrics.score(name, [p], [r]) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    for key, value in whole.items():
        assert type(value) is float and 0 < value < 100
        np.testing.assert_allclose(value, np.mean([single[key] for single in each]))


@pytest.mark.parametrize("name", MEANS)
def test_the_best_reference_counts(name):
    several = metrics.score(name, PREDICTIONS, SEVERAL)
    totals = dict.fromkeys(several, 0.0)
    for prediction, texts in zip(PREDICTIONS, SEVERAL, strict=True):
        scores = [metrics.score(name, [prediction], [text]) for text in texts]
        totals = {key: total + max(s[key] for s in scores) for key, total in totals.items()}
    for key, value in several.items():
        np.testing.assert_allclose(value, totals[key] / len(PREDICTIONS))


@pytest.mark.parametrize("name", metrics.METRICS)
def test_the_order_of_examples_and_repeated_references_change_nothing(name):
    once = metrics.score(name, PREDICTIONS, REFERENCES)
    twice = metrics.score(name, PREDICTIONS[::-1], [(text, text) for text in REFERENCES[::-1]])
    assert once.keys() == twice.keys() == set(metrics.METRICS[name].names)
    for key, value in once.items():
        np.testing.assert_allclose(twice[key], value, rtol=1e-12)


@pytest.mark.parametrize("name", metrics.METRICS)
@pytest.mark.parametrize("predictions, references", [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_empty_and_unequal_lists_are_refused(name, predictions, references):
    counts = f"{len(predictions)} predictions and {len(references)} references cannot be scored"
    for function in metrics.score, metrics.confidence_intervals:
        with pytest.raises(ValueError, match=counts):
            function(name, predictions, references)


def test_an_example_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="Example 1 has no reference; give each at least one"):
        metrics.score("bleu", ["a", "b"], ["a", []])


def test_an_unknown_metric_raises_with_the_choices():
    for call in (
        lambda: metrics.score("blue", ["a"], ["a"]),
        lambda: metrics.confidence_intervals("blue", ["a"], ["a"]),
        lambda: metrics.signature("blue"),
    ):
        with pytest.raises(ValueError, match="'blue' is unknown.*accuracy, bleu.*did you mean"):
            call()


@pytest.mark.parametrize(
    "text, num_words, expected",
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
def test_the_lead_is_the_first_sentence_truncated_to_some_words(text, num_words, expected):
    assert metrics.lead(text, num_words) == expected
