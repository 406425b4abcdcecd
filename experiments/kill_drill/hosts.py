"""Trials of two processes that train one run, and of runs continued on other layouts."""

from __future__ import annotations

import dataclasses
import signal
import time

from experiments.kill_drill import children, drill, outcome, toy
from lm import exits

PAIR = drill.Case("pretrain", hosts=2)
HANG = 12  # guard.hang_timeout_seconds of runs that are to hang, in seconds
MINUTE = 60.0


def at_work(trial: drill.Trial, rng, **how) -> list[children.Child]:
    """Both processes, at a random moment of their updates."""
    pair = trial.start(**how)
    trial.await_update(pair[0], rng.randint(1, toy.STEPS - toy.SAVE))
    time.sleep(rng.uniform(0, 0.05))
    return pair


def ended(trial: drill.Trial, pair, seconds: float) -> list[int | None]:
    """The exit codes of both within so many seconds; who still runs is killed, and has None."""
    deadline = time.monotonic() + seconds
    codes = [child.wait(max(0.0, deadline - time.monotonic())) for child in pair]
    for child in pair:
        child.end()
    return codes


def host(of: drill.Drill, number: int) -> dict:
    """SIGKILL one of two processes: the other ends with a sentence and 75 within a minute."""
    return lost(of, number, "host", signal.SIGKILL)


def stop(of: drill.Drill, number: int) -> dict:
    """SIGSTOP one of two processes: the other ends with a sentence and 75 within a minute."""
    return lost(of, number, "stop", signal.SIGSTOP)


def lost(of: drill.Drill, number: int, name: str, what: int) -> dict:
    """A process of two is gone: what must hold of the other, and of both run again."""
    rng = of.random(name, number)
    trial = drill.Trial(of, PAIR, of.fresh(name, number))
    pair = at_work(trial, rng)
    gone = number % 2
    asked, gone_at_work = time.monotonic(), pair[gone].send(what)
    code = pair[1 - gone].wait(MINUTE + 30)
    seconds = round(time.monotonic() - asked, 2)
    ended(trial, pair, 0)
    trial.record |= {"stop_seconds": [seconds], "gone": gone}
    if not gone_at_work:
        return trial.finish()
    trial.hurt()
    sentences = [line for line in pair[1 - gone].said().splitlines() if line.startswith("lm: ")]
    if code == 0 and trial.logged() == toy.STEPS:  # it was done before the other was missed
        return trial.finish()
    if code != exits.UNFINISHED or not sentences or seconds > MINUTE:
        said = pair[1 - gone].said()[-1000:]
        return trial.fail(f"after {seconds} s the other ended with {code}: {said}")
    return trial.finish()


def host_term(of: drill.Drill, number: int) -> dict:
    """SIGTERM to one of two processes: both save the same update and exit 75 within 15 s."""
    trial = drill.Trial(of, PAIR, of.fresh("host_term", number))
    pair = at_work(trial, of.random("host_term", number))
    asked = time.monotonic()
    pair[number % 2].send(signal.SIGTERM)
    codes = ended(trial, pair, MINUTE)
    trial.record["stop_seconds"] = [round(time.monotonic() - asked, 2)]
    trial.hurt()
    if codes == [0, 0]:
        return trial.finish()
    if codes != [exits.UNFINISHED] * 2 or trial.record["stop_seconds"][0] > 15:
        said = "".join(child.said()[-1000:] for child in pair)
        return trial.fail(f"they ended with {codes}, {trial.record['stop_seconds']} s: {said}")
    if outcome.steps(trial.workdir)[0] < trial.logged():
        return trial.fail("the last update was not saved")
    record = trial.finish()
    return record if not any(record["lost"]) else trial.fail("updates were lost")


def stall(of: drill.Drill, number: int) -> dict:
    """A batch never comes: the watchdog writes where all threads stand, and ends it with 75."""
    changes = (f"guard.hang_timeout_seconds={HANG}",)
    case = drill.Case(toy.STAGES[number % 3], changes)
    trial = drill.Trial(of, case, of.fresh("stall", number))
    index = of.random("stall", number).randint(1, toy.STEPS - 1)
    (child,) = trial.start(faults={"stalled_batches": (index,)})
    code = child.wait()
    trial.hurt()
    stacks = trial.workdir / "stacks.txt"
    told = stacks.read_text() if stacks.exists() else ""
    if code != exits.UNFINISHED or f"update {index + 1}" not in told or "stalled" not in told:
        return trial.fail(f"it ended with {code}: {child.said()[-1000:]}")
    return trial.finish()


LAYOUTS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2))  # devices a process, processes
FIXED = ("parallel.reduction=fixed", "parallel.reduction_shards=8")


def topology(of: drill.Drill, number: int) -> dict:
    """Stopped twice and continued on other numbers of devices and processes, with
    parallel.reduction=fixed: the bits are those of one device (held-out figures to 1e-5)."""
    rng = of.random("topology", number)
    alone = drill.Case(toy.STAGES[number % 3], FIXED)
    trial = drill.Trial(of, alone, of.fresh("topology", number))
    walk = [LAYOUTS[number % len(LAYOUTS)], *rng.sample(LAYOUTS, 2)]
    trial.record["layouts"] = walk
    for devices, hosts in walk[:-1]:
        trial.case = dataclasses.replace(alone, devices=devices, hosts=hosts)
        started = trial.start()
        before = trial.logged()
        trial.await_update(started[0], min(before + rng.randint(2, 8), toy.STEPS))
        started[0].send(signal.SIGTERM)
        codes = ended(trial, started, children.PATIENCE)
        trial.hurt()
        if set(codes) - {0, exits.UNFINISHED}:
            said = "".join(child.said()[-1000:] for child in started)
            return trial.fail(f"on {devices} x {hosts} it ended with {codes}: {said}")
    devices, hosts = walk[-1]
    trial.case = dataclasses.replace(alone, devices=devices, hosts=hosts)
    return trial.finish()


MESHES = (
    ("strategy=pmap",),
    ("strategy=mesh", "fsdp=4"),
    ("strategy=mesh", "fsdp=2", "tensor=2"),
    ("strategy=mesh", "tensor=4"),
    ("strategy=mesh", "data=4"),
)
NEAR = 0.005  # of the loss: the order of additions differs


def mesh(of: drill.Drill, number: int) -> dict:
    """Stopped and continued on another mesh of four devices: the same updates on the same
    batches, and a loss within 0.5 % of the unbroken run's at the end."""
    rng = of.random("mesh", number)
    changes = ("model.dropout_rate=0", "data.batch_size=8")
    plain = drill.Case(toy.STAGES[number % 3], changes, devices=4)
    trial = drill.Trial(of, plain, of.fresh("mesh", number))
    walk = rng.sample(MESHES, 2)
    trial.record["meshes"] = [" ".join(words) for words in walk]
    for place, words in enumerate(walk):
        more = tuple(f"parallel.{word}" for word in words)
        trial.case = dataclasses.replace(plain, changes=changes + more)
        (child,) = trial.start()
        if place == 0:
            trial.await_update(child, rng.randint(3, toy.STEPS // 2))
            child.send(signal.SIGTERM)
        code = child.wait()
        trial.hurt() if place == 0 else trial.account()
        if code != (0 if place else exits.UNFINISHED):
            return trial.ended_badly(child)
    ours, theirs = outcome.read(trial.workdir).rows, trial.expected.outcome.rows
    apart = abs(ours[-1]["loss"] / theirs[-1]["loss"] - 1)
    same = [row["step"] for row in ours] == [row["step"] for row in theirs]
    trial.record["apart"] = apart
    if not same or apart > NEAR:
        return trial.fail(f"the loss is {apart:.2%} apart, steps alike: {same}")
    return trial.close() | {"identical": None}  # not promised
