"""Stopping after SIGTERM or SIGINT, on one host or at the same update on several."""

from __future__ import annotations

import os
import signal
import threading

from jax.experimental import multihost_utils

from lm import exits, parallel


class Unfinished(Exception):
    """Training stopped before its end; the same command continues it."""

    code = exits.UNFINISHED


class Signals:
    """Remembers a signal until the training loop asks; a context manager of the main thread.

    Later signals, during the last checkpoint, are ignored. On several hosts jax's preemption
    service handles SIGTERM, so that all hosts stop after the same update.
    """

    def __init__(self):
        self.name, self._num_calls, self._old_handlers = "SIGTERM", 0, {}
        self._is_multihost = parallel.host_index_and_count()[1] > 1

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            handled = (signal.SIGINT,) if self._is_multihost else (signal.SIGINT, signal.SIGTERM)
            self._old_handlers = {n: signal.signal(n, self._remember) for n in handled}
        self._received = False
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if self._is_multihost:
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self._received:
            self.name, self._received = signal.Signals(number).name, True

    def should_stop(self) -> bool:
        """Whether to stop now. Every host must call this once before each update."""
        self._num_calls += 1
        if self._is_multihost:
            return multihost_utils.reached_preemption_sync_point(self._num_calls)
        return self._received
