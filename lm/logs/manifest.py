"""workdir/run.json: the command, code, packages and machine behind a run."""

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
    """Return the git commit of this code, "-dirty" if it was modified; None outside of git."""
    git = ["git", "-C", str(folder)]
    try:
        # An installed copy inside another repository is not tracked by it.
        subprocess.run([*git, "ls-files", "--error-unmatch", "."], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        output = subprocess.run(describe, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.strip()


def versions() -> dict[str, str]:
    """Return {package: version} of the installed packages that affect a run's numbers."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def command(argv: Sequence[str] | None = None) -> str:
    """Return the command line of this process, or of `argv`, to copy into a shell."""
    script, *arguments = sys.argv if argv is None else argv
    path = pathlib.Path(script)
    program = ["-m", path.parent.name] if path.name == "__main__.py" else [script]
    return shlex.join(["python", *program, *arguments])


def write_manifest(workdir: str | os.PathLike, facts: Mapping) -> None:
    """Write workdir/run.json: command, commit, python, platform, versions and `facts`.

    facts: JSON values by name; they replace entries of the same name.
    """
    manifest = {
        "command": command(),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
    }
    workdir = storage.as_path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    jsonl.write_atomically(workdir / MANIFEST, json.dumps({**manifest, **facts}, indent=2) + "\n")
