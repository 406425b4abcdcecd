"""Runs the trials two at a time, prints progress and writes the page; see the package."""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import math
import os
import pathlib
import platform
import shutil
import sys
import time

import jax

from experiments.kill_drill import children, disks, drill, hosts, kills, outcome, page, toy
from lm import logs, lookup

KINDS = {  # trial function -> number of trials with --trials=300
    kills.kill: 100,  # of three kills each
    kills.point: 30,
    kills.export: 6,
    kills.term: 20,
    kills.nan: 27,
    disks.damaged: 48,  # of 25 checkpoints each
    hosts.stop: 5,
    hosts.topology: 24,
}
NAMES = {trial.__name__: trial for trial in KINDS}
AT_ONCE = 2


def asked(arguments: list[str]) -> argparse.Namespace:
    """Parses the flags."""
    flags = argparse.ArgumentParser(prog="python -m experiments.kill_drill")
    flags.add_argument("--trials", type=int, default=300, help="kills of the first kind")
    flags.add_argument("--seed", type=int, default=0, help="of the random moments")
    flags.add_argument("--kinds", default=",".join(NAMES), help="separated by commas")
    flags.add_argument("--home", default="runs/drill", help="folder of all runs")
    flags.add_argument("--out", default="", help="page and rows are written as OUT.md, OUT.jsonl")
    return flags.parse_args(arguments)


def attempted(trial, of: drill.Drill, number: int) -> dict:
    """Runs one trial and returns its row."""
    start = time.monotonic()
    try:
        found = trial(of, number)
    except drill.Broken as error:
        found = {"stage": "", "faults": 0, "identical": False, "wrong": str(error)}
    found["right"] = found["identical"] is not False
    seconds = round(time.monotonic() - start, 1)
    return {"kind": trial.__name__, "number": number} | found | {"seconds": seconds}


def controls(of: drill.Drill, names: list[str]) -> dict[str, bool]:
    """Controls: equal runs compare as equal, and every alteration is detected."""
    known = of.known()
    changed = [altered for made in known.values() for altered in alterations(made.outcome)]
    told = sum(bool(outcome.differences(*pair)) for pair in changed)
    found = {f"{len(known)} unhurt runs ended as their twins": True}
    found[f"{told} of {len(changed)} changed expectations were noticed"] = told == len(changed)
    plain = of.unbroken(drill.Case()).outcome
    seeded = of.unbroken(drill.Case(changes=("seed=1",))).outcome
    found["another seed gives other bits"] = seeded.leaves != plain.leaves
    if "topology" in names:
        fast = of.unbroken(drill.Case(devices=2)).outcome
        found["reduction=fast gives other bits on two devices"] = fast.leaves != plain.leaves
    return found


def alterations(right: outcome.Outcome):
    """Yields (outcome, altered copy): a leaf, a fact, a metric, a row, a stray file."""
    leaf = {next(iter(right.leaves)): "another"}
    yield right, right._replace(leaves=right.leaves | leaf)
    yield right, right._replace(facts=right.facts | {"position": {"next_index": 0}})
    row = right.rows[-1] | {"loss": 0.0}
    yield right, right._replace(rows=[*right.rows[:-1], row])
    yield right, right._replace(rows=[*right.rows, right.rows[-1]])
    yield right, right._replace(left=["28.orbax-checkpoint-tmp"])


def run(of: drill.Drill, jobs: list, tell) -> list[dict]:
    """Runs all jobs (trial, number) and returns their rows in order of completion."""
    rows, start = [], time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [pool.submit(attempted, trial, of, number) for trial, number in jobs]
        for done in concurrent.futures.as_completed(waiting):
            rows.append(done.result())
            tell(rows[-1])
            left = (time.monotonic() - start) / len(rows) * (len(jobs) - len(rows))
            wrong = sum(not row["right"] for row in rows)
            eta = datetime.timedelta(seconds=round(left))
            last = f"{rows[-1]['kind']} {rows[-1]['number']}"
            said = f"{len(rows)}/{len(jobs)} trials, {wrong} wrong, last {last}, eta {eta}"
            print(said, file=sys.stderr, flush=True)
    return rows


def main(arguments: list[str]) -> int:
    """Runs the drill; returns 0 if every trial passed, else 1."""
    given, start = asked(arguments), time.monotonic()
    names = [word for word in given.kinds.split(",") if lookup.lookup(NAMES, word, "--kinds")]
    home = pathlib.Path(given.home).absolute()
    out = pathlib.Path(given.out or home / "drill")
    shutil.rmtree(home / "trials", ignore_errors=True)
    os.environ.update(children.surroundings(home))
    of = drill.Drill(home, given.seed)
    toy.make(of.home)
    counts = {name: math.ceil(KINDS[NAMES[name]] * given.trials / 300) for name in names}
    jobs = [(NAMES[name], number) for name in names for number in range(counts[name])]
    about = {"seed": given.seed, "commit": logs.commit(), "date": str(datetime.date.today())}
    about |= {"jax": jax.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".jsonl"), "w") as file:
        tell = lambda row: print(json.dumps(row), file=file, flush=True)
        tell(about | {"trials": counts, "steps": toy.STEPS, "save": toy.SAVE})
        rows = run(of, jobs, tell)
        held = controls(of, names)
        tell({"controls": held})
    about["minutes"] = round((time.monotonic() - start) / 60, 1)
    rows.sort(key=lambda row: (names.index(row["kind"]), row["number"]))
    text = page.page(about, rows, held, {name: NAMES[name] for name in names})
    out.with_suffix(".md").write_text(text)
    print(text)
    return 0 if all(row["right"] for row in rows) and all(held.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
