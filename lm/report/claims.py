"""A claim: a sentence that figures decide."""

from __future__ import annotations

import dataclasses
import math
import statistics


@dataclasses.dataclass(frozen=True)
class Claim:
    """A comparison of figures[i] with baselines[i], both for seeds[i]."""

    sentence: str
    unit: str
    lower_is_better: bool
    seeds: tuple[int, ...]
    figures: tuple[float, ...]
    baselines: tuple[float, ...]

    @property
    def figure(self) -> float:
        """The mean figure over seeds."""
        return statistics.fmean(self.figures)

    @property
    def baseline(self) -> float:
        """The mean baseline over seeds."""
        return statistics.fmean(self.baselines)

    @property
    def difference(self) -> float:
        """Figure minus baseline."""
        return self.figure - self.baseline

    @property
    def holds(self) -> bool:
        """Whether the mean figure beats the mean baseline; ties and non-finite means do not."""
        return self._beats(self.figure, self.baseline)

    @property
    def num_seeds_held(self) -> int:
        """The number of seeds whose figure beats its baseline."""
        return sum(map(self._beats, self.figures, self.baselines))

    @property
    def verdict(self) -> str:
        """In words: whether the claim holds, and in how many seeds."""
        word = "holds" if self.holds else "does not hold"
        if len(self.seeds) == 1:
            return word
        return f"{word} (in {self.num_seeds_held} of {len(self.seeds)} seeds)"

    def _beats(self, figure: float, baseline: float) -> bool:
        gain = baseline - figure if self.lower_is_better else figure - baseline
        return math.isfinite(gain) and gain > 0
