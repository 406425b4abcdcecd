"""Inside a child: the faults that cannot be done to a process from outside, and its life."""

from __future__ import annotations

import atexit
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

MARK = 511  # an id that no piece has: the mark of a spoilt batch
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "shutil.rmtree")


def below(event: str, arguments: tuple) -> str:
    """The folder that an event's path is relative to: a tree is removed by open folders."""
    relative = event in ("os.remove", "os.rmdir") and arguments[1] not in (None, -1)
    return os.readlink(f"/proc/self/fd/{arguments[1]}") if relative else os.getcwd()


def watch(folder: str, last: int | str, record: str) -> None:
    """Write every change of the file system below a folder to a record; die before one of them.

    last: its number from 1 (0: none, so that a first run says what there are), or a regular
    expression of its line in the record.
    """
    out, count = open(record, "a", buffering=1), 0  # noqa: SIM115  (it lives as long as we do)

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


def small_files(size: int) -> None:
    """No file may grow past so many bytes, as on a disk that is full; but for the log."""
    copier = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=1)
    for output in (1, 2):
        os.dup2(copier.stdin.fileno(), output)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def blocking_saves() -> None:
    """Checkpoints are written by the loop itself, not behind its back."""
    import functools

    from lm import checkpoints

    checkpoints.Checkpoints = functools.partial(checkpoints.Checkpoints, background=False)


def spoilt_batches(first: int, many: int) -> None:
    """Batches first, first + 1, .. bear a mark, and a loss that sees it is not a number."""
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


def stalled_batches(index: int) -> None:
    """The batch of this number never comes."""
    from lm import pipeline

    batches = pipeline.train_batches

    def stalled(examples, seed, *, start=0, **where):
        for number, rows in enumerate(batches(examples, seed, start=start, **where), start):
            if number == index:
                time.sleep(10**6)
            yield rows

    pipeline.train_batches = stalled


def flipped_bit(step: int) -> None:
    """At one update, one bit of one parameter flips on the second of several devices."""
    import jax
    import jax.numpy as jnp

    from lm import steps

    update = steps.train_step

    def flip(leaf, bad):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        place = jnp.zeros(bits.size, jnp.uint32).at[0].set(1 << 20).reshape(bits.shape)
        return jax.lax.bitcast_convert_type(jnp.where(bad, bits ^ place, bits), leaf.dtype)

    def faulty(state, *rest, axis, **more):
        state, sums = update(state, *rest, axis=axis, **more)
        bad = (jax.lax.axis_index(axis.name) == 1) & (state.step == step)
        leaves, form = jax.tree.flatten(state.params)
        leaves[0] = flip(leaves[0], bad)
        return state._replace(params=jax.tree.unflatten(form, leaves)), sums

    steps.train_step = faulty


FAULTS = {
    "watch": watch,
    "small_files": small_files,
    "blocking_saves": blocking_saves,
    "spoilt_batches": spoilt_batches,
    "stalled_batches": stalled_batches,
    "flipped_bit": flipped_bit,
}


def live(arguments: list[str], log: str, environment: dict[str, str], faults: dict) -> None:
    """The life of a forked child: `python -m lm` with these arguments, and its exit code."""
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
    # A fork ends without them, a program does not.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
