"""Scores of predictions against references, in percent, with confidence intervals.

table      METRICS: the statistics of each example, and the scores of their sum
scoring    score, confidence and difference intervals, signature, bootstrap
baselines  lead: the first words of a text as its summary
"""

from lm.metrics.baselines import lead
from lm.metrics.scoring import (
    bootstrap,
    confidence_intervals,
    difference_intervals,
    percentile_intervals,
    score,
    signature,
)
from lm.metrics.table import METRICS, Metric
