"""Paths on local disks and in Google Cloud Storage (gs://...), all with pathlib's methods.

Also operations that buckets lack: appending, copying and moving directories, and local copies for
readers that need a disk. A write to a bucket is atomic, so it needs no temporary file.
"""

from __future__ import annotations

import concurrent.futures
import glob
import os
import pathlib
import shutil
import time
from typing import Any

SCHEME = "gs://"
CACHE_DIR = "~/.cache/lm/gs"  # local copies of files in buckets
COPY_THREADS, COPY_CHUNK_BYTES = 8, 1 << 24
FLUSH_SECONDS = 30.0  # least time between two uploads of a growing object,
FLUSH_COST_FACTOR = 20  # and at least this multiple of the last upload's time


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path is a gs:// address."""
    return os.fspath(path).startswith(SCHEME)


def as_path(path: str | os.PathLike) -> pathlib.Path:
    """Return a pathlib.Path, or for gs://bucket/... a path with the same methods.

    Raises ValueError if the bucket does not exist or gcsfs is not installed, OSError if the bucket
    cannot be reached.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    try:
        from lm.storage import gcs
    except ImportError as error:
        raise ValueError(
            f"{path} needs a package that is not installed ({error}); pip install gcsfs."
        ) from error
    return gcs.as_gcs_path(os.fspath(path))


def _filesystem():
    from lm.storage import gcs

    return gcs.filesystem()


def glob_paths(pattern: str) -> list[str]:
    """Return the files and directories that match a pattern with *, sorted."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    as_path(pattern)  # reports a missing bucket or package
    return sorted(SCHEME + name for name in _filesystem().glob(pattern))


def check_deletable(folder: pathlib.Path) -> None:
    """Raise OSError if this account may not read the metadata of a folder's bucket.

    Orbax reads it before the first deletion, which may be hours after the start.
    Source: orbax/checkpoint/_src/path/gcs_utils.py, is_hierarchical_namespace_enabled.
    """
    if is_remote(folder):
        _filesystem().call("GET", "b/{}", os.fspath(folder).split("/")[2])


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Replace the contents of a file; readers see either the old or the new contents."""
    path = as_path(path)
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_append(path: str | os.PathLike) -> Any:
    """Open a file for appending, with the methods write, flush and close.

    A write to a disk is unbuffered. A write to a bucket is uploaded if the last upload was at least
    FLUSH_SECONDS ago, otherwise by `flush` and `close`.
    """
    path = as_path(path)
    return _AppendObject(path) if is_remote(path) else open(path, "ab", buffering=0)  # noqa: SIM115


class _AppendObject:
    """A growing object. Buckets cannot append, so each upload rewrites the whole object."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._data = bytearray(path.read_bytes() if path.exists() else b"")
        self._next_flush, self._uploaded = 0.0, len(self._data)

    def write(self, data: bytes) -> int:
        """Append to the buffer; upload if the last upload is long enough ago."""
        self._data += data
        if time.monotonic() >= self._next_flush:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Upload the object if the buffer has grown."""
        if self._uploaded == len(self._data):
            return
        started = time.monotonic()
        self._path.write_bytes(bytes(self._data))
        self._uploaded, now = len(self._data), time.monotonic()
        self._next_flush = now + max(FLUSH_SECONDS, FLUSH_COST_FACTOR * (now - started))

    close = flush


def copy_dir(source: pathlib.Path, target: pathlib.Path, last: str = "") -> None:
    """Copy a directory tree.

    last: a file that identifies the contents. To or from a bucket it is copied last, and nothing
    is copied if the target already has an identical one.
    Raises OSError, naming both directories, if the copy fails.
    """
    if not is_remote(source) and not is_remote(target):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    try:
        if last:
            contents, mark = (source / last).read_bytes(), target / last
            if mark.exists() and mark.read_bytes() == contents:
                return
            mark.unlink(missing_ok=True)
        names = [name for name in _list_files(source) if name != last]
        with concurrent.futures.ThreadPoolExecutor(COPY_THREADS) as pool:
            list(pool.map(lambda name: _copy_file(source / name, target / name), names))
        if last:
            _copy_file(source / last, mark)
    except OSError as error:
        raise OSError(
            f"{source} cannot be copied to {target} ({error.strerror or error}); check the space "
            f"and the permissions there, and run the same command again."
        ) from error


def _list_files(folder: pathlib.Path) -> list[str]:
    """Return the paths of all files below a directory, relative to it."""
    if not is_remote(folder):
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    prefix = f"{os.fspath(folder).removeprefix(SCHEME)}/"
    names = _filesystem().find(prefix)  # may include an empty object named like the folder
    return [name.removeprefix(prefix) for name in names if not name.endswith("/")]


def _copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
    temporary = target
    if not is_remote(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with source.open("rb") as reader, temporary.open("wb") as writer:
        shutil.copyfileobj(reader, writer, COPY_CHUNK_BYTES)
    if temporary != target:
        os.replace(temporary, target)


def local_copy(folder: pathlib.Path, last: str) -> pathlib.Path:
    """Return a directory on a local disk with the same contents.

    A directory in a bucket is copied to CACHE_DIR by `copy_dir`. If its file `last` is missing, it
    is unfinished: then an old local copy is removed, and the path returned does not exist.
    """
    if not is_remote(folder):
        return folder
    local = pathlib.Path(CACHE_DIR).expanduser() / os.fspath(folder).removeprefix(SCHEME)
    if (folder / last).exists():
        copy_dir(folder, local, last)
    else:
        shutil.rmtree(local, ignore_errors=True)
    return local


def remove_dir(folder: pathlib.Path) -> None:
    """Remove a directory tree or a link to one."""
    if is_remote(folder):
        folder.rmtree()
    elif folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def move_dir(folder: pathlib.Path, target: pathlib.Path, mark: str) -> None:
    """Rename a directory.

    mark: a file that marks the directory as complete. A rename in a bucket is a slow copy, so the
    mark is deleted first and not copied.
    """
    if not is_remote(folder):
        folder.rename(target)
        return
    (folder / mark).unlink()
    for name in _list_files(folder):  # copied by the server
        _filesystem().cp_file(f"{folder}/{name}", f"{target}/{name}")
    folder.rmtree()
