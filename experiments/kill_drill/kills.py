"""Trials of one process: SIGKILL at random moments and at named points, SIGTERM, bad numbers."""

from __future__ import annotations

import pathlib
import shutil
import signal
import time

from experiments.kill_drill import children, drill, toy

KILLS = 3  # a run
PROMISE = 10.0  # seconds from SIGTERM to the end


def phase(trial: drill.Trial) -> str:
    """What a run was at when it was killed, as its folder tells."""
    folder = trial.workdir / "checkpoints"
    if any(folder.glob("*.orbax-checkpoint-tmp*")):
        return "save"
    return "step" if trial.logged() else "start"


def rest(trial: drill.Trial) -> float:
    """Seconds that a process started now would take, about: half is its start."""
    return trial.expected.seconds * (1 - trial.logged() / toy.STEPS / 2)


def kill(of: drill.Drill, number: int) -> dict:
    """R1: SIGKILL at uniformly random moments, three a run; every fifth run in plain processes,
    one of them with an empty compilation cache; every fourth with saves that block."""
    rng = of.random("kill", number)
    case = drill.Case(toy.STAGES[number % 3])
    trial = drill.Trial(of, case, of.fresh("kill", number))
    plain, blocking = number % 5 == 4, number % 4 == 3
    faults = {"blocking_saves": ()} if blocking and not plain else {}
    trial.record |= {"plain": plain, "blocking": bool(faults), "phases": []}
    while trial.record["faults"] < KILLS:
        cold = plain and trial.record["faults"] == 0
        (child,) = trial.start(plain=plain, cold=cold, faults={} if plain else faults)
        time.sleep(rng.uniform(0, rest(trial) + (6 if plain else 0) + (8 if cold else 0)))
        if drill.killed(child):
            trial.record["phases"].append(phase(trial))
            trial.hurt()
        elif child.wait() == 0:  # too late: the run is whole, and the next one is to be hurt
            trial.account()
            if not trial.judge()["identical"]:
                return trial.judge()
            shutil.rmtree(trial.workdir, ignore_errors=True)
        else:
            return trial.fail(f"it ended with {child.wait()}: {child.said()[-1500:]}")
    return trial.finish(plain=plain)


def points(of: drill.Drill, trial: drill.Trial, record: pathlib.Path) -> list[str]:
    """The changes of the file system that one process of the trial makes, in order."""
    record.unlink(missing_ok=True)
    (child,) = trial.start(faults={"watch": (str(trial.workdir), 0, str(record))})
    if code := child.wait():
        raise drill.Broken(f"watched, it ended with {code}: {child.said()[-1500:]}")
    return record.read_text().splitlines()


def point(of: drill.Drill, number: int) -> dict:
    """R2: SIGKILL right before one change of the file system, in a first process and in the next.

    Every third trial damages the newest checkpoint in between: the next puts it out of the way.
    """
    rng = of.random("point", number)
    trial = drill.Trial(of, drill.Case(toy.STAGES[number % 3]), of.fresh("point", number))
    record = trial.workdir.with_suffix(".points.log")
    known = len(points(of, trial, record))
    shutil.rmtree(trial.workdir)
    record.unlink()
    trial.record["points"] = []
    for last in (rng.randint(1, known), rng.randint(1, 30)):
        watched = {"watch": (str(trial.workdir), last, str(record))}
        (child,) = trial.start(faults=watched)
        code = child.wait()
        if code == -signal.SIGKILL:
            trial.record["points"].append(record.read_text().splitlines()[-1])
            trial.hurt()
        elif code:
            return trial.fail(f"it ended with {code}: {child.said()[-1500:]}")
    return trial.finish()
