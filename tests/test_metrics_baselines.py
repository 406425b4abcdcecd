"""Laws of the baselines: the lead is the first words, retrieval finds the most alike history."""

from __future__ import annotations

import numpy as np
import pytest

from lm import metrics
from lm.metrics import baselines

HISTORIES = [
    "I want to find a restaurant in San Jose.",
    "I want to find a hotel in San Jose. For how many nights?",
    "Is there any event on March 3rd? Is there?",
    "Find me a bus from Fresno to San Jose, please find one",
    "Ich möchte ein Zimmer für zwei Nächte",
]
REPLIES = ["What food?", "It has a pool.", "A concert.", "At 7 am.", "Gern."]


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


def test_a_known_history_gets_its_own_reply_in_any_case_and_order_of_words():
    answers = metrics.Retrieval(HISTORIES, REPLIES)
    assert answers(HISTORIES) == REPLIES
    assert answers([text.upper() for text in HISTORIES]) == REPLIES
    assert answers([" ".join(text.split()[::-1]) for text in HISTORIES[::-1]]) == REPLIES[::-1]


def test_similarities_of_a_worked_example():
    # Of 3 histories, "red" is in 2 and "sun" in 1: idf 1 + ln(4/3) and 1 + ln(4/2).
    answers = metrics.Retrieval(["red red sun", "red car", "car"], ["a", "b", "c"])
    red, sun = 1 + np.log(4 / 3), 1 + np.log(2)
    row = answers.known.toarray()[0]
    length = np.hypot(2 * red, sun)
    expected = {"red": 2 * red / length, "sun": sun / length, "car": 0}
    for word, value in expected.items():
        np.testing.assert_allclose(row[answers.columns[word]], value)


def test_vectors_and_answers_equal_scikit_learns():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    theirs = text.TfidfVectorizer()
    known, asked = theirs.fit_transform(HISTORIES).toarray(), ["a hotel in Fresno", "zwei, IST"]
    answers = metrics.Retrieval(HISTORIES, REPLIES)
    order = [answers.columns[word] for word in theirs.get_feature_names_out()]
    assert sorted(order) == list(range(len(order)))
    np.testing.assert_allclose(answers.known.toarray()[:, order], known)
    best = np.argmax(theirs.transform(asked).toarray() @ known.T, axis=1)
    assert answers(asked) == [REPLIES[n] for n in best]


def test_a_rare_word_says_more_than_a_common_one():
    answers = metrics.Retrieval(["hello there", "hello sir", "hello madam"], ["a", "b", "c"])
    assert answers(["hello madam there madam"]) == ["c"]
    assert answers(["hello hello sir"]) == ["b"]


def test_the_first_of_equals_is_taken_and_strangers_get_the_first_of_all():
    answers = metrics.Retrieval(["one two", "six", "six", "one two"], ["a", "b", "c", "d"])
    assert answers(["six", "two one", "nine", "", "x y"]) == ["b", "a", "a", "a", "a"]


def test_answers_do_not_depend_on_what_is_asked_beside(monkeypatch):
    answers = metrics.Retrieval(HISTORIES, REPLIES)
    asked = [" ".join(pair) for pair in zip(HISTORIES, HISTORIES[::-1], strict=True)] * 3
    at_once = answers(asked)
    assert len(set(at_once)) > 1 and answers([]) == []
    for size in (1, 2, 4):
        monkeypatch.setattr(baselines, "CHUNK", size)
        assert answers(asked) == at_once


def test_histories_that_teach_nothing_are_refused():
    with pytest.raises(ValueError, match="2 histories have 1 replies; give each history one"):
        metrics.Retrieval(["one two", "three"], ["a"])
    for empty in ([], ["", "a b ?"]):
        with pytest.raises(ValueError, match="No history has a word"):
            metrics.Retrieval(empty, ["a"] * len(empty))
