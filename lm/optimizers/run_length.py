"""Lengths of training phases: in updates, percent of the run, epochs or tokens."""

from __future__ import annotations

import dataclasses
import math

MAX_UPDATES = 2**31 - 1  # the step counter is an int32


@dataclasses.dataclass(frozen=True)
class RunLength:
    """Updates per epoch, and tokens per update (padding counted)."""

    epoch: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class DurationConfig:
    """The length of a run in epochs or in tokens (padding counted); 0: not set."""

    epochs: float = 0.0
    tokens: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{field.name}={value} is not a length; use a number above 0.")
        if len(self.units) > 1:
            values = " and ".join(f"{unit}={getattr(self, unit)}" for unit in self.units)
            raise ValueError(f"{values} are both set; set one of them, and leave the others 0.")

    def __str__(self) -> str:
        return str({unit: getattr(self, unit) for unit in self.units})

    @property
    def units(self) -> list[str]:
        """The units that are set: none or one."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]

    def num_updates(self, run_length: RunLength, total: int = 0) -> int:
        """Return the length as the nearest number of updates, at least 1; 0 if nothing is set.

        total: updates of the whole run, for a length in percent.
        Raises ValueError if the step counter would overflow.
        """
        per_unit = {"steps": 1, "percent": total / 100}
        per_unit |= {"epochs": run_length.epoch, "tokens": 1 / run_length.tokens}
        for unit in self.units:
            count = getattr(self, unit) * per_unit[unit]
            if count > MAX_UPDATES:
                raise ValueError(
                    f"{unit}={getattr(self, unit)} are {count:.3g} updates; use at most "
                    f"{MAX_UPDATES} updates."
                )
            return max(1, round(count))
        return 0


@dataclasses.dataclass(frozen=True)
class LengthConfig(DurationConfig):
    """The length of a phase of a run: in updates, percent of the run, epochs or tokens."""

    steps: int = 0
    percent: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.steps > MAX_UPDATES:
            raise ValueError(f"steps={self.steps} is too large; use at most {MAX_UPDATES}.")
