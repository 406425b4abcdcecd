"""Which checkpoints to keep: the newest, every n-th step, the best by a held-out metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp

LOWER_IS_BETTER = ("loss", "nats", "text_nats", "bits_per_byte")


def rank_steps(metric: str, metrics: dict[int, dict[str, float]]) -> list[int]:
    """Return the steps that have a held-out metric, best first, ties by step.

    metrics: {step: metrics}. Non-finite values count as missing.
    """
    values = {step: row[metric] for step, row in sorted(metrics.items()) if metric in row}
    values = {step: value for step, value in values.items() if math.isfinite(value)}
    sign = 1 if metric in LOWER_IS_BETTER else -1
    return sorted(values, key=lambda step: sign * values[step])


class KeepBest:
    """Orbax preservation policy that keeps the best step by a held-out metric.

    metrics_of: step -> its metrics, read from the facts of the checkpoint.
    """

    def __init__(self, metric: str, metrics_of: Callable[[int], dict[str, float]]):
        self._metric, self._metrics_of = metric, metrics_of

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Return whether to keep each checkpoint, oldest first."""
        metrics = {info.step: self._metrics_of(info.step) for info in checkpoints}
        best = rank_steps(self._metric, metrics)[:1]
        return [info.step in best for info in checkpoints]


def make_policy(max_to_keep: int, keep_period: int, best: KeepBest | None) -> Any:
    """Keep the newest max_to_keep checkpoints (at least 2: one may be damaged), and those below.

    keep_period: also the steps that it divides; 0: none. best: also the best one; None: none.
    """
    managers = ocp.checkpoint_managers
    policies = [managers.LatestN(max(max_to_keep, 2))]
    policies += [managers.EveryNSteps(keep_period)] if keep_period else []
    policies += [best] if best else []
    return managers.AnyPreservationPolicy(policies)
