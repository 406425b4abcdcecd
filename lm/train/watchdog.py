"""Ending a process at once: an update that hangs, a host that was lost."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import jax

from lm import exits, parallel, storage

STACKS = "stacks.txt"  # of host 0; stacks.1.txt of host 1, and so on
SLOW_FACTOR = 4  # times the usual timeout for steps that compile or write
REPORT_SECONDS = 30  # for reporting a hang before the process ends
ABORT_HANDLERS = []  # of SIGABRT; kept alive because C++ code may call them at any time

# How jax's errors about another host begin. Some arrive inside a ValueError, or as the cause of a
# failed save.
LOST_HOST = re.compile("UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED")


def exit_now(sentence: str, code: int = exits.UNFINISHED) -> None:
    """Print a sentence and end this process without any clean-up.

    Python's own ways to exit would wait for devices and hosts that no longer answer.
    """
    print(f"lm: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def on_abort(handler: Callable[[], None]) -> None:
    """Call `handler`, which should exit, when C++ code aborts this process.

    jax ends a process that lost another host by abort(), from a thread unknown to Python.
    """
    ABORT_HANDLERS.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: handler()))
    ctypes.CDLL(None).signal(int(signal.SIGABRT), ABORT_HANDLERS[-1])


@contextlib.contextmanager
def detect_lost_host(on_lost: Callable[[str], None]) -> Iterator[None]:
    """With several hosts, treat jax's runtime errors inside the block as the loss of a host.

    Also a ValueError or OSError that begins with a status of LOST_HOST. on_lost: takes the error on
    one line, or "" if C++ code aborts the process, and should exit.
    Raises ValueError, on one host too, if the devices are out of memory or refuse the program.
    """
    is_multihost = parallel.host_index_and_count()[1] > 1
    if is_multihost:
        on_abort(lambda: on_lost(""))
    try:
        yield
    except (ValueError, OSError) as error:
        message = exits.one_line(error.__cause__ or error)
        if is_multihost and LOST_HOST.match(message):
            on_lost(message)
        raise
    except jax.errors.JaxRuntimeError as error:
        message = exits.one_line(error)
        if message.startswith("RESOURCE_EXHAUSTED"):
            raise ValueError(
                f"the devices are out of memory ({message}); lower data.batch_size, raise "
                f"parallel.num_microbatches, or set model.remat_policy='full'."
            ) from error
        if message.startswith("INVALID_ARGUMENT"):
            raise ValueError(
                f"the devices refuse this program ({message}); check their drivers."
            ) from error
        if not is_multihost:
            raise
        on_lost(message)


class Watchdog:
    """A thread that ends the process when `beat` is not called for `seconds`; 0 disables it.

    A context manager. The stacks of all threads go to stderr and workdir/stacks.txt.
    report: called with the sentence before the process ends; its failure is ignored.
    """

    def __init__(self, seconds: float, workdir: str | os.PathLike, report: Callable[[str], None]):
        host, path = parallel.host_index_and_count()[0], storage.as_path(workdir) / STACKS
        self._path = path.with_suffix(f".{host}.txt") if host else path
        self._seconds, self._report = seconds, report
        self._activity, self._deadline, self._stopped = "the start", 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.beat(self._activity, SLOW_FACTOR)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stopped.set()

    def beat(self, activity: str, factor: float = 1) -> None:
        """Start the timeout of the next activity: factor x seconds."""
        self._activity, self._deadline = activity, time.monotonic() + self._seconds * factor

    def _watch(self) -> None:
        while time.monotonic() < self._deadline:
            if self._stopped.wait(self._seconds / 10):
                return
        sentence = (
            f"{self._activity} has not ended for guard.hang_timeout_seconds={self._seconds:g} "
            f"seconds or more; the stack of each thread is in {self._path}; run the same command "
            f"again to continue."
        )
        timer = threading.Timer(REPORT_SECONDS, exit_now, [sentence])  # a disk may hang as well
        timer.daemon = True
        timer.start()
        try:
            self._write_stacks(sentence)
            with contextlib.suppress(OSError):
                self._report(sentence)
        finally:
            exit_now(sentence)

    def _write_stacks(self, sentence: str) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
            file.write(sentence.encode() + b"\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            storage.write_atomic(self._path, file.read())
