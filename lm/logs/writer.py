"""The log of a run: rows of scalars, events, TensorBoard, and progress on the terminal.

`metrics.jsonl` has rows of {"step", "split", <scalars>, "time"}, step in updates, time in Unix
seconds; a resumed run has each step once. `events.jsonl` has rows of {"step", "event", <facts>,
"time"} in order of time, and is never rewritten.
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
SPLITS = {"train": "", "heldout": "held-out "}  # split: its name in a printed line

# The scalars that a printed line has; the files have all of them.
PRINTED = {"loss": "loss {:.4g}", "nats": "nats {:.4g}", "tokens_per_second": "{:,.0f} tok/s"}
SCORES = {name for metric in metrics.METRICS.values() for name in metric.names}  # in percent


class RunLog:
    """Writes the log of one run to its workdir, and its progress to stderr; a context manager.

    total_steps: updates of the whole run. name: printed before the bar. resume_step: updates
    already done; rows of later updates are dropped. clock: () -> Unix seconds.
    A terminal shows a bar with an ETA; otherwise each row is printed as one line.
    Only one process of a run may have a RunLog; the others have a NullLog.
    Raises OSError, naming the file, on a full disk.
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
        self._rows = jsonl.JsonlWriter(self._workdir / METRICS, _keep_until(resume_step))
        self._board = tensorboard.TensorBoardWriter(self._workdir, resume_step)
        self._bar = tqdm.tqdm(
            total=total_steps, initial=resume_step, desc=name, unit="update", disable=None
        )
        self._total, self._step, self._clock, self._shown = total_steps, resume_step, clock, {}
        self._eta_start, self._is_compiling = (resume_step, clock()), True

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def flush(self) -> None:
        """Upload what gs:// files have buffered."""
        for file in (self._board, self._rows, self._events):
            file.flush()

    def close(self) -> None:
        """Close the files and the bar."""
        for file in (self._bar, self._board, self._rows, self._events):
            file.close()

    def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
        """Write and print a row of scalars. Raises ValueError if split is not in SPLITS."""
        prefix = lookup.lookup(SPLITS, split, "split")
        self._rows.add_row({"step": step, "split": split, **scalars, "time": self._clock()})
        self._board.write(step, split, scalars)
        words = [form.format(float(scalars[k])) for k, form in PRINTED.items() if k in scalars]
        scores = [name for name in scalars if name.rpartition("/")[2] in SCORES]  # task/score
        words += [f"{name} {float(scalars[name]):.4g}" for name in scores]
        if self._bar.disable:
            eta = [f"eta {self._eta(step)}"] if split == "train" else []
            self._print(f"step {step}/{self._total}  " + prefix + "  ".join(words + eta))
        elif split == "heldout" and "nats" in scalars:
            self._shown["held-out"] = f"{float(scalars['nats']):.4g}"

    def event(self, kind: str, step: int, **facts) -> None:
        """Write an event after `step` updates to events.jsonl, and print it.

        facts: JSON values by names other than "step", "event" and "time".
        """
        self._events.add_row({"step": step, "event": kind, **facts, "time": self._clock()})
        self._events.flush()
        shorten = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
        details = ", ".join(f"{name} {shorten(value)}" for name, value in facts.items())
        self._print(f"step {step}/{self._total}  {kind}{details and ': '}{details}")

    def rewind(self, step: int) -> None:
        """Go back to `step` updates: drop the rows of later updates, but no events."""
        self._rows.close()
        self._rows = jsonl.JsonlWriter(self._workdir / METRICS, _keep_until(step))
        self._board.drop_after(step)
        self._bar.update(step - self._step)
        self._step, self._eta_start, self._is_compiling = step, (step, self._clock()), True

    def advance(self, step: int, scalars: Mapping[str, float] | None = None) -> None:
        """Move the bar to `step` updates; it shows the loss in `scalars`, if any."""
        if scalars and "loss" in scalars:
            self._shown["loss"] = f"{float(scalars['loss']):.4g}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(step - self._step)
        self._step = step

    def _print(self, text: str) -> None:
        text = " ".join(text.split("\n"))
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:  # above the bar
            tqdm.tqdm.write(text, file=sys.stderr)

    def _eta(self, step: int) -> datetime.timedelta | str:
        """Return the time left at the mean rate since the first row, or since the start."""
        (start_step, start_time), now = self._eta_start, self._clock()
        if self._is_compiling:  # later rows exclude the compilation
            self._eta_start, self._is_compiling = (step, now), False
        if step <= start_step:
            return "?"
        seconds_per_step = (now - start_time) / (step - start_step)
        return datetime.timedelta(seconds=round(seconds_per_step * (self._total - step)))


def _keep_until(step: int) -> Callable[[dict], bool]:
    return lambda row: step > 0 and row["step"] <= step


class NullLog:
    """Replaces RunLog and TimeLedger on hosts that write no logs; its methods do nothing."""

    def __enter__(self) -> NullLog:
        return self

    def __exit__(self, *exception) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., float]:
        return lambda *args, **kwargs: 0.0
