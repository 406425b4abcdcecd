"""One command of a launch: print it as a shell line, and run it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import subprocess
import sys

WIDTH = 100  # columns
PROGRAMS = {
    "gcloud": "the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)",
    "kubectl": "it with `gcloud components install kubectl`",
    "sbatch": "nothing, but go to a login node of the cluster",
    "git": "git",
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A command.

    why: a comment. stdin: its input. environment: NAME=VALUE in addition to this process's.
    beside: run it in the background (`&`).
    """

    words: tuple[str, ...]
    why: str = ""
    stdin: str = ""
    environment: tuple[str, ...] = ()
    beside: bool = False

    def __str__(self) -> str:
        """The command as a shell line."""
        pairs = (one.partition("=") for one in self.environment)
        assigned = [f"{name}={shlex.quote(value)}" for name, _, value in pairs]
        words = [*assigned, *map(shlex.quote, self.words)]
        line = " ".join(words)
        if len(line) > WIDTH:  # one flag per line
            line = words[0]
            for word in words[1:]:
                line += f" \\\n  {word}" if word.lstrip("'").startswith("--") else f" {word}"
        line += " &" * self.beside
        if self.stdin:
            line += f" <<'END'\n{self.stdin}END"
        return f"# {self.why}\n{line}" if self.why else line


def shown(plan: list[Step]) -> str:
    """The plan as a shell script."""
    return "\n".join(map(str, plan))


def started(step: Step, **options) -> subprocess.Popen:
    """Starts a step; options: of Popen. Raises ValueError if the program is not installed."""
    program, *words = step.words
    command = [sys.executable if program == "python" else program, *words]
    added = dict(one.split("=", 1) for one in step.environment)
    try:
        return subprocess.Popen(command, env=os.environ | added, text=True, **options)
    except FileNotFoundError as error:
        cure = PROGRAMS.get(program, program)
        raise ValueError(f"there is no {program} on this machine; install {cure}.") from error


@contextlib.contextmanager
def running(step: Step, **options):
    """Context of a running step, which is terminated on exit (as by Ctrl-C)."""
    process = started(step, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def run(step: Step) -> int:
    """Runs a step in the user's terminal; returns its exit code."""
    with running(step, stdin=subprocess.PIPE if step.stdin else None) as process:
        process.communicate(step.stdin or None)
    return process.returncode


def read(step: Step) -> subprocess.CompletedProcess:
    """Runs a step and returns its stdout and stderr, without printing them."""
    with running(step, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        said, complaint = process.communicate()
    return subprocess.CompletedProcess(step.words, process.returncode, said, complaint)


def say(text: str) -> None:
    """Prints a message of the launcher on stderr."""
    print(f"launch: {text}", file=sys.stderr, flush=True)
