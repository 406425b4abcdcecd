"""Ends that cannot wait: an update that never ends, a host that is gone."""

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

from lm import parallel, storage
from lm.train import signals

STACKS = "stacks.txt"  # of host 0; stacks.1.txt of host 1, and so on
ALLOWANCE = 4  # times as long for what compiles or writes
GRACE = 30  # seconds that telling may take before the end
HANDLERS = []  # of SIGABRT, which C++ code may call as long as there is this process


def exit_now(sentence: str, code: int = signals.Unfinished.code) -> None:
    """End this process at once, with a sentence and an exit code: no clean-up is waited for.

    Devices and hosts that do not answer would hold up every one of Python's own ways to end.
    """
    print(f"lm: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def on_abort(tell: Callable[[], None]) -> None:
    """From now on, where C++ code aborts this process, `tell` is called, which should `leave`.

    So jax ends the process of a host when another is gone: by abort(), from a thread that is not
    Python's, and with no word to Python.
    """
    HANDLERS.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: tell()))
    ctypes.CDLL(None).signal(int(signal.SIGABRT), HANDLERS[-1])


# How an error begins that tells of another host. Some come as a ValueError of jax, or inside one
# of a save that could not be written.
LOST = re.compile("UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED")


def short(error: BaseException) -> str:
    """The beginning of an error's own text, in one line."""
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def detect_lost_host(lost: Callable[[str], None]) -> Iterator[None]:
    """Within it an error of jax on several hosts is the loss of another, of which `lost` is told.

    lost: takes the error's short text, empty after an abort, and should `leave`. Raises ValueError,
    on one host as well, for what the devices of this one refuse.
    """
    several = parallel.host_index_and_count()[1] > 1
    if several:
        on_abort(lambda: lost(""))
    try:
        yield
    except (ValueError, OSError) as error:
        said = short(error.__cause__ or error)
        if several and LOST.match(said):
            lost(said)
        raise
    except jax.errors.JaxRuntimeError as error:
        said = short(error)
        if said.startswith("RESOURCE_EXHAUSTED"):
            raise ValueError(
                f"the devices have no room for this ({said}); lower data.batch_size, raise "
                f"parallel.num_microbatches, or set model.remat='full'."
            ) from error
        if said.startswith("INVALID_ARGUMENT"):
            raise ValueError(f"the devices refuse this ({said}); see to their drivers.") from error
        if not several:
            raise
        lost(said)


class Watchdog:
    """A thread that ends the process where nothing has ended for `seconds`; 0: it never does.

    A context manager. The stacks of all threads go to stderr and workdir/stacks.txt.
    tell: called with the sentence before the end, which is `leave`, whatever becomes of telling.
    """

    def __init__(self, seconds: float, workdir, tell: Callable[[str], None]):
        host, path = parallel.host_index_and_count()[0], storage.as_path(workdir) / STACKS
        self._path = path.with_suffix(f".{host}.txt") if host else path
        self._seconds, self._tell = seconds, tell
        self._what, self._deadline, self._over = "the start", 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.beat(self._what, ALLOWANCE)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._over.set()

    def beat(self, what: str, allowance: float = 1) -> None:
        """Something has ended; `what` comes next, and may take allowance x seconds."""
        self._what, self._deadline = what, time.monotonic() + self._seconds * allowance

    def _watch(self) -> None:
        while time.monotonic() < self._deadline:
            if self._over.wait(self._seconds / 10):
                return
        sentence = (
            f"{self._what} has not ended for guard.hang_timeout_seconds={self._seconds:g} seconds or more; where "
            f"each thread stood is in {self._path}; run the same command again to continue."
        )
        end = threading.Timer(GRACE, exit_now, [sentence])  # a disk may hang as well
        end.daemon = True
        end.start()
        try:
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
            with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
                file.write(sentence.encode() + b"\n\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
                file.seek(0)
                storage.write_atomic(self._path, file.read())
            with contextlib.suppress(OSError):
                self._tell(sentence)
        finally:
            exit_now(sentence)
