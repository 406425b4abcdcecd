"""Seconds of a step at best, and what a whole run takes, from the numbers of a program and a chip.

Pure functions of numbers. Source: Williams et al. 2009, "Roofline: an insightful visual
performance model", doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import dataclasses

from lm.preflight import slices

DAY = 86_400  # seconds


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds that one step takes of each resource of a chip, were it never waiting.

    alone_s: of memory_s the part in instructions without a matrix product. A chip runs one
    instruction after the other, so this part no product hides.
    """

    compute_s: float
    memory_s: float
    network_s: float
    alone_s: float = 0.0

    @property
    def step_s(self) -> float:
        """Seconds of a step at best: products and their memory overlap, and all with the network.

        A bound from below: a real step is no faster, and slower by what does not overlap.
        """
        return max(max(self.compute_s, self.memory_s - self.alone_s) + self.alone_s, self.network_s)

    @property
    def bound(self) -> str:
        """What the step waits for most: "compute", "memory" or "network"."""
        shares = {"compute": self.compute_s, "memory": self.memory_s, "network": self.network_s}
        return max(shares, key=shares.get)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a whole run takes at best; mfu: model FLOPs over what the chips could do meanwhile.

    cost is in the price's currency, None without a price.
    """

    step_s: float
    mfu: float
    tokens_per_day: float
    days: float
    chip_hours: float
    cost: float | None


def predict(
    chip: slices.Chip, *, flops: float, memory_bytes: float, network: float, alone: float = 0.0
) -> Prediction:
    """The seconds of a step from what one chip does in it.

    flops: executed, recomputation counted. memory_bytes: to and from its memory; alone: of these,
    those that no matrix product hides. network: bytes that it sends to other chips.
    """
    return Prediction(
        compute_s=flops / chip.flops,
        memory_s=memory_bytes / chip.bandwidth,
        network_s=network / chip.network if network else 0.0,
        alone_s=alone / chip.bandwidth,
    )


def plan(
    prediction: Prediction,
    chip: slices.Chip,
    *,
    chips: int,
    model_flops: float,
    tokens: float,
    updates: int,
    price: float | None = None,
) -> Plan:
    """What a run of so many updates takes.

    model_flops, tokens: of one update, over all chips. price: of one chip for an hour.
    """
    seconds = prediction.step_s
    hours = seconds * updates * chips / 3600
    return Plan(
        step_s=seconds,
        mfu=model_flops / (seconds * chip.flops * chips),
        tokens_per_day=tokens / seconds * DAY,
        days=seconds * updates / DAY,
        chip_hours=hours,
        cost=None if price is None else price * hours,
    )
