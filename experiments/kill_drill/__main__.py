from __future__ import annotations
import os, pathlib, sys
from experiments.kill_drill import children, drill, kills, toy

KIND, MANY = sys.argv[2].split(","), int(sys.argv[3])
home = pathlib.Path(sys.argv[1]).absolute()
os.environ.update(children.surroundings(home))
import time

if __name__ == "__main__":
    toy.make(home)
    of = drill.Drill(home, 0)
    import ast

    for s in toy.STAGES:
        t = time.time()
        u = of.unbroken(drill.Case(s))
        print(
            s,
            u.seconds,
            time.time() - t,
            len(u.outcome.leaves),
            u.outcome.facts.keys(),
            u.outcome.names,
        )
    for k in KIND:
        for i in range(MANY):
            t = time.time()
            print(getattr(kills, k)(of, i), time.time() - t, flush=True)
