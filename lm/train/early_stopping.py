"""Early stopping: a run ends when its held-out metric has not improved for some evaluations."""

from __future__ import annotations

from collections.abc import Mapping

from lm import checkpoints, runs


class EarlyStopping:
    """Counts evaluations in a row without a better metric.

    metric: of the held-out rows. max_bad_evaluations: this many end the run; 0: never.
    memory: JSON values that travel in checkpoints, to resume from; ignored if of another metric.
    """

    def __init__(self, metric: str, max_bad_evaluations: int, memory: dict | None = None):
        self.metric, self._max_bad = metric, max_bad_evaluations
        if not memory or memory["figure"] != metric:
            memory = {"figure": metric, "best": None, "step": None, "since": 0}
        self.memory = memory

    @classmethod
    def from_facts(cls, run: runs.Run, facts: Mapping) -> EarlyStopping:
        """Resume from the facts of a checkpoint."""
        most, memory = run.early_stopping_patience, facts.get("patience")
        return cls(run.checkpoint.best_metric, most, memory)

    @property
    def is_over(self) -> bool:
        """Whether training ends here."""
        return 0 < self._max_bad <= self.memory["since"]

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count the evaluation after an update; a metric that is not finite is not better."""
        if not self.metric:
            return
        memory = self.memory
        best = {} if memory["best"] is None else {memory["step"]: {self.metric: memory["best"]}}
        if checkpoints.rank_steps(self.metric, best | {step: dict(metrics)})[:1] == [step]:
            self.memory = memory | {"best": metrics[self.metric], "step": step, "since": 0}
        else:
            self.memory = memory | {"since": memory["since"] + 1}

    @property
    def reason(self) -> str:
        """Why the run is over."""
        memory = self.memory
        return (
            f"{memory['since']} evaluations in a row had no better {self.metric} than the "
            f"{memory['best']} of update {memory['step']}"
        )
