"""One decision for all hosts: each may read a checkpoint otherwise, none may go its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.checkpoints import metadata

SOUND, MISMATCH, DAMAGED = 0, 1, 2  # the gravest last


def try_on_all_hosts(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """(work(), None), or (None, the damage in words) where it fails on any host.

    Every host must call this. forms.Mismatch, which is no damage, is raised, and on every host.
    """
    found, error, verdict = None, None, SOUND
    try:
        found = work()
    except metadata.Mismatch as mismatch:
        error, verdict = mismatch, MISMATCH
    # Damage surfaces as errors of many types, bare Exception among them.
    except Exception as damage:
        error, verdict = damage, DAMAGED
    gravest = int(np.max(multihost_utils.process_allgather(np.int32(verdict))))
    error = error or metadata.Mismatch("another host finds a checkpoint of another model.")
    if gravest == MISMATCH:
        raise error
    return (found, None) if gravest == SOUND else (None, short(error))


def short(error: Exception) -> str:
    """An error in at most 200 characters of one line; its kind where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def broadcast_steps(numbers: list[int]) -> list[int]:
    """The first host's numbers, int32, on every host; every host must call this."""
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.resize(np.asarray(numbers, np.int32), count)
    return multihost_utils.broadcast_one_to_all(mine).tolist()


def is_first_host() -> bool:
    """Whether this host is the one that renames and deletes."""
    return jax.process_index() == 0


def barrier(where: str) -> None:
    """Wait until every host is here."""
    multihost_utils.sync_global_devices(where)


def local_leaf(leaf):
    """A leaf to save: numpy where it is one host's of several, for Orbax then takes no other."""
    ours = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    return np.asarray(leaf) if ours and jax.process_count() > 1 else leaf
