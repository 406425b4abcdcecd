"""Tracing some updates with jax's profiler, as --profile=first:last asks."""

from __future__ import annotations

import pathlib
import re
import tempfile

import jax

from lm import exits, storage


def parse_profile(text: str) -> tuple[int, int] | None:
    """The first and last update of --profile=first:last; None if it is empty.

    Raises ValueError for any other text.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"--profile={text} is not a range of updates; write it as 10:15.")
    return first, last


class Profiler:
    """Traces the updates first .. last to workdir/profile; updates: (first, last), or None."""

    def __init__(self, workdir: pathlib.Path, updates: tuple[int, int] | None):
        self.first, self.last = updates or (0, 0)
        self._target, self._directory, self.is_tracing = workdir / "profile", None, False

    def start(self) -> None:
        """Start the trace, unless it is running."""
        if not self.is_tracing:
            # jax's profiler writes to disks only.
            is_remote = storage.is_remote(self._target)
            self._directory = pathlib.Path(tempfile.mkdtemp()) if is_remote else self._target
            jax.profiler.start_trace(str(self._directory))
            self.is_tracing = True

    def stop(self) -> str:
        """Stop and write the trace; returns why it could not be written, or ""."""
        self.is_tracing = False
        try:
            jax.profiler.stop_trace()
            if self._directory != self._target:
                storage.copy_dir(self._directory, self._target)
                storage.remove_dir(self._directory)
        except (jax.errors.JaxRuntimeError, OSError) as error:  # a full disk does not end the run
            return exits.one_line(error)
        return ""
