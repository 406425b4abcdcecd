"""Predictions and references to scores, in percent, with intervals; and baselines that know little.

table      METRICS: what a metric keeps of each example, and how their sum becomes its scores
scoring    score, intervals, difference (paired), signature; bootstrap and bounds, of any sum
baselines  lead (first words of a text), Retrieval (reply to the most similar history)
"""

from lm.metrics.baselines import Retrieval, lead
from lm.metrics.scoring import (
    bootstrap,
    confidence_intervals,
    difference_intervals,
    percentile_intervals,
    score,
    signature,
)
from lm.metrics.table import METRICS, Metric
