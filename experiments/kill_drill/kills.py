"""Trials of one process: SIGKILL at random moments and at named points, SIGTERM, bad numbers."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import signal
import time

import numpy as np

from experiments import damage
from experiments.kill_drill import children, drill, outcome, toy
from lm import exits

KILLS = 3  # per run
PROMISE = 10.0  # most seconds from SIGTERM to the exit
PATIENCE = (
    5  # updates in a row, not finite, after which a run goes back: guard.max_bad_steps's default
)


def phase(trial: drill.Trial) -> str:
    """The phase in which a run was killed, read from its folder."""
    folder = trial.workdir / "checkpoints"
    if any(folder.glob("*.orbax-checkpoint-tmp*")):
        return "save"
    return "step" if trial.resumed() is not None else "start"


def rest(trial: drill.Trial) -> float:
    """Estimated seconds of a process that starts now; half of them are its start."""
    return trial.expected.seconds * (1 - trial.logged() / toy.STEPS / 2)


def kill(of: drill.Drill, number: int) -> dict:
    """SIGKILL three times a run at uniformly random moments; every fifth run in new interpreters,
    the first of them without a compilation cache; every fourth with blocking saves."""
    rng = of.random("kill", number)
    case = drill.Case(toy.STAGES[number % 3])
    trial = drill.Trial(of, case, of.fresh("kill", number))
    plain = number % 5 == 4
    faults = {"blocking_saves": ()} if number % 4 == 3 and not plain else {}
    trial.record |= {"plain": plain, "blocking": bool(faults), "phases": []}
    while trial.record["faults"] < KILLS:
        cold = plain and trial.record["faults"] == 0
        (child,) = trial.start(plain=plain, cold=cold, faults=faults)
        time.sleep(rng.uniform(0, rest(trial) + 6 * plain + 8 * cold))
        if drill.killed(child):
            trial.record["phases"].append(phase(trial))
            trial.hurt()
        elif child.wait() == 0:  # it ended first: check it and kill the next run
            trial.account()
            if not (record := trial.judge())["identical"]:
                return record
        else:
            return trial.ended_badly(child)
    return trial.finish(plain=plain)


def point(of: drill.Drill, number: int) -> dict:
    """SIGKILL right before a change of the file system, in two processes in a row; every third
    time the newest checkpoint is damaged in between, so that it is set aside."""
    rng = of.random("point", number)
    trial = drill.Trial(of, drill.Case(toy.STAGES[number % 3]), of.fresh("point", number))
    record = trial.workdir.with_suffix(".points.log")
    known = len(of.points(trial.case))
    trial.record["points"] = []
    for last in (rng.randint(1, known), rng.randint(1, 40)):
        (child,) = trial.start(faults={"watch": (str(trial.workdir), last, str(record))})
        code = child.wait()
        if code == -signal.SIGKILL:
            trial.record["points"].append(record.read_text().splitlines()[-1])
            trial.hurt()
        elif code:
            return trial.ended_badly(child)
        committed = outcome.steps(trial.workdir)
        if len(committed) > 1 and number % 3 == 2:
            newest = trial.workdir / "checkpoints" / str(committed[0])
            damage.damage(newest, np.random.default_rng(number), "facts", "truncate")
    return trial.finish()


def export(of: drill.Drill, number: int) -> dict:
    """SIGKILL right before a change of the file system by `python -m lm export`: run again, it
    writes the same bytes, or refuses to overwrite a folder that was complete."""
    rng = of.random("export", number)
    of.unbroken(drill.Case())
    place = of.fresh("export", number)
    place.mkdir()
    out = place / "model"
    arguments = ["export", f"--workdir={toy.unbroken(of.home, 'pretrain')}", f"--directory={out}"]
    log, record = place.with_suffix(".log"), place.with_suffix(".points.log")
    child = children.Child(arguments, log, faults={"watch": (str(place), 0, str(record))})
    code, whole = child.wait(), hashes(out)
    known = len(record.read_text().splitlines()) if record.exists() else 0
    shutil.rmtree(out, ignore_errors=True)
    last = rng.randint(1, max(known, 1))
    killed = children.Child(
        arguments, log, faults={"watch": (str(place), last, str(record))}
    ).wait()
    left = 2 if hashes(out) == whole else 0
    again = children.Child(arguments, log).wait()
    right = (code, killed, again) == (0, -signal.SIGKILL, left) and hashes(out) == whole
    made = {"stage": "pretrain", "faults": 1, "lost": [], "resume_seconds": []}
    made |= {"point": last, "identical": right}
    if right:
        shutil.rmtree(place)
        return made
    said = log.read_text()[-1000:]
    return made | {"wrong": f"exit codes {code}, {killed}, {again}: {said}", "kept": place.name}


def hashes(folder: pathlib.Path) -> dict[str, str]:
    """The sha256 of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    return {str(path.relative_to(folder)): digest(path) for path in files}


def term(of: drill.Drill, number: int) -> dict:
    """SIGTERM at a random moment of training: exit 75 within 10 s, with the last update saved."""
    rng = of.random("term", number)
    case = drill.Case(toy.STAGES[number % 3])
    trial = drill.Trial(of, case, of.fresh("term", number))
    trial.record["stop_seconds"] = []
    (child,) = trial.start()
    time.sleep(rng.uniform(0, rest(trial)))
    asked = time.monotonic()
    if not child.send(signal.SIGTERM):
        return trial.finish()
    code = child.wait(3 * PROMISE)
    trial.record["stop_seconds"].append(round(time.monotonic() - asked, 2))
    trial.hurt()
    if code == exits.UNFINISHED and trial.logged():
        stopped = outcome.rows(trial.workdir, "events.jsonl")[-1]
        saved = outcome.steps(trial.workdir)[0]
        if stopped["event"] != "stopped" or stopped["step"] != saved or saved < trial.logged():
            return trial.fail(f"saved {saved}, logged {trial.logged()}, but stopped: {stopped}")
    elif code not in (0, exits.UNFINISHED):
        return trial.fail(f"SIGTERM ended it with {code}: {child.said()[-1000:]}")
    if trial.record["stop_seconds"][-1] > PROMISE:
        return trial.fail(f"it took {trial.record['stop_seconds'][-1]} s to stop")
    record = trial.finish()
    return record if not any(record["lost"]) else trial.fail("updates were lost")


def nan(of: drill.Drill, number: int) -> dict:
    """Batches whose loss is NaN: a few updates are skipped, five in a row cause a roll-back; a
    SIGKILL on the way changes nothing."""
    rng = of.random("nan", number)
    many = (1, 2, PATIENCE)[number % 3]
    first = (9, 14, 22)[number // 3 % 3]  # few programs: each is compiled once
    case = drill.Case(toy.STAGES[number % 3], faults=(("spoilt_batches", (first, many)),))
    trial = drill.Trial(of, case, of.fresh("nan", number))
    skipped = trial.expected.outcome.facts["skipped"]
    trial.record |= {"spoilt": [first, many], "skipped": skipped}
    (child,) = trial.start()
    time.sleep(rng.uniform(0, rest(trial)))
    if drill.killed(child):
        trial.hurt()
    trial.record["faults"] += many
    if skipped != many % PATIENCE:
        return trial.fail(f"{skipped} updates were left out in the unbroken run, not {many}")
    return trial.finish()
