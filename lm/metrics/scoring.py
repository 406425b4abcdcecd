"""A metric by its word: its scores, how sure they are, and how they were computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lm import lookup
from lm.metrics import table

Texts = Sequence[str]
References = Sequence[str | Sequence[str]]  # an example has one reference, or a list of them
Interval = tuple[float, float]

BOUNDS = (2.5, 97.5)  # percent of the draws below: a 95 % interval


def score(word: str, predictions: Texts, references: References) -> dict[str, float]:
    """The scores of a metric of METRICS over all examples, in percent: {name: score}.

    Raises ValueError for an unknown word, for lists that are empty or of unequal length, and for
    an example without a reference.
    """
    metric, statistics = _statistics(word, predictions, references)
    values = metric.scores(statistics.sum(0), len(statistics))
    return {name: float(value) for name, value in zip(metric.names, values, strict=True)}


def confidence_intervals(
    word: str, predictions: Texts, references: References, *, draws: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """95 % intervals of score() by the percentile bootstrap over examples: {name: (low, high)}.

    All names, and all metrics of as many examples, see the same draws.
    Raises ValueError as score() does, and for draws below 1.
    Source: Efron and Tibshirani 1993; Koehn 2004 for translation.
    """
    return percentile_intervals(
        _metric(word).names, _resampled(word, predictions, references, draws, seed)
    )


def difference_intervals(
    word: str,
    ours: Texts,
    theirs: Texts,
    references: References,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """95 % intervals of our score less theirs, on the same draws of the same examples.

    An interval without 0 says that one system is better than the other.
    Raises ValueError as intervals() does. Source: Koehn 2004, paired bootstrap.
    """
    mine, yours = (_resampled(word, said, references, draws, seed) for said in (ours, theirs))
    return percentile_intervals(_metric(word).names, mine - yours)


def signature(word: str, references: References = ("",)) -> str:
    """How a metric is computed; for bleu and chrf, sacrebleu's own signature.

    references: those of score(); without them, one an example is taken.
    Raises ValueError for an unknown word.
    """
    counts = {1 if isinstance(one, str) else len(one) for one in references}
    return _metric(word).signature(counts.pop() if len(counts) == 1 else -1)


def bootstrap(
    each: np.ndarray,
    scores: Callable[[np.ndarray, int], Sequence[float]],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """What scores(sum, count) gives of each draw of as many examples: float [draws, scores].

    each: [examples, statistics], of which examples are drawn with replacement; the draws are a
    function of the seed and of how many examples there are.
    Raises ValueError for draws below 1.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} gives no interval; use 1 or more.")
    rng, count = np.random.default_rng(seed), len(each)
    drawn = []
    for _ in range(draws):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        drawn.append(scores(times @ each, count))
    return np.array(drawn)


def percentile_intervals(names: Iterable[str], drawn: np.ndarray) -> dict[str, Interval]:
    """The 95 % interval of each name, of scores [draws, names]."""
    ends = np.percentile(drawn, BOUNDS, axis=0).T.tolist()
    return {name: (low, high) for name, (low, high) in zip(names, ends, strict=True)}


def _metric(word: str) -> table.Metric:
    """The metric of this word, or an error that lists the words."""
    return lookup.lookup(table.METRICS, word, "the task's metric")


def _statistics(
    word: str, predictions: Texts, references: References
) -> tuple[table.Metric, np.ndarray]:
    """A metric and what it keeps of each example: float [examples, statistics]."""
    metric = _metric(word)
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references cannot be scored; "
            f"give as many of one as of the other, and at least one."
        )
    lists = [[one] if isinstance(one, str) else list(one) for one in references]
    if not all(lists):
        raise ValueError(f"Example {lists.index([])} has no reference; give each at least one.")
    return metric, metric.statistics(predictions, lists)


def _resampled(
    word: str, predictions: Texts, references: References, draws: int, seed: int
) -> np.ndarray:
    """The scores of each draw of as many examples, with replacement: float [draws, names]."""
    metric, statistics = _statistics(word, predictions, references)
    return bootstrap(statistics, metric.scores, draws=draws, seed=seed)
