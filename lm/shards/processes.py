"""Map a function over items by worker processes: in order, in bounded memory."""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lm import extensions

AHEAD = 3  # items in flight for each worker


def ordered_map(
    function: Callable, items: Iterable, workers: int, shared: tuple = ()
) -> Iterator[Any]:
    """function(*shared, item) of each item, in order.

    workers: processes; 0 for one a core, 1 for this process. shared: sent to each worker once.
    Raises what the function raises, and ValueError if a worker is killed.
    """
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield from (function(*shared, item) for item in items)
        return
    # Spawned, not forked: the parent may have jax's threads. Workers import no jax.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, context, _start, (function, shared, extensions.files())
    )
    pending = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(_work, item))
            if len(pending) > AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ValueError(
            f"one of {workers} worker processes was killed, perhaps for lack of memory; "
            f"free some, or use fewer where the command takes --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable[[Any], Any]


def _start(function: Callable, shared: tuple, files: list[str]) -> None:
    """Initialize a worker: it loads extensions, ignores interrupts, and exits with its parent."""
    extensions.load(files)
    global _function
    _function = lambda item: function(*shared, item)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(item: Any) -> Any:
    return _function(item)
