"""Laws of the scores: equal to the reference packages, in percent, and refused where undefined."""

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
MORE = [[one, "The cat sat on the mat, near a fire.", "a b c"] for one in REFERENCES]
SEVERAL = [many[:count] for many, count in zip(MORE, [3, 1, 2, 1, 1, 3, 2], strict=True)]
MEANS = ["rouge", "exact_match", "f1", "accuracy"]


def stranger(word):
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU, "chrf": CHRF}[word]()


@pytest.mark.parametrize("word", ["bleu", "chrf"])
def test_corpus_scores_equal_sacrebleus_to_the_last_digit(word):
    theirs = stranger(word).corpus_score(PREDICTIONS, [REFERENCES]).score
    assert 10 < theirs < 90
    assert metrics.score(word, PREDICTIONS, REFERENCES) == {word: theirs}


@pytest.mark.parametrize("word", ["bleu", "chrf"])
def test_of_several_references_sacrebleu_makes_the_same(word):
    streams = [[(many + [None, None])[n] for many in SEVERAL] for n in range(3)]
    known = stranger(word)
    theirs = known.corpus_score(PREDICTIONS, streams).score
    ours = metrics.score(word, PREDICTIONS, SEVERAL)
    assert ours == {word: theirs} != metrics.score(word, PREDICTIONS, REFERENCES)
    assert metrics.signature(word, SEVERAL) == str(known.get_signature())
    assert "nrefs:var|" in metrics.signature(word, SEVERAL)


@pytest.mark.parametrize("word", ["bleu", "chrf"])
def test_the_signature_is_sacrebleus(word):
    known = stranger(word)
    known.corpus_score(PREDICTIONS, [REFERENCES])
    assert metrics.signature(word) == str(known.get_signature())
    assert metrics.signature(word, REFERENCES) == metrics.signature(word)
    pairs = [[one, one] for one in REFERENCES]
    assert metrics.signature(word, pairs) == metrics.signature(word).replace("nrefs:1", "nrefs:2")


def test_bleu_of_worked_examples():
    # Precisions 4/5, 3/4, 2/3, 1/2, whose product is 1/5; then all right, but short.
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
    ours = metrics.score("rouge", PREDICTIONS, REFERENCES)
    assert list(ours) == names
    for name, value in ours.items():
        np.testing.assert_allclose(value, 100 * np.mean([s[name].fmeasure for s in singles]))


def test_rouge_of_a_worked_example():
    # 3 of 4 words shared of 3 and 4; 2 of 2 and 3 pairs; the subsequence "cat sat mat".
    scores = metrics.score("rouge", ["cat sat mat"], ["the cat sat mat"])
    np.testing.assert_allclose(scores["rouge1"], 100 * 2 * 1.0 * 0.75 / 1.75)
    np.testing.assert_allclose(scores["rouge2"], 100 * 2 * 1.0 * (2 / 3) / (5 / 3))
    np.testing.assert_allclose(scores["rougeL"], scores["rouge1"])
    np.testing.assert_allclose(scores["rougeLsum"], scores["rouge1"])


def test_rougeLsum_forgives_the_order_of_lines_and_rougeL_does_not():
    scores = metrics.score("rouge", ["one two\nthree four"], ["three four\none two"])
    assert scores["rougeLsum"] == 100 and scores["rougeL"] == 50


def test_rouge_stems_its_words():
    scores = metrics.score("rouge", ["the cats were jumping"], ["the cat were jumps"])
    assert scores["rouge1"] == 100


def test_rouge_knows_no_words_of_another_script():
    text = "Ночь, улица, фонарь, аптека"
    assert set(metrics.score("rouge", [text], [text]).values()) == {0.0}


@pytest.mark.parametrize(
    "prediction, reference, exact, f1",
    [
        ("The Eiffel Tower!", "eiffel tower", 100, 100),  # case, article, punctuation
        ("U.S.A.", "usa", 100, 100),  # punctuation goes, and leaves no space
        ("an  answer\n", "answer", 100, 100),
        ("theory of a game", "theory of game", 100, 100),  # an article is a whole word
        ("theory", "ory", 0, 0),
        ("tower eiffel", "eiffel tower", 0, 100),  # F1 knows no order
        ("in 1889", "1889", 0, 100 * 2 / 3),  # precision 1/2, recall 1
        ("no no no yes", "no yes yes", 0, 100 * 4 / 7),  # 2 shared of 4 and of 3
        ("no no yes", "no no way", 0, 100 * 2 / 3),  # as often as both say it
        ("x–a–y", "x– –y", 100, 100),  # an article leaves a space
        ("", "", 100, 100),
        ("the", "...", 100, 100),  # neither has a word
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
        {"answers": {"text": many, "answer_start": [0] * len(many)}, "id": str(n)}
        for n, many in enumerate(SEVERAL)
    ]
    theirs = squad.squad(predictions, answers)
    for word in ("exact_match", "f1"):
        ours = metrics.score(word, PREDICTIONS, SEVERAL)[word]
        np.testing.assert_allclose(ours, theirs[word].item(), rtol=1e-6)


def test_accuracy_forgives_outer_white_space_and_nothing_else():
    predictions = [" yes\n", "Yes", "yes.", "y es", "yes"]
    references = ["yes", "yes", "yes", "yes", "Yes"]
    assert metrics.score("accuracy", predictions, references) == {"accuracy": 20.0}
    assert metrics.score("accuracy", references, predictions) == {"accuracy": 20.0}


@pytest.mark.parametrize("word", metrics.METRICS)
def test_a_perfect_prediction_scores_100_and_an_alien_one_0(word):
    references = ["one two three four", "five six seven eight nine"]
    for value in metrics.score(word, references, references).values():
        np.testing.assert_allclose(value, 100, rtol=1e-12)  # sacrebleu's BLEU takes exp of log
    aliens = ["X Y Z", "1 2 3"]  # other letters even
    assert set(metrics.score(word, aliens, references).values()) == {0.0}


@pytest.mark.parametrize("word", MEANS)
def test_the_score_of_a_list_is_the_mean_of_its_examples(word):
    whole = metrics.score(word, PREDICTIONS, REFERENCES)
    each = [metrics.score(word, [p], [r]) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    for key, value in whole.items():
        assert type(value) is float and 0 < value < 100
        np.testing.assert_allclose(value, np.mean([single[key] for single in each]))


@pytest.mark.parametrize("word", MEANS)
def test_the_best_of_several_references_counts(word):
    several = metrics.score(word, PREDICTIONS, SEVERAL)
    options = [[many[n % len(many)] for many in SEVERAL] for n in range(6)]
    chosen = {key: 0.0 for key in several}
    for example, said in enumerate(PREDICTIONS):
        singles = [metrics.score(word, [said], [option[example]]) for option in options]
        chosen = {key: chosen[key] + max(one[key] for one in singles) for key in chosen}
    for key, value in several.items():
        np.testing.assert_allclose(value, chosen[key] / len(PREDICTIONS))


@pytest.mark.parametrize("word", metrics.METRICS)
def test_neither_the_order_of_examples_nor_a_reference_said_twice_counts(word):
    once = metrics.score(word, PREDICTIONS, REFERENCES)
    twice = metrics.score(word, PREDICTIONS[::-1], [(one, one) for one in REFERENCES[::-1]])
    assert once.keys() == twice.keys() == set(metrics.METRICS[word].names)
    for key, value in once.items():
        np.testing.assert_allclose(twice[key], value, rtol=1e-12)


@pytest.mark.parametrize("word", metrics.METRICS)
@pytest.mark.parametrize("predictions, references", [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_lists_that_do_not_pair_are_refused(word, predictions, references):
    counts = f"{len(predictions)} predictions and {len(references)} references cannot be scored"
    for measure in metrics.score, metrics.confidence_intervals:
        with pytest.raises(ValueError, match=counts):
            measure(word, predictions, references)


def test_an_example_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="Example 1 has no reference; give each at least one"):
        metrics.score("bleu", ["a", "b"], ["a", []])


def test_an_unknown_word_lists_the_known_ones():
    for measure in (
        lambda: metrics.score("blue", ["a"], ["a"]),
        lambda: metrics.confidence_intervals("blue", ["a"], ["a"]),
        lambda: metrics.signature("blue"),
    ):
        with pytest.raises(ValueError, match="'blue' is unknown.*accuracy, bleu.*did you mean"):
            measure()
