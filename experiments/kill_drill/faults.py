"""Faults that are injected into a child process, and the function that a child runs."""

from __future__ import annotations

import atexit
import os
import pathlib
import re
import signal
import sys

MARK = 511  # an id outside the tokenizer's vocabulary; marks a poisoned batch
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree")


def below(event: str, arguments: tuple) -> str:
    """The folder that an event's path is relative to (rmtree's are relative to open folders)."""
    relative = event in ("os.remove", "os.rmdir") and arguments[1] not in (None, -1)
    return os.readlink(f"/proc/self/fd/{arguments[1]}") if relative else os.getcwd()


def watch(folder: str, last: int | str, record: str) -> None:
    """Records every change of the file system below a folder; kills the process before one.

    last: the change to die before, as its number from 1 (0: none) or as a regular expression of its
    line in the record.
    """
    out, count = open(record, "a", buffering=1), 0  # noqa: SIM115  (open until the process ends)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        place = os.path.join(below(event, arguments), os.fspath(arguments[0]))
        if not place.startswith(folder + os.sep):
            return
        count += 1
        line = f"{event} {os.path.relpath(place, folder)}"
        out.write(line + "\n")
        if count == last or (isinstance(last, str) and re.match(last, line)):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def blocking_saves() -> None:
    """Saves checkpoints in the training loop instead of the background."""
    import functools

    from lm import checkpoints

    checkpoints.Checkpoints = functools.partial(checkpoints.Checkpoints, background=False)


def spoilt_batches(first: int, many: int) -> None:
    """Makes the loss of `many` batches NaN, from batch `first` on."""
    from lm import pipeline, steps

    batches, update = pipeline.train_batches, steps.train_step

    def marked(examples, seed, *, start=0, **where):
        for index, rows in enumerate(batches(examples, seed, start=start, **where), start):
            if first <= index < first + many:
                inputs = rows.inputs.copy()
                inputs[0, 0] = MARK
                rows = rows._replace(inputs=inputs)
            yield rows

    def poisoned(*given, loss, **more):
        import jax.numpy as jnp

        def worse(params, examples, *rest):
            total, sums = loss(params, examples, *rest)
            seen = jnp.any(examples.inputs == MARK)
            return total * jnp.where(seen, jnp.nan, 1.0), sums

        return update(*given, loss=worse, **more)

    pipeline.train_batches, steps.train_step = marked, poisoned


FAULTS = {
    "watch": watch,
    "blocking_saves": blocking_saves,
    "spoilt_batches": spoilt_batches,
}


def live(arguments: list[str], log: str, environment: dict[str, str], faults: dict) -> None:
    """Runs `python -m lm` with these arguments in a forked child, and exits with its code."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    os.chdir(pathlib.Path(__file__).parents[2])
    from lm import cli

    sys.argv[0] = cli.PROGRAM
    for name, given in faults.items():
        FAULTS[name](*given)
    code = cli.main(arguments)
    # A forked child does not run exit handlers by itself.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
