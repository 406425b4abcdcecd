"""Compute a metric, its confidence intervals and its signature."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from lm import lookup
from lm.metrics import table

Texts = Sequence[str]
References = Sequence[str | Sequence[str]]  # a reference for each example, or a list of them
Interval = tuple[float, float]

BOUNDS = (2.5, 97.5)  # percentiles of the draws: a 95 % interval
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s|\n")


def score(metric: str, predictions: Texts, references: References) -> dict[str, float]:
    """Compute the scores of a metric over all examples, in percent: {name: score}.

    Raises ValueError for an unknown metric, for lists that are empty or of different lengths, and
    for an example without a reference.
    """
    functions, statistics = _statistics(metric, predictions, references)
    values = functions.scores(statistics.sum(0), len(statistics))
    return {name: float(value) for name, value in zip(functions.names, values, strict=True)}


def confidence_intervals(
    metric: str, predictions: Texts, references: References, *, draws: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Compute 95 % intervals of `score` by the percentile bootstrap: {name: (low, high)}.

    All metrics of equally many examples use the same draws. Raises ValueError as `score`, and for
    draws below 1. Source: Efron and Tibshirani 1993; Koehn 2004 for translation.
    """
    functions, statistics = _statistics(metric, predictions, references)
    samples = bootstrap(statistics, functions.scores, draws=draws, seed=seed)
    return percentile_intervals(functions.names, samples)


def difference_intervals(
    metric: str,
    predictions: Texts,
    baselines: Texts,
    references: References,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Compute 95 % intervals of the scores of predictions minus those of baselines.

    Both are scored on the same draws of examples. An interval without 0 is a significant
    difference. Raises ValueError as confidence_intervals. Source: Koehn 2004, paired bootstrap.
    """
    functions, statistics = _statistics(metric, predictions, references)
    _, baseline_statistics = _statistics(metric, baselines, references)
    samples = bootstrap(statistics, functions.scores, draws=draws, seed=seed)
    samples -= bootstrap(baseline_statistics, functions.scores, draws=draws, seed=seed)
    return percentile_intervals(functions.names, samples)


def signature(metric: str, references: References = ("",)) -> str:
    """Describe how a metric is computed; bleu and chrf give sacrebleu's own signature.

    references: as in `score`; default: one for each example.
    Raises ValueError for an unknown metric.
    """
    counts = {1 if isinstance(texts, str) else len(texts) for texts in references}
    return _lookup(metric).signature(counts.pop() if len(counts) == 1 else -1)


def bootstrap(
    statistics: np.ndarray,
    scores: Callable[[np.ndarray, int], Sequence[float]],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Compute scores(sum, count) of examples drawn with replacement: float [draws, scores].

    statistics: [examples, statistics]. The draws depend on the seed and the number of examples.
    Raises ValueError for draws below 1.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} gives no interval; use 1 or more.")
    rng, count = np.random.default_rng(seed), len(statistics)
    samples = []
    for _ in range(draws):
        weights = np.bincount(rng.integers(count, size=count), minlength=count)
        samples.append(scores(weights @ statistics, count))
    return np.array(samples)


def percentile_intervals(names: Iterable[str], samples: np.ndarray) -> dict[str, Interval]:
    """Return the 95 % interval of each name from samples [draws, names]."""
    ends = np.percentile(samples, BOUNDS, axis=0).T.tolist()
    return {name: (low, high) for name, (low, high) in zip(names, ends, strict=True)}


def lead(text: str, num_words: int) -> str:
    """Return the lead baseline's summary: the first sentence of a text, at most `num_words`."""
    return " ".join(SENTENCE_END.split(text.strip(), maxsplit=1)[0].split()[:num_words])


def _lookup(metric: str) -> table.Metric:
    return lookup.lookup(table.METRICS, metric, "the task's metric")


def _statistics(
    metric: str, predictions: Texts, references: References
) -> tuple[table.Metric, np.ndarray]:
    """Return a metric's functions, and its statistics: float [examples, statistics]."""
    functions = _lookup(metric)
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} references cannot be scored; "
            f"pass equally many of both, and at least one."
        )
    lists = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    if not all(lists):
        raise ValueError(f"Example {lists.index([])} has no reference; give each at least one.")
    return functions, functions.statistics(predictions, lists)
