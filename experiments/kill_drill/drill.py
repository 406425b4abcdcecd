"""The steps of a trial: start a case, inject faults, resume, compare with the unbroken run.

A case is a config on a layout; its unbroken run is made once. A trial is one run of a case with
faults; its record is a dict, a line of kill_drill.jsonl.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
import shutil
import signal
import socket
import threading
import time

from experiments.kill_drill import children, outcome, toy
from lm import exits


class Broken(Exception):
    """A violated law; the text says which."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: stage, changes of its config, CPU devices per process, processes, and faults (name,
    arguments) that its unbroken run has too."""

    stage: str = "pretrain"
    changes: tuple[str, ...] = ()
    devices: int = 1
    hosts: int = 1
    faults: tuple[tuple[str, tuple], ...] = ()


@dataclasses.dataclass
class Unbroken:
    """The outcome and the seconds of an uninterrupted run."""

    outcome: outcome.Outcome
    seconds: float


class Drill:
    """A folder of trials, their seed, and the unbroken runs that they must equal."""

    def __init__(self, home: pathlib.Path, seed: int):
        self.home, self.seed = home.absolute(), seed
        self._known: dict[Case, Unbroken] = {}
        self._locks: dict[Case, threading.Lock] = {}
        self._lock = threading.Lock()

    def random(self, *address) -> random.Random:
        """A random generator for one trial, independent of the order of trials."""
        return random.Random("/".join(map(str, (self.seed, *address))))

    def fresh(self, *name) -> pathlib.Path:
        """Returns a path for a run after deleting an earlier run and its log."""
        workdir = self.home / "trials" / "_".join(map(str, name))
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.with_suffix(".log").unlink(missing_ok=True)
        workdir.parent.mkdir(parents=True, exist_ok=True)
        return workdir

    def start(self, case: Case, workdir: pathlib.Path, **how) -> list[children.Child]:
        """Starts a case, a process per host. how: arguments of Child; faults for host 0."""
        arguments = ["train", *toy.flags(self.home, case.stage, case.changes)]
        arguments.append(f"--workdir={workdir}")
        extra = how.pop("faults", {})
        started, port = [], free_port()
        for host in range(case.hosts):
            place = [f"--coordinator=127.0.0.1:{port}", f"--hosts={case.hosts}", f"--host={host}"]
            faults = dict(case.faults) | (extra if host == 0 else {})
            log = workdir.with_suffix(f".{host}.log" if host else ".log")
            flags = arguments + place * (case.hosts > 1)
            started.append(children.Child(flags, log, devices=case.devices, faults=faults, **how))
        return started

    def unbroken(self, case: Case) -> Unbroken:
        """Returns the unbroken run of a case; makes it, and the runs that it starts from, once.

        It runs twice: the first compiles, the second is timed, and both must be equal.
        """
        with self._lock:
            lock = self._locks.setdefault(case, threading.Lock())
        with lock:
            if case not in self._known:
                before = toy.STAGES[: toy.STAGES.index(case.stage)]
                if before:
                    self.unbroken(Case(before[-1]))
                own = case == Case(case.stage)
                again = self.home / "again" / f"{case.stage}_{abs(hash(case))}"
                workdir = toy.unbroken(self.home, case.stage) if own else again.with_suffix(".1")
                made = self._whole(case, workdir)
                second = self._whole(case, again)
                if wrong := outcome.differences(second.outcome, made.outcome):
                    raise Broken(f"two unbroken runs of {case} differ: {wrong}")
                self._known[case] = second
            return self._known[case]

    def known(self) -> dict[Case, Unbroken]:
        """All unbroken runs so far."""
        return dict(self._known)

    def points(self, case: Case) -> list[str]:
        """The changes of the file system by an unbroken run of a case, in order."""
        workdir = self.fresh("points", case.stage)
        record = workdir.with_suffix(".points.log")
        (child,) = self.start(case, workdir, faults={"watch": (str(workdir), 0, str(record))})
        if code := child.wait():
            raise Broken(f"watched, {case} ended with {code}: {child.said()[-1500:]}")
        found = record.read_text().splitlines()
        record.unlink()
        shutil.rmtree(workdir)
        return found

    def _whole(self, case: Case, workdir: pathlib.Path) -> Unbroken:
        shutil.rmtree(workdir, ignore_errors=True)
        start = time.time()
        for child in self.start(case, workdir):
            if (code := child.wait()) != 0:
                raise Broken(f"an unbroken run of {case} ended with {code}: {child.said()[-2000:]}")
        return Unbroken(outcome.read(workdir), time.time() - start)


class Trial:
    """One run of a case with faults, and their record."""

    def __init__(self, drill: Drill, case: Case, workdir: pathlib.Path):
        self.drill, self.case, self.workdir = drill, case, workdir
        self.expected = drill.unbroken(case)
        self.record = {"stage": case.stage, "faults": 0, "lost": [], "resume_seconds": []}
        self._logged, self._launched = None, None

    def start(self, **how) -> list[children.Child]:
        """Starts or resumes the run; returns its processes."""
        self._launched = time.time()
        return self.drill.start(self.case, self.workdir, **how)

    def logged(self) -> int:
        """The last update in the log."""
        kept = [row["step"] for row in outcome.rows(self.workdir) if row["split"] == "train"]
        return max(kept, default=0)

    def resumed(self) -> int | None:
        """The update that the newest process resumed from; None if it has not resumed."""
        told = outcome.rows(self.workdir, "goodput.jsonl")
        new = [row["step"] for row in told if row["time"] > self._launched]
        return new[0] if new else None

    def account(self) -> None:
        """After a process ended: records how it recovered from the previous fault."""
        new = [row for row in outcome.rows(self.workdir) if row["time"] > self._launched]
        if self._logged is not None and new:
            self.record["lost"].append(max(0, self._logged - self.resumed()))
            self.record["resume_seconds"].append(round(new[0]["time"] - self._launched, 2))
            self._logged = None

    def hurt(self) -> None:
        """After a fault: counts it and records the last logged update."""
        self.account()
        self.record["faults"] += 1
        self._logged = max(self._logged or 0, self.logged())

    def await_update(self, child: children.Child, step: int) -> None:
        """Waits until the log has an update, or the process has ended."""
        deadline = time.monotonic() + children.PATIENCE
        while child.poll() is None and self.logged() < step and time.monotonic() < deadline:
            time.sleep(0.02)

    def finish(self, **how) -> dict:
        """Resumes the run until it ends, compares and returns the record; deletes an equal run."""
        for _ in range(4):
            started = self.start(**how)
            codes = [child.wait() for child in started]
            self.account()
            if not any(codes):
                return self.judge()
            if set(codes) - {0, exits.UNFINISHED}:
                break
        said = started[0].said()[-1500:]
        return self.fail(f"run again, it ended with {codes}: {said}")

    def judge(self) -> dict:
        """Compares with the unbroken run and returns the record."""
        if self._logged is not None:  # the run was complete before the fault
            self.record["lost"].append(toy.STEPS - self._logged)
            self._logged = None
        ours, theirs = outcome.read(self.workdir), self.expected.outcome
        if self.record.get("layouts"):
            ours = outcome.evened(ours, theirs)
        wrong = outcome.differences(ours, theirs)
        return self.fail("; ".join(wrong)) if wrong else self.close()

    def ended_badly(self, child: children.Child) -> dict:
        """The record of a process that ended with an unexpected code."""
        return self.fail(f"it ended with {child.poll()}: {child.said()[-1500:]}")

    def fail(self, why: str) -> dict:
        """The record of a violated law; the folder stays."""
        return self.record | {"identical": False, "wrong": why, "kept": self.workdir.name}

    def close(self) -> dict:
        """The record of a trial that passed; deletes its folder and logs."""
        shutil.rmtree(self.workdir, ignore_errors=True)
        for log in self.workdir.parent.glob(f"{self.workdir.name}*.log"):
            log.unlink()
        return self.record | {"identical": True}


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def killed(child: children.Child) -> bool:
    """Sends SIGKILL to a process; returns whether that ended it."""
    child.send(signal.SIGKILL)
    return child.wait(30) == -signal.SIGKILL
