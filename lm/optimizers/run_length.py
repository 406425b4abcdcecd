"""How long: "2 percent", "0.5 epochs", "1e9 tokens" or "100 updates", as a number of updates."""

from __future__ import annotations

import dataclasses
import math

from lm import lookup

MOST = 2**31 - 1  # updates; what a step counter holds


@dataclasses.dataclass(frozen=True)
class RunLength:
    """How fast a run reads: updates an epoch takes, tokens an update takes (padding counted)."""

    epoch: float
    tokens: int


UNITS = {  # updates in one of each, of a run of `total` updates at some pace
    "updates": lambda total, pace: 1.0,
    "epochs": lambda total, pace: pace.epoch,
    "tokens": lambda total, pace: 1 / pace.tokens,
    "percent": lambda total, pace: total / 100,
}


def parse(text: str) -> tuple[float, str]:
    """A duration's number and unit. Raises ValueError unless the text is one of each."""
    words = text.split()
    try:
        number = float(words[0]) if len(words) == 2 else math.nan
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(
            f"{text!r} is not one duration, a number above 0 and a unit; write it like "
            f"'2 percent', '0.5 epochs', '1e9 tokens' or '100 updates'."
        )
    lookup.lookup(UNITS, words[1], f"the unit of {text!r}")
    return number, words[1]


def num_updates(text: str, total: int, pace: RunLength) -> int:
    """A duration as the nearest whole number of updates, at least 1.

    total: updates of the whole run, of which percent are; 0 where they are not known yet.
    Raises ValueError for what is no duration, and for percent of a run that has no length.
    """
    number, unit = parse(text)
    if unit == "percent" and not total:
        raise ValueError(f"{text!r} of a run is no length for it; use updates, epochs or tokens.")
    count = number * UNITS[unit](total, pace)
    if count > MOST:
        raise ValueError(f"{text!r} are {count:.3g} updates here; use at most {MOST} updates.")
    return max(1, round(count))
