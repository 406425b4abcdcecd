"""Scores of predictions against references, in percent, with confidence intervals.

table    METRICS: the statistics of each example, and the scores of their sum
scoring  score, confidence and difference intervals, signature, bootstrap, lead baseline
"""

from lm.metrics.scoring import (
    bootstrap,
    confidence_intervals,
    difference_intervals,
    lead,
    percentile_intervals,
    score,
    signature,
)
from lm.metrics.table import METRICS, Metric
