"""The log of a run: rows of scalars, events, TensorBoard, and progress on the terminal.

`metrics.jsonl` is the source of truth: one row a line, {"step", "split", <scalars>, "time"}, step
in updates, time in Unix seconds. A killed and resumed run has each step in it once. `events.jsonl`
is what happened, {"step", "event", <facts>, "time"}, in the order of time: it only ever grows.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Callable, Mapping

import tqdm

from lm import lookup, metrics, storage
from lm.logs import jsonl, tensorboard

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
SPLITS = {"train": "", "heldout": "held-out "}  # the split and what a printed line calls it

# What a line or bar prints, where a row has it; all else is in the files.
PRINTED = {"loss": "loss {:.4g}", "nats": "nats {:.4g}", "tokens_per_second": "{:,.0f} tok/s"}
SCORES = {name for metric in metrics.METRICS.values() for name in metric.names}  # in percent


class RunLog:
    """The log of one run, kept in its workdir, and its progress to stderr.

    A context manager. total_steps: updates of the whole run. name: the word before the bar.
    resume_step: updates already done; later rows are dropped, and 0 starts the scalars anew.
    clock: () -> Unix seconds. Only one process of a run may have it; the others have Silent.
    On a terminal progress is a bar with an ETA; elsewhere each row written is one plain line.
    Raises OSError, naming the file, where the disk is full.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        total_steps: int,
        *,
        name: str,
        resume_step: int = 0,
        clock: Callable[[], float] = time.time,
    ):
        self._workdir = storage.as_path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._events = jsonl.JsonlWriter(self._workdir / EVENTS)
        self._rows = jsonl.JsonlWriter(self._workdir / METRICS, _until(resume_step))
        self._board = tensorboard.TensorBoardWriter(self._workdir, resume_step)
        self._bar = tqdm.tqdm(
            total=total_steps, initial=resume_step, desc=name, unit="update", disable=None
        )
        self._total, self._step, self._clock, self._shown = total_steps, resume_step, clock, {}
        self._since, self._fresh = (resume_step, clock()), True

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def flush(self) -> None:
        """Have all rows in their place, a bucket's as well."""
        for part in (self._board, self._rows, self._events):
            part.flush()

    def close(self) -> None:
        """Close the files and the bar."""
        for part in (self._bar, self._board, self._rows, self._events):
            part.close()

    def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
        """Log a row: split "train" or "heldout", scalars {name: number}; it is on disk at once.

        Raises ValueError for another split.
        """
        spoken = lookup.lookup(SPLITS, split, "split")
        self._rows.add_row({"step": step, "split": split, **scalars, "time": self._clock()})
        self._board.write(step, split, scalars)
        said = [form.format(float(scalars[k])) for k, form in PRINTED.items() if k in scalars]
        scored = [name for name in scalars if name.rpartition("/")[2] in SCORES]  # task/score
        said += [f"{name} {float(scalars[name]):.4g}" for name in scored]
        if self._bar.disable:
            eta = [f"eta {self._eta(step)}"] if split == "train" else []
            self._say(f"step {step}/{self._total}  " + spoken + "  ".join(said + eta))
        elif split == "heldout" and "nats" in scalars:
            self._shown["held-out"] = f"{float(scalars['nats']):.4g}"

    def event(self, kind: str, step: int, **facts) -> None:
        """Log what happened once: a row of events.jsonl, and a line on the terminal.

        kind: a word or two. step: updates done. facts: JSON values; they are not called "step",
        "event" or "time".
        """
        self._events.add_row({"step": step, "event": kind, **facts, "time": self._clock()})
        self._events.flush()
        told = ", ".join(f"{name} {_short(value)}" for name, value in facts.items())
        self._say(f"step {step}/{self._total}  {kind}{told and ': '}{told}")

    def rewind(self, step: int) -> None:
        """Go back to `step` updates done: later rows are dropped, as on resume; events stay."""
        self._rows.close()
        self._rows = jsonl.JsonlWriter(self._workdir / METRICS, _until(step))
        self._board.forget(step)
        self._bar.update(step - self._step)
        self._step, self._since, self._fresh = step, (step, self._clock()), True

    def advance(self, step: int, scalars: Mapping[str, float] | None = None) -> None:
        """Move the bar to `step` updates done, showing the loss among `scalars` where it is."""
        if scalars and "loss" in scalars:
            self._shown["loss"] = f"{float(scalars['loss']):.4g}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(step - self._step)
        self._step = step

    def _say(self, text: str) -> None:
        text = " ".join(text.split("\n"))
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:  # above the bar
            tqdm.tqdm.write(text, file=sys.stderr)

    def _eta(self, step: int) -> datetime.timedelta | str:
        """Time to the end at the mean rate since the first row, or, for that, since the start."""
        (since, started), now = self._since, self._clock()
        if self._fresh:  # the next row is measured from here on, without the compilation
            self._since, self._fresh = (step, now), False
        if step <= since:
            return "?"
        return datetime.timedelta(
            seconds=round((now - started) / (step - since) * (self._total - step))
        )


def _until(step: int) -> Callable[[dict], bool]:
    """Which rows stay in the log of a run that goes on from `step`."""
    return lambda row: step > 0 and row["step"] <= step


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class NullLog:
    """What the processes that keep no log have in place of Logs and Ledger: it does nothing."""

    def __enter__(self) -> NullLog:
        return self

    def __exit__(self, *exception) -> None:
        """Nothing is open."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
        """Nothing."""

    def event(self, kind: str, step: int, **facts) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def advance(self, step: int, scalars: Mapping[str, float] | None = None) -> None:
        """Nothing."""

    def switch(self, kind: str) -> None:
        """Nothing."""

    def seconds_since_row(self, kind: str) -> float:
        """Nothing is known of seconds."""
        return 0.0

    def write_row(self, step: int) -> float:
        """Nothing is known of the share of time."""
        return 0.0
