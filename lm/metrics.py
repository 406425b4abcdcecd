"""Predictions and references to scores, in percent; and the baseline that knows nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

ROUGE = ("rouge1", "rouge2", "rougeL")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s|\n")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measure of shared words, word pairs and longest common subsequence, after stemming.

    Returns {"rouge1", "rouge2", "rougeL"}. English: other scripts count as no words at all.
    Raises ValueError if the lists are empty or of unequal length.
    Source: Lin 2004, as computed by the package rouge_score.
    """
    from rouge_score import rouge_scorer

    check_pairs(predictions, references)
    scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
    scores = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    return {name: mean_percent([score[name].fmeasure for score in scores]) for name in ROUGE}


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The share of predictions that equal their reference, but for white space at the ends.

    Raises ValueError if the lists are empty or of unequal length.
    """
    check_pairs(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return {"exact_match": mean_percent([ours.strip() == theirs.strip() for ours, theirs in pairs])}


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, float]]] = {
    "rouge": rouge,
    "exact_match": exact_match,
}


def mean_percent(values: Sequence[float]) -> float:
    """100 times the mean."""
    return 100 * sum(values) / len(values)


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raise ValueError unless there is a prediction for each reference, and at least one."""
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references cannot be scored; "
            f"give as many of one as of the other, and at least one."
        )


def lead(text: str, words: int) -> str:
    """The first sentence of a text, and of it at most the first `words` words.

    The lead baseline: a summarizer that does not beat it has learnt nothing.
    """
    return " ".join(SENTENCE_END.split(text.strip(), maxsplit=1)[0].split()[:words])
