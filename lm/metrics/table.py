"""The table of metrics: statistics of each example, and scores of the sum of statistics."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

References = Sequence[Sequence[str]]  # one or more texts for each example


@dataclasses.dataclass(frozen=True)
class Metric:
    """Scores that are a function of one sum over examples, so that resampling is cheap."""

    names: tuple[str, ...]  # of the scores
    # predictions, references -> float [examples, statistics]
    statistics: Callable[[Sequence[str], References], np.ndarray]
    # sum over examples [statistics], number of examples -> a value in percent for each name
    scores: Callable[[np.ndarray, int], Sequence[float]]
    # number of references of each example, -1 if it varies -> how the scores are computed
    signature: Callable[[int], str]


def _mean_percent(total: np.ndarray, count: int) -> Sequence[float]:
    return 100 * total / count


def _mean_of_best(name: str, compare: Callable[[str, str], float], signature: str) -> Metric:
    """Make a metric: the mean of compare(prediction, reference), for the best reference."""

    def statistics(predictions: Sequence[str], references: References) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        return np.array([[max(compare(text, r) for r in texts)] for text, texts in pairs])

    return Metric((name,), statistics, _mean_percent, lambda _: signature)


ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _squad_words(text: str) -> list[str]:
    """Split lowercased text into words, without ASCII punctuation and English articles.

    Source: the evaluation script of SQuAD 2.0 (Rajpurkar et al. 2018).
    """
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def _word_f1(prediction: str, reference: str) -> float:
    """Compute the F-measure of shared words; 1 if both have no words."""
    words, reference_words = _squad_words(prediction), _squad_words(reference)
    if not (words and reference_words):
        return float(words == reference_words)
    shared = (collections.Counter(words) & collections.Counter(reference_words)).total()
    return 2 * shared / (len(words) + len(reference_words))


ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def _rouge(predictions: Sequence[str], references: References) -> np.ndarray:
    """Compute ROUGE F-measures: [examples, 4].

    rougeLsum compares line by line. Words consist of a-z and 0-9; text in other scripts scores 0.
    Source: Lin 2004, as computed by the package rouge_score.
    """
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.score_multi(texts, prediction) for prediction, texts in pairs]
    return np.array([[score[name].fmeasure for name in ROUGE] for score in scores])


def _sacrebleu(name: str, class_name: str) -> Metric:
    """Make a corpus-level metric of a class of sacrebleu, with its defaults.

    The statistics are sacrebleu's n-gram counts, whole numbers, so that sums are exact.
    """

    def metric():
        import sacrebleu.metrics

        return getattr(sacrebleu.metrics, class_name)()

    def statistics(predictions: Sequence[str], references: References) -> np.ndarray:
        streams = list(itertools.zip_longest(*references))  # None: no further reference
        return np.array(metric()._extract_corpus_statistics(predictions, streams), float)

    def scores(total: np.ndarray, count: int) -> Sequence[float]:
        return [metric()._compute_score_from_stats(total.tolist()).score]

    def signature(num_references: int) -> str:
        scorer = metric()
        scorer.num_refs = num_references
        return str(scorer.get_signature())

    return Metric((name,), statistics, scores, signature)


METRICS: dict[str, Metric] = {
    "rouge": Metric(
        ROUGE, _rouge, _mean_percent, lambda _: "mean F-measure, Porter stemmer, rouge_score"
    ),
    "bleu": _sacrebleu("bleu", "BLEU"),
    "chrf": _sacrebleu("chrf", "CHRF"),
    "exact_match": _mean_of_best(
        "exact_match",
        lambda text, reference: float(_squad_words(text) == _squad_words(reference)),
        "words as in SQuAD 2.0, all equal",
    ),
    "f1": _mean_of_best("f1", _word_f1, "words as in SQuAD 2.0, mean F-measure"),
    "accuracy": _mean_of_best(
        "accuracy",
        lambda text, reference: float(text.strip() == reference.strip()),
        "equal but for white space at the ends",
    ),
}
