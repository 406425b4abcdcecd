"""One command: how it is shown, and how it is run. The two are the same words."""

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
    """A command. why: a comment; stdin: what it reads; environment: NAME=VALUE, beside ours.

    beside: it runs beside the next ones.
    """

    words: tuple[str, ...]
    why: str = ""
    stdin: str = ""
    environment: tuple[str, ...] = ()
    beside: bool = False

    def __str__(self) -> str:
        """What to type in a shell to run it."""
        pairs = (one.partition("=") for one in self.environment)
        assigned = [f"{name}={shlex.quote(value)}" for name, _, value in pairs]
        words = [*assigned, *map(shlex.quote, self.words)]
        line = " ".join(words)
        if len(line) > WIDTH:  # a flag a line
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
    """The process of a step. options: Popen's. Raises ValueError where there is no such program."""
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
    """The process of a step, told to end where this is left before its end, as by Ctrl-C."""
    process = started(step, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def run(step: Step) -> int:
    """Run a step in the user's terminal; its exit code."""
    with running(step, stdin=subprocess.PIPE if step.stdin else None) as process:
        process.communicate(step.stdin or None)
    return process.returncode


def read(step: Step) -> subprocess.CompletedProcess:
    """Run a step without a word in the terminal; what it said on stdout and stderr."""
    with running(step, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        said, complaint = process.communicate()
    return subprocess.CompletedProcess(step.words, process.returncode, said, complaint)


def say(text: str) -> None:
    """A line of the launcher's own, on stderr."""
    print(f"launch: {text}", file=sys.stderr, flush=True)
