"""Work by several processes, its results in the order of its items, in bounded memory."""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

AHEAD = 3  # items a worker that are given out before their turn


def ordered_map(
    function: Callable, items: Iterable, workers: int, common: tuple = ()
) -> Iterator[Any]:
    """function(*common, item) of each item, in order.

    workers: processes, 0 for one a processor; with 1 the work is done here. common: what each
    worker is given once.
    Raises what function raises, and ValueError where a worker is killed.
    """
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield from (function(*common, item) for item in items)
        return
    # Spawned, not forked: the parent may hold the threads of jax. Workers import no jax.
    context = multiprocessing.get_context("spawn")
    start = (function, common)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, start)
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(_work, item))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise ValueError(
            f"one of {workers} worker processes was killed, perhaps for lack of memory; "
            f"free some, or use fewer where the command takes --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_task: Callable[[Any], Any]


def _start(function: Callable, common: tuple) -> None:
    """Prepare a worker, which leaves its end to the parent: an interrupt, and being orphaned."""
    global _task
    _task = lambda item: function(*common, item)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(item):
    return _task(item)
