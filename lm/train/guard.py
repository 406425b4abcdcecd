"""Which updates were bad, when to go back, when to give up; of numbers alone, on no device."""

from __future__ import annotations

import math
import statistics

from lm import runs

RECENT = 128  # good updates whose losses tell what is usual
ENOUGH = RECENT // 2  # of them, before any loss is a spike
NORMAL = 1.4826  # standard deviations in a median absolute deviation, of a normal distribution
LEAST = 1e-3  # of the median, that a deviation is at least: equal losses make no spike of the next


class Diverged(Exception):
    """Training was given up after guard.max_rollbacks; diverged.json tells why. Exit code 3."""

    code = 3


class Guard:
    """Judges updates in their order; what it remembers is plain JSON and travels in checkpoints.

    config: the section guard of configs/base.py. memory: that of another guard, to go on from.
    """

    def __init__(self, config: runs.GuardConfig, memory: dict | None = None):
        memory = memory or {"recent": [], "row": [], "rollbacks": 0}
        self._patience, self._spike = config.max_bad_steps, config.spike_threshold
        self.allowed, self.rollbacks = config.max_rollbacks, memory["rollbacks"]
        self._recent, self.row = list(memory["recent"]), list(memory["row"])

    @property
    def memory(self) -> dict:
        """All that later judgements depend on."""
        return {"recent": self._recent, "row": self.row, "rollbacks": self.rollbacks}

    @property
    def exhausted(self) -> bool:
        """Whether the last guard.max_bad_steps updates were all bad: time to roll back."""
        return len(self.row) >= self._patience

    def judge(self, step: int, batch: int, loss: float, finite: bool, usual=True) -> dict | None:
        """An account of an update if it was bad, else None: {kind, step, batch, loss, ..}.

        loss: per target token, in nats. kind: skipped (loss or gradient was not finite), or spike:
        a loss more than guard.spike_threshold deviations above the median of the last good ones.
        usual: whether the loss can be compared with others; if not, it is no spike, nor a measure.
        """
        bad = None if finite else {"kind": "skipped"}
        if finite and usual and self._spike and len(self._recent) >= ENOUGH:
            median = statistics.median(self._recent)
            spread = statistics.median(abs(one - median) for one in self._recent)
            deviation = max(NORMAL * spread, LEAST * abs(median))
            if loss > median + self._spike * deviation:
                bad = {"kind": "spike", "median": median, "deviation": deviation}
        if bad is None:
            self._recent, self.row = [*self._recent, *[loss] * usual][-RECENT:], []
            return None
        self.row = [*self.row, bad | {"step": step, "batch": batch, "loss": _said(loss)}]
        return self.row[-1]

    def go_back(self, memory: dict) -> int:
        """Forget what came after that memory, but not how often one went back; how often it was."""
        self._recent, self.row = list(memory["recent"]), list(memory["row"])
        self.rollbacks += 1
        return self.rollbacks


def _said(loss: float) -> float | str:
    """As a log spells it: JSON has no numbers that are not finite."""
    if math.isfinite(loss):
        return loss
    return "NaN" if math.isnan(loss) else "Infinity" if loss > 0 else "-Infinity"
