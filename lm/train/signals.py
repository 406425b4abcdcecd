"""SIGTERM and SIGINT as a wish to stop, on one host or agreed on by several."""

from __future__ import annotations

import os
import signal
import threading

from jax.experimental import multihost_utils

from lm import parallel


class Unfinished(Exception):
    """Training stopped before its end; the same command continues it. Exit code 75."""

    code = 75


class Signals:
    """Remembers a signal until the loop asks; a context manager of the main thread.

    Whatever comes later, while a checkpoint is written, changes nothing. On several hosts SIGTERM
    is jax's own notice of preemption, and all hosts are told to stop after the same update.
    """

    def __init__(self):
        self.name, self._asked, self._former = "SIGTERM", 0, {}
        self._several = parallel.host_index_and_count()[1] > 1

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            caught = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
            self._former = {number: signal.signal(number, self._remember) for number in caught}
        self._wished = False
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self._wished:
            self.name, self._wished = signal.Signals(number).name, True

    def asked(self) -> bool:
        """Whether to stop now. Ask once before each update, on every host."""
        self._asked += 1
        if self._several:
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._wished
