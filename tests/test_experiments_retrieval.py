"""The retrieval baseline answers with the reply to the most similar history."""

from __future__ import annotations

import pytest

from experiments import retrieval

pytest.importorskip("sklearn")

HISTORIES = [
    "I want to find a restaurant in San Jose.",
    "I want to find a hotel in San Jose. For how many nights?",
    "Is there any event on March 3rd? Is there?",
    "Find me a bus from Fresno to San Jose, please find one",
    "Ich möchte ein Zimmer für zwei Nächte",
]
REPLIES = ["What food?", "It has a pool.", "A concert.", "At 7 am.", "Gern."]


def test_a_known_history_gets_its_own_reply_in_any_case_and_order_of_words():
    answers = retrieval.Retrieval(HISTORIES, REPLIES)
    assert answers(HISTORIES) == REPLIES
    assert answers([text.upper() for text in HISTORIES]) == REPLIES
    assert answers([" ".join(text.split()[::-1]) for text in HISTORIES[::-1]]) == REPLIES[::-1]


def test_a_rare_word_weighs_more_than_a_common_one():
    answers = retrieval.Retrieval(["hello there", "hello sir", "hello madam"], ["a", "b", "c"])
    assert answers(["hello madam there madam"]) == ["c"]
    assert answers(["hello hello sir"]) == ["b"]


def test_the_first_of_equally_similar_histories_counts():
    answers = retrieval.Retrieval(["one two", "six", "six", "one two"], ["a", "b", "c", "d"])
    assert answers(["six", "two one", "nine", "", "x y"]) == ["b", "a", "a", "a", "a"]


def test_answers_do_not_depend_on_the_batch(monkeypatch):
    answers = retrieval.Retrieval(HISTORIES, REPLIES)
    queries = [" ".join(pair) for pair in zip(HISTORIES, HISTORIES[::-1], strict=True)] * 3
    at_once = answers(queries)
    assert len(set(at_once)) > 1
    for size in (1, 2, 4):
        monkeypatch.setattr(retrieval, "CHUNK", size)
        assert answers(queries) == at_once


def test_unequal_numbers_and_histories_without_words_are_refused():
    with pytest.raises(ValueError, match="2 histories have 1 replies"):
        retrieval.Retrieval(["one two", "three"], ["a"])
    with pytest.raises(ValueError, match="empty vocabulary"):
        retrieval.Retrieval(["", "a b ?"], ["a", "b"])
