"""What all trials do: start a case, hurt it, start it again, and compare it with the unbroken one.

A case is a config on a layout; its unbroken run is made once. A trial is one run of a case with
faults; what it found is a dict, a line of kill_drill.jsonl.
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
    """A law that did not hold; its text says which."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: its stage, changes of its config, fake devices of a process, processes, faults that
    belong to it (name, values) and so to its unbroken run too."""

    stage: str = "pretrain"
    changes: tuple[str, ...] = ()
    devices: int = 1
    hosts: int = 1
    faults: tuple[tuple[str, tuple], ...] = ()


@dataclasses.dataclass
class Unbroken:
    """The run that nothing happened to: what it left, and the seconds it took."""

    outcome: outcome.Outcome
    seconds: float


class Drill:
    """A folder of trials, the seed they are drawn from, and the unbroken runs they must equal."""

    def __init__(self, home: pathlib.Path, seed: int):
        self.home, self.seed = home.absolute(), seed
        self._known: dict[Case, Unbroken] = {}
        self._locks: dict[Case, threading.Lock] = {}
        self._lock = threading.Lock()

    def random(self, *address) -> random.Random:
        """A generator for one trial, whatever order trials run in."""
        return random.Random("/".join(map(str, (self.seed, *address))))

    def fresh(self, *name) -> pathlib.Path:
        """An empty place for a run, and for the log beside it."""
        workdir = self.home / "trials" / "_".join(map(str, name))
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.with_suffix(".log").unlink(missing_ok=True)
        workdir.parent.mkdir(parents=True, exist_ok=True)
        return workdir

    def start(self, case: Case, workdir: pathlib.Path, **how) -> list[children.Child]:
        """The processes of a case, one a host. how: of Child, or faults added on host 0."""
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
        """The unbroken run of a case, made at the first call (and what it starts from before).

        It runs twice: the first compiles, the second is timed, and both must be the same.
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
        """All unbroken runs made so far."""
        return dict(self._known)

    def points(self, case: Case) -> list[str]:
        """The changes of the file system that an unbroken run of a case makes, in order."""
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
    """One run of a case with faults: it keeps the record of them."""

    def __init__(self, drill: Drill, case: Case, workdir: pathlib.Path):
        self.drill, self.case, self.workdir = drill, case, workdir
        self.expected = drill.unbroken(case)
        self.record = {"stage": case.stage, "faults": 0, "lost": [], "resume_seconds": []}
        self._logged, self._launched = None, None

    def start(self, **how) -> list[children.Child]:
        """Start the run, or start it again; the processes."""
        self._launched = time.time()
        return self.drill.start(self.case, self.workdir, **how)

    def logged(self) -> int:
        """The last update that the log tells of."""
        kept = [row["step"] for row in outcome.rows(self.workdir) if row["split"] == "train"]
        return max(kept, default=0)

    def resumed(self) -> int | None:
        """The update that the newest process went on from; None where it came not so far."""
        told = outcome.rows(self.workdir, "goodput.jsonl")
        new = [row["step"] for row in told if row["time"] > self._launched]
        return new[0] if new else None

    def account(self) -> None:
        """After a process ended: how it came back from the fault before, if it came so far."""
        new = [row for row in outcome.rows(self.workdir) if row["time"] > self._launched]
        if self._logged is not None and new:
            self.record["lost"].append(max(0, self._logged - self.resumed()))
            self.record["resume_seconds"].append(round(new[0]["time"] - self._launched, 2))
            self._logged = None

    def hurt(self) -> None:
        """After a fault: count it, and remember how far the run was."""
        self.account()
        self.record["faults"] += 1
        self._logged = max(self._logged or 0, self.logged())

    def await_update(self, child: children.Child, step: int) -> None:
        """Wait until the log tells of an update, or the process has ended."""
        deadline = time.monotonic() + children.PATIENCE
        while child.poll() is None and self.logged() < step and time.monotonic() < deadline:
            time.sleep(0.02)

    def finish(self, **how) -> dict:
        """Run again until the end, compare, and clean up what is right; the record."""
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
        """The record, with what differs from the unbroken run; a right run's folder is removed."""
        if self._logged is not None:  # its end was saved before the fault: nothing was left to do
            self.record["lost"].append(toy.STEPS - self._logged)
            self._logged = None
        ours, theirs = outcome.read(self.workdir), self.expected.outcome
        if self.record.get("layouts"):
            ours = outcome.evened(ours, theirs)
        wrong = outcome.differences(ours, theirs)
        return self.fail("; ".join(wrong)) if wrong else self.close()

    def ended_badly(self, child: children.Child) -> dict:
        """The record of a process that ended with a code of its own."""
        return self.fail(f"it ended with {child.poll()}: {child.said()[-1500:]}")

    def fail(self, why: str) -> dict:
        """The record of a broken law; the folder stays."""
        return self.record | {"identical": False, "wrong": why, "kept": self.workdir.name}

    def close(self) -> dict:
        """The record of a trial in which all held."""
        shutil.rmtree(self.workdir, ignore_errors=True)
        for log in self.workdir.parent.glob(f"{self.workdir.name}*.log"):
            log.unlink()
        return self.record | {"identical": True}


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def killed(child: children.Child) -> bool:
    """SIGKILL a process now; whether that, and not its own end, ended it."""
    child.send(signal.SIGKILL)
    return child.wait(30) == -signal.SIGKILL
