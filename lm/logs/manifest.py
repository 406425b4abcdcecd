"""What made a run: workdir/run.json."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from lm import storage
from lm.logs import jsonl

MANIFEST = "run.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PACKAGES += ("array-record", "sentencepiece", "tensorstore")


def commit(folder: str | os.PathLike = pathlib.Path(__file__).parent) -> str | None:
    """The git commit of this code, "-dirty" behind it if files differ; None if not under git."""
    here = ["git", "-C", str(folder)]
    try:
        # In an environment that lies inside another repository this code is not tracked.
        subprocess.run([*here, "ls-files", "--error-unmatch", "."], capture_output=True, check=True)
        describe = [*here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(describe, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def versions() -> dict[str, str]:
    """{package: version} of the installed packages that decide a run's numbers."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command(argv: Sequence[str] | None = None) -> str:
    """The command line of this process (or of `argv`), as one would type it again."""
    first, *rest = sys.argv if argv is None else argv
    path = pathlib.Path(first)
    module = path.name == "__main__.py"
    return shlex.join(["python", *(["-m", path.parent.name] if module else [first]), *rest])


def write_manifest(workdir: str | os.PathLike, facts: Mapping) -> None:
    """Write workdir/run.json: `facts` (JSON values), and what made them.

    Adds command, commit, python, platform, versions; a fact of the same name wins.
    """
    made_by = {
        "command": command(),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
    }
    workdir = storage.as_path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    jsonl.write_atomically(workdir / MANIFEST, json.dumps({**made_by, **facts}, indent=2) + "\n")
