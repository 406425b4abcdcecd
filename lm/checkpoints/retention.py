"""Which checkpoints stay: the newest, those at multiples of a number, the best by a figure."""

from __future__ import annotations

import math
from collections.abc import Callable

import orbax.checkpoint as ocp

LOWER = ("loss", "nats", "text_nats", "bits_per_byte")  # of all others the highest is best


def rank_steps(figure: str, figures: dict[int, dict[str, float]]) -> list[int]:
    """The steps that have a held-out figure, the best first, of equal ones the earliest.

    figures: {step: figures of that step}. A figure that is not finite counts as none.
    """
    known = {step: had[figure] for step, had in sorted(figures.items()) if figure in had}
    known = {step: value for step, value in known.items() if math.isfinite(value)}
    sign = 1 if figure in LOWER else -1
    return sorted(known, key=lambda step: sign * known[step])


class KeepBest:
    """Orbax's preservation policy that keeps the best step by a held-out figure.

    figures_of: step -> its figures, read from its own facts, so that it survives a restart.
    """

    def __init__(self, figure: str, figures_of: Callable[[int], dict[str, float]]):
        self._figure, self._figures_of = figure, figures_of

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """One answer a checkpoint, oldest first."""
        figures = {info.step: self._figures_of(info.step) for info in checkpoints}
        best = rank_steps(self._figure, figures)[:1]
        return [info.step in best for info in checkpoints]


def make_policy(keep: int, keep_every: int, best: KeepBest | None):
    """Orbax's policy of them all; at least the newest two stay, for one may be damaged."""
    managers = ocp.checkpoint_managers
    rules = [managers.LatestN(max(keep, 2))]
    rules += [managers.EveryNSteps(keep_every)] if keep_every else []
    rules += [best] if best else []
    return managers.AnyPreservationPolicy(rules)
