"""Directories that appear complete: written to a hidden sibling directory, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

OWNER_MARK = "made-by-lm"  # marks a directory that may be emptied and removed


@contextlib.contextmanager
def staging_dir(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield an empty temporary directory, to be filled and renamed to `out` by the caller.

    Its parent .<out>.lm-part is a sibling of `out`, is reused only if it contains OWNER_MARK, and
    is removed at the end.
    Raises ValueError if another process is writing `out`, OSError if the disk is full.
    """
    parent = out.with_name(f".{out.name}.lm-part")
    parent.mkdir(parents=True, exist_ok=True)
    if any(parent.iterdir()) and not (parent / OWNER_MARK).exists():
        raise ValueError(f"{parent} is needed to write {out} but is not empty; move its contents.")
    lock = _try_lock(parent)  # the kernel releases it when the process ends
    if lock is None:
        raise ValueError(f"another process is writing {out}; wait for it.")
    try:
        (parent / OWNER_MARK).touch()
        shutil.rmtree(parent / "new", ignore_errors=True)  # from a killed run
        (parent / "new").mkdir()
        yield parent / "new"
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"there is no space left for {out}; free some, or set another --out."
        ) from error
    finally:
        shutil.rmtree(parent / "new", ignore_errors=True)
        shutil.rmtree(parent, ignore_errors=True)  # removes the mark last
        os.close(lock)


def _try_lock(folder: pathlib.Path) -> int | None:
    """Lock a directory; None if another process holds the lock or has removed the directory."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == folder.stat().st_ino:
            return lock
    os.close(lock)
    return None
