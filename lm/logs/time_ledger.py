"""Where the time of a run went: workdir/goodput.jsonl.

A row tells what a session (one process's life) has spent by kind up to now, since its process
started. Seconds go from one kind to the next by `turn`, so that they sum to the wall time.
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
    "start": "the process began: imports, data, first state",
    "compile": "XLA compiled a step",
    "input": "the loop waited for a batch",
    "step": "the devices were at work on updates",
    "decode": "they wrote the student's own answers, to learn from (teacher.on_policy)",
    "save": "the loop waited for a checkpoint",
    "evaluate": "held-out losses",
    "restore": "a checkpoint was read",
    "log": "rows were written",
    "other": "anything else",
}
OUTSIDE = {
    "lost": "updates that were taken again, after a restart or a roll-back, and all around them",
    "down": "no process was at work, or it was killed before it told of its work",
}
USEFUL = ("step", "decode")
REPEATED = ("input", *USEFUL, "save", "evaluate", "log", "other")  # kinds that may be lost


def process_start_time(now: float) -> float:
    """When this process started, in Unix seconds; without Linux's /proc, from its CPU time."""
    try:
        words = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        age = uptime - int(words[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        age = -1.0
    return now - (age if age >= 0 else time.process_time())


class TimeLedger:
    """The account of one session, a context manager: it begins with the process, as "start".

    `turn` says what the time goes to from now on; `row` puts the account on disk. The first row
    tells which update the session goes on from, so that what was lost is known.
    clock: () -> Unix seconds. started: of the process, in the same seconds.
    Only one process of a run may have it. Raises OSError, naming the file, on a full disk.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        clock: Callable[[], float] = time.time,
        started: float | None = None,
    ):
        self._workdir, self._file = storage.as_path(workdir), None
        before = jsonl.read(self._workdir / GOODPUT)[-1:]
        self._clock, now = clock, clock()
        started = process_start_time(now) if started is None else started
        # Two runs of one process share its start; the seconds of the first are its own.
        self._start = min(now, max([started, *(row["time"] for row in before)]))
        self._session = before[0]["session"] + 1 if before else 0
        self._seconds, self._kind, self._since = dict.fromkeys(KINDS, 0.0), "start", self._start
        self._told = dict(self._seconds)  # by the last row
        # The last row's updates; of the run, useful seconds of other sessions, and its first start.
        self._step, self._others, self._first = None, 0.0, self._start

    def __enter__(self) -> TimeLedger:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._file and not isinstance(error, OSError):
            self.write_row(self._step)
        if self._file:
            self._file.close()

    def switch(self, kind: str) -> None:
        """From now on time is of this kind; what has passed is of the former one.

        Raises ValueError for a kind that is none of KINDS.
        """
        lookup.lookup(KINDS, kind, "kind of time")
        now = self._clock()
        self._seconds[self._kind] += now - self._since
        self._kind, self._since = kind, now

    def seconds_since_row(self, kind: str) -> float:
        """Seconds of a kind since the last row, up to the last turn."""
        return self._seconds[kind] - self._told[kind]

    def flush(self) -> None:
        """Have all rows in their place, a bucket's as well."""
        if self._file:
            self._file.flush()

    def write_row(self, step: int) -> float:
        """Put the account on disk, `step` updates being done; of the wall time of the whole run,
        returns the share spent on updates that still count.

        Call it once after the start or restore, at each log point, and after a roll-back.
        """
        self.switch(self._kind)
        seconds = {kind: value for kind, value in self._seconds.items() if value}
        row = {"session": self._session, "step": step, "start": self._start, "time": self._since}
        if self._file is None:  # not before: a run that is refused leaves nothing
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._file = jsonl.JsonlWriter(self._workdir / GOODPUT)
        self._file.add_row(row | {"seconds": seconds})
        self._told = dict(self._seconds)
        if self._step is None or step < self._step:  # something may be lost: count anew
            spent = goodput(self._workdir)
            self._others = spent["goodput"] * spent["wall"] - self._useful()
            self._first = self._since - spent["wall"]
        self._step = step
        return (self._others + self._useful()) / max(self._since - self._first, 1e-9)

    def _useful(self) -> float:
        return sum(self._seconds[kind] for kind in USEFUL)


def goodput(workdir: str | os.PathLike) -> dict:
    """What the wall time of a run went to, from its first session's start to its last row.

    Returns {"wall": seconds, "sessions": their number, "goodput": the share of updates that count,
    "shares": {a key of KINDS or OUTSIDE: share}}; the shares sum to 1. All 0 where there is no row.
    """
    rows = jsonl.read(storage.as_path(workdir) / GOODPUT)
    spent = dict.fromkeys((*KINDS, *OUTSIDE), 0.0)
    # From each row on, the fewest updates that the run goes on from: what is past them is lost.
    least = list(itertools.accumulate((row["step"] for row in reversed(rows)), min))[::-1]
    before = None
    for row, kept in zip(rows, least, strict=True):
        if before is None or row["session"] != before["session"]:
            spent["down"] += row["start"] - before["time"] if before else 0.0
            before = {"step": row["step"], "seconds": {}}
        lost = _lost(before["step"], row["step"], kept)
        for kind, total in row["seconds"].items():
            passed = total - before["seconds"].get(kind, 0.0)
            gone = passed * lost if kind in REPEATED else 0.0
            spent[kind] += passed - gone
            spent["lost"] += gone
        before = row
    wall = sum(spent.values())
    shares = {kind: seconds / wall if wall else 0.0 for kind, seconds in spent.items()}
    good = sum(shares[kind] for kind in USEFUL)
    sessions = len({row["session"] for row in rows})
    return {"wall": wall, "sessions": sessions, "goodput": good, "shares": shares}


def _lost(start: int, stop: int, kept: int) -> float:
    """The share of updates (start, stop] past `kept`; of no update, whether it is past it."""
    if stop <= start:
        return float(start > kept)
    return min(1.0, max(0, stop - kept) / (stop - start))
