"""The ids of an input, cut to the maximum length."""

from __future__ import annotations

import bisect

import numpy as np

from lm import tokenizer
from lm.tasks.task import Task


def truncate_input(
    task: Task, text: str, max_length: int, tokens: tokenizer.Tokenizer
) -> tuple[np.ndarray, bool]:
    """(int32 ids of an input with eos, at most max_length of them; whether it was truncated).

    Truncates the end; for a dialogue drops the oldest turns, and if the last turn alone is too long
    keeps the start of the prefix and the end of that turn.
    """
    ids, limit = tokens.encode(text), max_length - 1
    is_truncated = len(ids) > limit
    if is_truncated and task.turns and text.startswith(task.prefix):
        turns = text.removeprefix(task.prefix).split("\n")
        encode_from = lambda first: tokens.encode(task.prefix + "\n".join(turns[first:]))
        fits = lambda first: len(encode_from(first)) <= limit
        ids = encode_from(bisect.bisect_left(range(len(turns) - 1), True, key=fits))
        if len(ids) > limit:
            prefix = tokens.encode(task.prefix)[: limit // 2]
            ids = np.concatenate([prefix, ids[len(ids) - (limit - len(prefix)) :]])
    return np.append(ids[:limit], tokens.eos).astype(np.int32), is_truncated
