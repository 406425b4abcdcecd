"""Trials of two processes that train one run, and of runs resumed on other layouts."""

from __future__ import annotations

import dataclasses
import signal
import time

from experiments.kill_drill import children, drill, toy
from lm import exits

PAIR = drill.Case("pretrain", hosts=2)
MINUTE = 60.0


def at_work(trial: drill.Trial, rng, **how) -> list[children.Child]:
    """Starts both processes and waits for a random moment of training."""
    pair = trial.start(**how)
    trial.await_update(pair[0], rng.randint(1, toy.STEPS - toy.SAVE))
    time.sleep(rng.uniform(0, 0.05))
    return pair


def ended(trial: drill.Trial, pair, seconds: float) -> list[int | None]:
    """Exit codes of both processes; None for one that was killed after the timeout."""
    deadline = time.monotonic() + seconds
    codes = [child.wait(max(0.0, deadline - time.monotonic())) for child in pair]
    for child in pair:
        child.end()
    return codes


def stop(of: drill.Drill, number: int) -> dict:
    """SIGSTOP one of two processes: the other exits with 75 and a message within a minute."""
    rng = of.random("stop", number)
    trial = drill.Trial(of, PAIR, of.fresh("stop", number))
    pair = at_work(trial, rng)
    stopped, other = pair[number % 2], pair[1 - number % 2]
    start, was_running = time.monotonic(), stopped.send(signal.SIGSTOP)
    code = other.wait(MINUTE + 30)
    seconds = round(time.monotonic() - start, 2)
    ended(trial, pair, 0)
    trial.record |= {"stop_seconds": [seconds], "gone": number % 2}
    if not was_running:
        return trial.finish()
    trial.hurt()
    if code == 0 and trial.logged() == toy.STEPS:  # it finished without the other process
        return trial.finish()
    messages = [line for line in other.said().splitlines() if line.startswith("lm: ")]
    if code != exits.UNFINISHED or not messages or seconds > MINUTE:
        log = other.said()[-1000:]
        return trial.fail(f"after {seconds} s the other process ended with {code}: {log}")
    return trial.finish()


LAYOUTS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2))  # devices a process, processes
FIXED = ("parallel.deterministic_reduction=True", "parallel.reduction_shards=8")


def topology(of: drill.Drill, number: int) -> dict:
    """Stop twice and resume on other numbers of devices and processes, with a deterministic
    reduction: the bits are those of one device (held-out metrics to 1e-5)."""
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
