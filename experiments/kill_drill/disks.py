"""Trials of damaged checkpoints, restored by the hundred in one process."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

from experiments.kill_drill import children, drill, outcome, toy

CHUNK = 25  # damaged checkpoints per process


def damaged(of: drill.Drill, number: int) -> dict:
    """One fault in one file of the newest of two checkpoints, 25 times: the newest or the previous
    one is restored to the bit, and saving continues; every sixth time without a fault."""
    stage = toy.STAGES[number % 3]
    of.unbroken(drill.Case(stage))
    folder = of.fresh("damaged", number)
    folder.mkdir()
    out, log = folder / "found.jsonl", folder.with_suffix(".log")
    source = toy.unbroken(of.home, stage)
    given = (str(source), str(folder), of.seed * 10**6 + number, CHUNK, str(out), str(log))
    child = children.CONTEXT.Process(target=restore_damaged, args=given)
    child.start()
    child.join()
    found = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    wrong = [row for row in found if row["wrong"]]
    record = {"stage": stage, "faults": sum(row["fault"] != "" for row in found)}
    record |= {"lost": [], "resume_seconds": [], "found": found}
    record["controls"] = sum(row["fault"] == "" for row in found)
    if wrong or child.exitcode or len(found) < CHUNK:
        said = f"exit code {child.exitcode}: {log.read_text()[-1000:]} {wrong[:3]}"
        return record | {"identical": False, "wrong": said, "kept": folder.name}
    shutil.rmtree(folder)
    log.unlink()
    return record | {"identical": True}


def restore_damaged(source, folder, seed: int, count: int, out, log) -> None:
    """In its own process: copies, damages, restores and saves `count` times; a row for each."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    import numpy as np

    from experiments import damage
    from lm import inference, runs

    os.environ["XLA_FLAGS"] = ""
    run, rng = runs.read_run(pathlib.Path(source)), np.random.default_rng(seed)
    shapes = state_shapes(run)
    newest, before = outcome.steps(run.workdir)[:2]
    right = {n: outcome.leaves(run.workdir / "checkpoints" / str(n)) for n in (newest, before)}
    for number in range(count):
        place = pathlib.Path(folder) / str(number)
        shutil.copytree(run.workdir / "checkpoints", place / "checkpoints")
        row = {"kind": "", "fault": "", "wrong": ""}
        if number % 6 != 5:
            done = damage.damage(place / "checkpoints" / str(newest), rng)
            row |= {"kind": done.kind, "fault": done.fault}
        with inference.open_checkpoints(runs.make_run(run.config_dict, place)) as saved:
            state, facts = saved.restore(shapes)
            row["step"] = facts["step"]
            if facts["step"] not in right or not same(state, right[facts["step"]]):
                row["wrong"] = "silent"
            if facts["step"] == before:
                saved.save(state._replace(step=np.int32(newest)), facts)
                saved.wait()
        after = outcome.steps(place)
        if after[0] != newest or (not row["fault"] and facts["step"] != newest):
            row["wrong"] = row["wrong"] or f"restored {facts['step']}, then there are {after}"
        shutil.rmtree(place)
        with open(out, "a") as rows:
            rows.write(json.dumps(row) + "\n")


def state_shapes(run):
    """The shapes of a run's state, to restore into."""
    import functools

    import jax

    from lm import optimizers, steps, transformer

    params = transformer.param_shapes(run.model)
    pace = optimizers.RunLength(1.0, 1)
    optimizer, _ = optimizers.make_optimizer(run.optimizer, run.steps, params, pace)
    step_config = steps.StepConfig(ema_decay=run.optimizer.ema_decay)
    model = transformer.Transformer(run.model)
    return jax.eval_shape(
        functools.partial(steps.init_state, model, optimizer, step_config), params
    )


def same(state, right: dict[str, str]) -> bool:
    """Whether a restored state has the bits of a checkpoint on disk."""
    import hashlib

    import jax
    import numpy as np

    found = {}
    for item in outcome.ARRAYS:
        flat = jax.tree_util.tree_leaves_with_path(getattr(state, item))
        for path, leaf in flat:
            name, array = jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf)
            form = f"{array.dtype} {array.shape} ".encode()
            found[f"{item}/{name}"] = hashlib.sha256(form + array.tobytes()).hexdigest()
    return found == right
