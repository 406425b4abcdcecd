"""Agreement between hosts: either all of them accept a checkpoint, or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm import exits
from lm.checkpoints import metadata

SOUND, MISMATCH, DAMAGED = 0, 1, 2  # the worst last


def try_on_all_hosts(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return (function(), None), or (None, the error's message) if it fails on any host.

    Every host must call this. Raises metadata.Mismatch on every host if any host raises it.
    """
    result, error, verdict = None, None, SOUND
    try:
        result = function()
    except metadata.Mismatch as mismatch:
        error, verdict = mismatch, MISMATCH
    except Exception as damage:  # of many types, depending on what is damaged
        error, verdict = damage, DAMAGED
    worst = int(np.max(multihost_utils.process_allgather(np.int32(verdict))))
    error = error or metadata.Mismatch("another host reads a checkpoint of another model.")
    if worst == MISMATCH:
        raise error
    return (result, None) if worst == SOUND else (None, exits.one_line(error))


def broadcast_steps(steps: list[int]) -> list[int]:
    """Return the first host's steps on every host; every host must call this."""
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    local_steps = np.resize(np.asarray(steps, np.int32), count)
    return multihost_utils.broadcast_one_to_all(local_steps).tolist()


def local_leaf(leaf: Any) -> Any:
    """Convert a leaf that is on one of several hosts to numpy, as Orbax requires."""
    is_local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    return np.asarray(leaf) if is_local and jax.process_count() > 1 else leaf
