"""Ends that cannot wait: an update that never ends, a host that is gone."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable

from lm.train import signals

STACKS = "stacks.txt"
ALLOWANCE = 4  # times as long for what compiles or writes


def leave(sentence: str, code: int = signals.Unfinished.code) -> None:
    """End this process at once, with a sentence and an exit code: no clean-up is waited for.

    Devices and hosts that do not answer would hold up every one of Python's own ways to end.
    """
    print(f"lm: {sentence}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def on_abort(tell: Callable[[], None]) -> Callable:
    """From now on, where C++ code aborts this process, `tell` is called, which should `leave`.

    So jax ends the process of a host when another is gone: by abort(), from a thread that is not
    Python's, and with no word to Python. Keep what is returned: it is the handler itself.
    """
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: tell())
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)
    return handler


class Watchdog:
    """A thread that ends the process where nothing has ended for `seconds`; 0: it never does.

    A context manager. The stacks of all threads go to stderr and workdir/stacks.txt.
    tell: called with the sentence before the end, which is `leave`.
    """

    def __init__(self, seconds: float, workdir, tell: Callable[[str], None]):
        self._seconds, self._path, self._tell = seconds, pathlib.Path(workdir) / STACKS, tell
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
            f"{self._what} has not ended for guard.hang={self._seconds:g} seconds or more; where "
            f"each thread stood is in {self._path}; run the same command again to continue."
        )
        with open(self._path, "w") as file:
            file.write(sentence + "\n\n")
            file.flush()
            for place in (file, sys.__stderr__):
                faulthandler.dump_traceback(file=place, all_threads=True)
        self._tell(sentence)
        leave(sentence)
