"""When a run has learnt what it will: its best held-out figure is too long ago."""

from __future__ import annotations

from lm import checkpoints, runs


class EarlyStopping:
    """Counts evaluations in a row without a better figure; plain JSON that travels in checkpoints.

    figure: checkpoint.best_metric. most: early_stopping_patience, so many end the run; 0: none do.
    memory: that
    of another one, to go on from; where it is of another figure, it counts for nothing.
    """

    def __init__(self, figure: str, most: int, memory: dict | None = None):
        self.figure, self._most = figure, most
        if not memory or memory["figure"] != figure:
            memory = {"figure": figure, "best": None, "step": None, "since": 0}
        self.memory = memory

    @classmethod
    def of(cls, run: runs.Run, facts: dict) -> EarlyStopping:
        """That of a run that goes on from a checkpoint with these facts."""
        return cls(run.checkpoint.best_metric, run.early_stopping_patience, facts.get("patience"))

    @property
    def over(self) -> bool:
        """Whether training ends here."""
        return 0 < self._most <= self.memory["since"]

    def judge(self, step: int, figures: dict[str, float]) -> None:
        """The held-out figures after an update; one that is not finite is no better one."""
        if not self.figure:
            return
        memory = self.memory
        had = {} if memory["best"] is None else {memory["step"]: {self.figure: memory["best"]}}
        best = checkpoints.rank_steps(self.figure, had | {step: figures})[:1]
        if best == [step]:
            self.memory = memory | {"best": figures[self.figure], "step": step, "since": 0}
        else:
            self.memory = memory | {"since": memory["since"] + 1}

    @property
    def account(self) -> str:
        """Why it is over, in words."""
        memory = self.memory
        return (
            f"{memory['since']} evaluations in a row had no better {self.figure} than the "
            f"{memory['best']} of update {memory['step']}"
        )

    def ended(self, step: int) -> str:
        """What `train` says of a run that is over."""
        return (
            f"training ended early after update {step}, for {self.account}; raise "
            f"early_stopping_patience (or "
            f"set it to 0) to go on."
        )
