"""The table of metrics: each is a sum over examples, and a function of that sum."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

References = Sequence[Sequence[str]]  # of each example, one or more


@dataclasses.dataclass(frozen=True)
class Metric:
    """Scores that are a function of one sum over examples, which makes resampling them cheap.

    names: of the scores. statistics: predictions, references -> float [examples, statistics].
    scores: the sum over examples [statistics], and their count, -> a value in percent a name.
    signature: how many references an example has (-1: not all as many) -> how it was computed.
    """

    names: tuple[str, ...]
    statistics: Callable[[Sequence[str], References], np.ndarray]
    scores: Callable[[np.ndarray, int], Sequence[float]]
    signature: Callable[[int], str]


def _percent(total: np.ndarray, count: int) -> Sequence[float]:
    """100 times the mean of each statistic."""
    return 100 * total / count


def _best_of(name: str, compare: Callable[[str, str], float], signature: str) -> Metric:
    """The mean over examples of compare(prediction, reference), for the best of its references."""

    def statistics(predictions: Sequence[str], references: References) -> np.ndarray:
        pairs = zip(predictions, references, strict=True)
        return np.array([[max(compare(ours, one) for one in theirs)] for ours, theirs in pairs])

    return Metric((name,), statistics, _percent, lambda _: signature)


def _same(prediction: str, reference: str) -> float:
    """Whether they are equal, but for white space at the ends."""
    return float(prediction.strip() == reference.strip())


ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    """The words of an answer, in lower case, without ASCII punctuation and English articles.

    Source: the evaluation script of SQuAD 2.0 (Rajpurkar et al. 2018).
    """
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def _same_words(prediction: str, reference: str) -> float:
    """Whether the words of both are equal, in order."""
    return float(_words(prediction) == _words(reference))


def _word_f1(prediction: str, reference: str) -> float:
    """The F-measure of the words that both have; of two answers without words, 1."""
    ours, theirs = _words(prediction), _words(reference)
    if not (ours and theirs):
        return float(ours == theirs)
    shared = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def _rouge(predictions: Sequence[str], references: References) -> np.ndarray:
    """F-measures of shared words, word pairs and longest common subsequence: [examples, 4].

    rougeLsum takes each line of a summary by itself; of one line it is rougeL. Words are what is
    left of a-z and 0-9, so a text in another script has none and scores 0.
    Source: Lin 2004, as computed by the package rouge_score.
    """
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    scores = [scorer.score_multi(theirs, ours) for ours, theirs in pairs]
    return np.array([[score[name].fmeasure for name in ROUGE] for score in scores])


def _sacrebleu(name: str, kind: str) -> Metric:
    """A metric of sacrebleu over the whole corpus, with its defaults: its class's name is `kind`.

    The statistics are sacrebleu's own: counts of n-grams, of whole numbers, so sums are exact.
    """

    def metric():
        import sacrebleu.metrics

        return getattr(sacrebleu.metrics, kind)()

    def statistics(predictions: Sequence[str], references: References) -> np.ndarray:
        streams = list(itertools.zip_longest(*references))  # None: this example has no more
        return np.array(metric()._extract_corpus_statistics(predictions, streams), float)

    def scores(total: np.ndarray, count: int) -> Sequence[float]:
        return [metric()._compute_score_from_stats(total.tolist()).score]

    def signature(references: int) -> str:
        known = metric()
        known.num_refs = references
        return str(known.get_signature())

    return Metric((name,), statistics, scores, signature)


METRICS: dict[str, Metric] = {
    "rouge": Metric(
        ROUGE, _rouge, _percent, lambda _: "mean F-measure, Porter stemmer, rouge_score"
    ),
    "bleu": _sacrebleu("bleu", "BLEU"),
    "chrf": _sacrebleu("chrf", "CHRF"),
    "exact_match": _best_of("exact_match", _same_words, "words as in SQuAD 2.0, all equal"),
    "f1": _best_of("f1", _word_f1, "words as in SQuAD 2.0, mean F-measure"),
    "accuracy": _best_of("accuracy", _same, "equal but for white space at the ends"),
}
