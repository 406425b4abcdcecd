"""The ids of an input that must fit in so many tokens."""

from __future__ import annotations

import bisect

import numpy as np

from lm.tasks.task import Task


def truncate_input(task: Task, text: str, room: int, tokens) -> tuple[np.ndarray, bool]:
    """(ids of an input, eos at the end, at most `room`; whether it had to be cut).

    What is too long loses its end; of a dialogue the prefix and the latest turns stay, whole ones
    as far as one fits. tokens: a tokenizer.Tokenizer.
    """
    ids, most = tokens.encode(text), room - 1
    cut = len(ids) > most
    if cut and task.turns and text.startswith(task.prefix):
        turns = text.removeprefix(task.prefix).split("\n")
        latest = lambda first: tokens.encode(task.prefix + "\n".join(turns[first:]))
        # The first turn to keep; where the last alone is too long, its end is what is kept.
        first = bisect.bisect_left(
            range(len(turns) - 1), True, key=lambda first: len(latest(first)) <= most
        )
        ids = latest(first)
        if len(ids) > most:
            asked = tokens.encode(task.prefix)[: most // 2]
            ids = np.concatenate([asked, ids[len(ids) - (most - len(asked)) :]])
    return np.append(ids[:most], tokens.eos).astype(np.int32), cut
