"""Lower bounds of the time and cost of a run, from compute and network but not memory traffic.

Source: Williams et al. 2009, "Roofline: an insightful visual performance model",
doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import dataclasses

from lm.preflight import compiler

SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The shortest time of an update, and the time and cost of a whole run at that speed.

    compute_seconds, network_seconds: of an update on each chip; the two overlap. mfu: model FLOPs
    over the peak FLOPs of the chips in that time. cost: in the currency of the price, or None.
    """

    compute_seconds: float
    network_seconds: float
    mfu: float
    tokens_per_day: float
    days: float
    chip_hours: float
    cost: float | None

    @property
    def seconds(self) -> float:
        """Lower bound of the seconds of an update."""
        return max(self.compute_seconds, self.network_seconds)

    @property
    def bound(self) -> str:
        """The slower resource: "compute" or "network"."""
        return "compute" if self.compute_seconds >= self.network_seconds else "network"


def estimate(
    compiled: compiler.Compiled, *, tokens: int = 0, updates: int = 0, price: float | None = None
) -> Estimate:
    """Estimates a run from its compiled update.

    tokens: of an update, over all chips. updates: of the run. price: of a chip for an hour.
    """
    chip, sent = compiled.chip, sum(compiled.collectives.values())
    compute = compiled.executed_flops / compiled.chips / chip.flops
    network = sent / chip.network if sent else 0.0
    seconds = max(compute, network)
    chip_hours = seconds * updates * compiled.chips / 3600
    return Estimate(
        compute_seconds=compute,
        network_seconds=network,
        mfu=compiled.model_flops / (seconds * chip.flops * compiled.chips),
        tokens_per_day=tokens / seconds * SECONDS_PER_DAY,
        days=seconds * updates / SECONDS_PER_DAY,
        chip_hours=chip_hours,
        cost=None if price is None else price * chip_hours,
    )
