"""workdir/goodput.jsonl: how a run spent its wall time.

A session is the lifetime of one process. Each row has the seconds that its session has spent on
each kind of work since the process started; they sum to the wall time.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import time
from collections.abc import Callable

from lm import lookup, storage
from lm.logs import jsonl

GOODPUT = "goodput.jsonl"
KINDS = {
    "start": "starting the process: imports, data, first state",
    "compile": "compiling a step",
    "input": "waiting for a batch",
    "step": "updates on the devices",
    "decode": "generating answers of the student (teacher.on_policy)",
    "save": "waiting for a checkpoint",
    "evaluate": "held-out losses and scores",
    "restore": "reading a checkpoint",
    "log": "writing rows",
    "other": "anything else",
}
OUTSIDE = {
    "lost": "updates repeated after a restart or a roll-back, with the time around them",
    "down": "no process was running, or it was killed before its next row",
}
USEFUL = ("step", "decode")
REPEATED = ("input", *USEFUL, "save", "evaluate", "log", "other")  # kinds that can become "lost"


def process_start_time(now: float) -> float:
    """Return the start of this process in Unix seconds, estimated by CPU time without /proc."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        age = uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        age = -1.0
    return now - (age if age >= 0 else time.process_time())


class TimeLedger:
    """Records how one session spends its time; a context manager.

    `switch` sets the current kind of work; `write_row` writes the seconds so far. The first row has
    the update that the session resumes from: later updates of earlier sessions are lost.
    clock: () -> Unix seconds. started: the start of the process on that clock.
    Only one process of a run may have a ledger. Raises OSError, naming the file, on a full disk.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        clock: Callable[[], float] = time.time,
        started: float | None = None,
    ):
        self._workdir, self._file = storage.as_path(workdir), None
        last_row = jsonl.read(self._workdir / GOODPUT)[-1:]
        self._clock, now = clock, clock()
        started = process_start_time(now) if started is None else started
        # If one process does two runs, the time since its start belongs to the first.
        self._start = min(now, max([started, *(row["time"] for row in last_row)]))
        self._session = last_row[0]["session"] + 1 if last_row else 0
        self._seconds, self._kind, self._since = dict.fromkeys(KINDS, 0.0), "start", self._start
        self._written = dict(self._seconds)  # the seconds in the last row
        # Update of the last row; useful seconds of other sessions; start of the first session.
        self._step, self._others, self._first = None, 0.0, self._start

    def __enter__(self) -> TimeLedger:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._step is not None and not isinstance(error, OSError):
            self.write_row(self._step)
        if self._file:
            self._file.close()

    def switch(self, kind: str) -> None:
        """Count time from now on as `kind`. Raises ValueError if it is not in KINDS."""
        lookup.lookup(KINDS, kind, "kind of time")
        now = self._clock()
        self._seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def seconds_since_row(self, kind: str) -> float:
        """Return the seconds spent on a kind between the last row and the last `switch`."""
        return self._seconds[kind] - self._written[kind]

    def flush(self) -> None:
        """Upload the rows that a gs:// file has buffered."""
        if self._file:
            self._file.flush()

    def write_row(self, step: int) -> float:
        """Write a row after `step` updates; returns the goodput of the run so far.

        Goodput is the share of the wall time spent on updates that were not lost. Call this after
        the start or restore, at each log point, and after a roll-back.
        """
        self.switch(self._kind)
        seconds = {kind: value for kind, value in self._seconds.items() if value}
        row = {"session": self._session, "step": step, "start": self._start, "time": self._since}
        if self._file is None:  # opened late: a rejected run leaves no file
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._file = jsonl.JsonlWriter(self._workdir / GOODPUT)
        self._file.add_row(row | {"seconds": seconds})
        self._written = dict(self._seconds)
        if self._step is None or step < self._step:  # updates may be lost: count again
            total = goodput(self._workdir)
            self._others = total["goodput"] * total["wall"] - self._useful()
            self._first = self._since - total["wall"]
        self._step = step
        return (self._others + self._useful()) / max(self._since - self._first, 1e-9)

    def _useful(self) -> float:
        return sum(self._seconds[kind] for kind in USEFUL)


def goodput(workdir: str | os.PathLike) -> dict:
    """Sum up the wall time of a run, from the start of its first session to its last row.

    Returns {"wall": seconds, "sessions": count, "goodput": share of time in updates that were not
    lost, "shares": {key of KINDS or OUTSIDE: share}}; the shares sum to 1, or are 0 without rows.
    """
    rows = jsonl.read(storage.as_path(workdir) / GOODPUT)
    spent = dict.fromkeys((*KINDS, *OUTSIDE), 0.0)
    # For each row, the lowest update that a later row resumes from: updates past it are lost.
    counted = list(itertools.accumulate((row["step"] for row in reversed(rows)), min))[::-1]
    previous = None
    for row, last_counted in zip(rows, counted, strict=True):
        if previous is None or row["session"] != previous["session"]:
            spent["down"] += row["start"] - previous["time"] if previous else 0.0
            previous = {"step": row["step"], "seconds": {}}
        lost_share = _lost_share(previous["step"], row["step"], last_counted)
        for kind, total in row["seconds"].items():
            seconds = total - previous["seconds"].get(kind, 0.0)
            lost = seconds * lost_share if kind in REPEATED else 0.0
            spent[kind] += seconds - lost
            spent["lost"] += lost
        previous = row
    wall = sum(spent.values())
    shares = {kind: seconds / wall if wall else 0.0 for kind, seconds in spent.items()}
    useful = sum(shares[kind] for kind in USEFUL)
    sessions = len({row["session"] for row in rows})
    return {"wall": wall, "sessions": sessions, "goodput": useful, "shares": shares}


def _lost_share(start: int, stop: int, last_counted: int) -> float:
    """Return the fraction of updates start+1..stop that are after `last_counted`.

    For an empty range, 1 if `start` is after `last_counted`, else 0.
    """
    if stop <= start:
        return float(start > last_counted)
    return min(1.0, max(0, stop - last_counted) / (stop - start))
