"""The content of a finished run's folder, read without lm's code."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import threading
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp

CLOCKS = (
    "time",
    "second",
    "mfu",
    "goodput",
    "memory",
)  # metrics whose names contain one depend on time
ARRAYS = ("params", "opt_state", "average")
NEAR = 1e-5  # relative tolerance of held-out metrics on another number of devices
LOCK = threading.Lock()


class Outcome(NamedTuple):
    """The result of a run.

    leaves: sha256 by path of the newest checkpoint's arrays. facts: its metadata. rows: of the log,
    without times. left: files that should not exist.
    """

    leaves: dict[str, str]
    facts: dict
    rows: list[dict]
    left: list[str]


def steps(workdir: pathlib.Path) -> list[int]:
    """Committed steps, newest first."""
    found = (workdir / "checkpoints").glob("*/commit_success.txt")
    return sorted((int(p.parent.name) for p in found if p.parent.name.isdigit()), reverse=True)


def leaves(step: pathlib.Path) -> dict[str, str]:
    """{item/path: sha256 of dtype, shape and bytes} of a checkpoint on disk."""
    found, as_numpy = {}, ocp.RestoreArgs(restore_type=np.ndarray)
    for item in (item for item in ARRAYS if (step / item).exists()):
        # One at a time: orbax runs each on an event loop of its own.
        with LOCK, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            names = reader.metadata(step / item).item_metadata.tree
            args = ocp.args.PyTreeRestore(restore_args=dict.fromkeys(names, as_numpy))
            made = reader.restore(step / item, args=args)
        for path, array in made.items():
            form = f"{array.dtype} {array.shape} ".encode()
            found[f"{item}/{path}"] = hashlib.sha256(form + array.tobytes()).hexdigest()
    return found


def rows(workdir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
    """Complete rows of a JSONL file."""
    path = workdir / name
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def timeless(row: dict) -> dict:
    """A row without metrics that depend on time."""
    return {k: v for k, v in row.items() if not any(word in k for word in CLOCKS)}


def leftovers(workdir: pathlib.Path) -> list[str]:
    """Files that a finished run must not leave: incomplete checkpoints and temporary files."""
    names = [
        path.name for path in (workdir / "checkpoints").iterdir() if ".corrupt-" not in path.name
    ]
    whole = {str(step) for step in steps(workdir)}
    return sorted({*names} - whole) + sorted(path.name for path in workdir.rglob("*.tmp*"))


def read(workdir: pathlib.Path) -> Outcome:
    """Reads the outcome of a finished run."""
    newest = workdir / "checkpoints" / str(steps(workdir)[0])
    facts = json.loads((newest / "facts" / "metadata").read_text())
    facts = {k: v for k, v in facts.items() if k not in ("seal", "leaves")}
    told = [timeless(row) for row in rows(workdir)]
    return Outcome(leaves(newest), facts, told, leftovers(workdir))


def differences(ours: Outcome, theirs: Outcome) -> list[str]:
    """Describes the differences between two outcomes; [] if they are equal."""
    found = []
    for what in ("leaves", "facts"):
        a, b = getattr(ours, what), getattr(theirs, what)
        found += [f"{what} {k}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    if ours.rows != theirs.rows:
        pairs = zip(ours.rows, theirs.rows, strict=False)
        a, b = next(((a, b) for a, b in pairs if a != b), ({}, {}))
        keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
        where = f"at {a['step']} {a['split']}: {', '.join(keys)}" if a else "at the last"
        found.append(f"log, {len(ours.rows)} rows of {len(theirs.rows)}, {where}")
    if ours.left != theirs.left:
        found.append(f"left in the folder: {sorted(set(ours.left) ^ set(theirs.left))}")
    return found


def evened(ours: Outcome, theirs: Outcome) -> Outcome:
    """Returns `ours` with held-out metrics of `theirs` where both agree within NEAR.

    An evaluation adds over devices in the fastest order, even if training is deterministic.
    """

    def near(a: dict, b: dict) -> bool:
        figures = [(a[key], b[key]) for key in a if isinstance(a[key], float) and key in b]
        exact = [key for key in a.keys() | b.keys() if not isinstance(a.get(key), float)]
        alike = all(a.get(key) == b.get(key) for key in exact) and a.keys() == b.keys()
        return alike and all(math.isclose(*pair, rel_tol=NEAR) for pair in figures)

    def taken(a: dict, b: dict) -> dict:
        return b if a.get("split", "heldout") == "heldout" and near(a, b) else a

    pairs = zip(ours.rows, theirs.rows, strict=False)
    rows = [taken(a, b) for a, b in pairs] + ours.rows[len(theirs.rows) :]
    figures = taken(ours.facts["figures"], theirs.facts["figures"])
    return ours._replace(rows=rows, facts=ours.facts | {"figures": figures})
