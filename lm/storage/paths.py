"""Where files lie: on this machine's disks, or in a bucket of Google Cloud Storage, as gs://...

Both are paths with pathlib's methods, so that most code need not know. What a bucket cannot do is
here: files that grow, copies of folders, and files for those who read only from a disk. An object
of a bucket appears whole or not at all, so that nothing is renamed there.
"""

from __future__ import annotations

import concurrent.futures
import glob
import os
import pathlib
import shutil
import time

SCHEME = "gs://"
CACHE_DIR = "~/.cache/lm/gs"  # of files for those who read only from a disk
COPY_THREADS, COPY_CHUNK_BYTES = 8, 1 << 24  # files copied at once, and bytes of each in memory
FLUSH_SECONDS = 30.0  # seconds between two writes of an object that grows
FLUSH_COST_FACTOR = 20  # and as many times as long as the last one took


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def as_path(path: str | os.PathLike) -> pathlib.Path:
    """A path, or of gs://bucket/..., one with the same methods.

    Raises ValueError where there is no such bucket or gcsfs is not installed, OSError where it
    cannot be reached.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    try:
        from lm.storage import gcs
    except ImportError as error:
        raise ValueError(
            f"{path} needs a package that is not here ({error}); pip install gcsfs."
        ) from error
    return gcs.as_gcs_path(os.fspath(path))


def glob_paths(pattern: str) -> list[str]:
    """The files and folders that a pattern with * names, sorted."""
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    as_path(pattern)  # which says what is missing
    from lm.storage import gcs

    return sorted(SCHEME + name for name in gcs.filesystem().glob(pattern))


def check_deletable(folder: pathlib.Path) -> None:
    """Raise OSError where this account may not ask what kind a bucket is.

    Orbax does before it deletes, in google.cloud.storage's words, hours after the start.
    Source: orbax/checkpoint/_src/path/gcs_utils.py, is_hierarchical_namespace_enabled.
    """
    if is_remote(folder):
        from lm.storage import gcs

        gcs.filesystem().call("GET", "b/{}", os.fspath(folder).split("/")[2])


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Replace the file by `data`: a reader sees the old or the new, never a part.

    Raises OSError where it cannot be written.
    """
    path = as_path(path)
    if is_remote(path):
        path.write_bytes(data)
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def open_append(path: str | os.PathLike):
    """A file to append to, with write, flush and close.

    On a disk what is written is there when `write` returns; in a bucket at most PERIOD seconds
    later, if something else is written then, and when `flush` or `close` returns.
    """
    path = as_path(path)
    return _AppendObject(path) if is_remote(path) else open(path, "ab", buffering=0)  # noqa: SIM115


class _AppendObject:
    """An object of a bucket that grows: buckets know no appending, so all of it is written anew."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._data = bytearray(path.read_bytes() if path.exists() else b"")
        self._due, self._written = 0.0, len(self._data)

    def write(self, data: bytes) -> int:
        """Take it all up; the object is behind by PERIOD at most."""
        self._data += data
        if time.monotonic() >= self._due:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Write the object, where anything is new."""
        if self._written == len(self._data):
            return
        started = time.monotonic()
        self._path.write_bytes(bytes(self._data))
        self._written, now = len(self._data), time.monotonic()
        self._due = now + max(FLUSH_SECONDS, FLUSH_COST_FACTOR * (now - started))

    def close(self) -> None:
        """Write what is left."""
        self.flush()


def copy_dir(source: pathlib.Path, target: pathlib.Path, last: str = "") -> None:
    """Copy a folder with all that is in it. To and from a bucket the file `last`, which tells what
    the others are, comes last; where the target has the same one, nothing is copied.

    Raises OSError, naming both folders, where it cannot be done.
    """
    if not is_remote(source) and not is_remote(target):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    try:
        if last:
            mark, there = (source / last).read_bytes(), target / last
            if there.exists() and there.read_bytes() == mark:
                return
            there.unlink(missing_ok=True)
        names = [name for name in _list_files(source) if name != last]
        with concurrent.futures.ThreadPoolExecutor(COPY_THREADS) as pool:
            list(pool.map(lambda name: _copy_file(source / name, target / name), names))
        if last:
            _copy_file(source / last, there)
    except OSError as error:
        raise OSError(
            f"{source} cannot be copied to {target} ({error.strerror or error}); see to the space "
            f"and the permissions there, and run the same command again."
        ) from error


def _list_files(folder: pathlib.Path) -> list[str]:
    """The files in a folder, however deep, by their paths from there."""
    if not is_remote(folder):
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    from lm.storage import gcs

    above = f"{os.fspath(folder).removeprefix(SCHEME)}/"
    found = gcs.filesystem().find(above)  # an empty object of a folder's own name is none of them
    return [name.removeprefix(above) for name in found if not name.endswith("/")]


def _copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
    fresh = target
    if not is_remote(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.{os.getpid()}")
    with source.open("rb") as read, fresh.open("wb") as written:
        shutil.copyfileobj(read, written, COPY_CHUNK_BYTES)
    if fresh != target:
        os.replace(fresh, target)


def local_copy(folder: pathlib.Path, last: str) -> pathlib.Path:
    """The folder on a disk of this machine, for those who read from nowhere else.

    Of a bucket's, that is below ~/.cache/lm/gs: a copy, by `copy`, or where the bucket has no
    finished one, nothing.
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
    """Remove a folder and all that is in it, or the link to one."""
    if is_remote(folder):
        folder.rmtree()
    elif folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def move_dir(folder: pathlib.Path, target: pathlib.Path, mark: str) -> None:
    """Rename a folder. In a bucket that takes a while, and its file `mark`, by which others know
    it to be whole, goes first and comes with it no more.
    """
    if not is_remote(folder):
        folder.rename(target)
        return
    from lm.storage import gcs

    (folder / mark).unlink()
    for name in _list_files(folder):  # copied where they are, not through this machine
        gcs.filesystem().cp_file(f"{folder}/{name}", f"{target}/{name}")
    folder.rmtree()
