"""The lead baseline is the first words of a text."""

from __future__ import annotations

import pytest

from lm import metrics


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
