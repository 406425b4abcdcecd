"""Detecting bad updates (not finite, or a spike of the loss), and when to roll back or give up."""

from __future__ import annotations

import math
import statistics

from lm import exits, runs

WINDOW = 128  # good updates that the next loss is compared with
MIN_WINDOW = WINDOW // 2  # of them, before any loss counts as a spike
MAD_TO_STD = 1.4826  # standard deviations per median absolute deviation of a normal distribution
MIN_DEVIATION = 1e-3  # of the median: after equal losses, not every larger loss is a spike


class Diverged(Exception):
    """Training was given up after guard.max_rollbacks; diverged.json has the details."""

    code = exits.DIVERGED


class Guard:
    """Finds bad updates, given all updates in order.

    config: the section guard of configs/base.py. memory: JSON values that travel in checkpoints,
    to resume from.
    """

    def __init__(self, config: runs.GuardConfig, memory: dict | None = None):
        memory = memory or {"recent": [], "row": [], "rollbacks": 0}
        self._config, self.num_rollbacks = config, memory["rollbacks"]
        self._recent, self.bad_streak = list(memory["recent"]), list(memory["row"])

    @property
    def memory(self) -> dict:
        """All that later checks depend on."""
        return {"recent": self._recent, "row": self.bad_streak, "rollbacks": self.num_rollbacks}

    @property
    def should_roll_back(self) -> bool:
        """Whether the last guard.max_bad_steps updates were all bad."""
        return len(self.bad_streak) >= self._config.max_bad_steps

    def check(
        self, step: int, batch: int, loss: float, is_finite: bool, is_comparable: bool = True
    ) -> dict | None:
        """Describe an update if it was bad, else None: {kind, step, batch, loss, ..}.

        loss: nats per target token. is_finite: whether loss and gradient are; if not, the update
        was "skipped". is_comparable: whether the loss can be compared with others; if so, a "spike"
        is guard.spike_threshold deviations above the median of the last good losses.
        """
        bad = None if is_finite else {"kind": "skipped"}
        threshold = self._config.spike_threshold
        if is_finite and is_comparable and threshold and len(self._recent) >= MIN_WINDOW:
            median = statistics.median(self._recent)
            spread = statistics.median(abs(recent - median) for recent in self._recent)
            deviation = max(MAD_TO_STD * spread, MIN_DEVIATION * abs(median))
            if loss > median + threshold * deviation:
                bad = {"kind": "spike", "median": median, "deviation": deviation}
        if bad is None:
            self._recent = [*self._recent, *[loss] * is_comparable][-WINDOW:]
            self.bad_streak = []
            return None
        if not math.isfinite(loss):  # JSON has no such numbers; named as in the logs
            loss = "NaN" if math.isnan(loss) else "Infinity" if loss > 0 else "-Infinity"
        bad |= {"step": step, "batch": batch, "loss": loss}
        self.bad_streak = [*self.bad_streak, bad]
        return bad

    def roll_back(self, memory: dict) -> int:
        """Go back to an earlier memory; returns the number of rollbacks, which is not reset."""
        self._recent, self.bad_streak = list(memory["recent"]), list(memory["row"])
        self.num_rollbacks += 1
        return self.num_rollbacks
