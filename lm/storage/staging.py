"""Folders that appear whole: made in a hidden folder beside their place, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

OWNER_MARK = (
    "made-by-lm"  # the file by which a folder is known to be ours, to be emptied and removed
)


@contextlib.contextmanager
def staging_dir(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder, to make `out` in and then rename; what is left of it is removed at the end.

    It lies in a hidden one beside `out`, which only what has our mark is taken for.
    Raises ValueError where another process is at it, OSError with the cure where the disk is full.
    """
    room = out.with_name(f".{out.name}.lm-part")
    room.mkdir(parents=True, exist_ok=True)
    if any(room.iterdir()) and not (room / OWNER_MARK).exists():
        raise ValueError(f"{room} is needed to make {out} in, and holds something else; move it.")
    lock = _try_lock(room)  # held by the process, so that none outlives a kill
    if lock is None:
        raise ValueError(f"another process is making {out}; wait for it.")
    try:
        (room / OWNER_MARK).touch()
        shutil.rmtree(room / "new", ignore_errors=True)  # of a run that was killed
        (room / "new").mkdir()
        yield room / "new"
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"there is no space left for {out}; free some, or set another --out."
        ) from error
    finally:
        shutil.rmtree(room / "new", ignore_errors=True)
        shutil.rmtree(room, ignore_errors=True)  # with the mark, which is to go last
        os.close(lock)


def _try_lock(room: pathlib.Path) -> int | None:
    """A lock on a folder; None where another process has it, or has removed the folder since."""
    try:
        lock = os.open(room, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == room.stat().st_ino:
            return lock
    os.close(lock)
    return None
