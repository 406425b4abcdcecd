"""Processes of `python -m lm`, each in its own group, forked from a server with the imports.

The standard library's fork server imports the modules of a run and creates no jax backend; a fork
starts in a fifth of the time of a new interpreter.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

from experiments.kill_drill import faults as inside

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["experiments.kill_drill.preloaded"])
ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 240.0  # timeout of a process in seconds


def surroundings(home: pathlib.Path) -> dict[str, str]:
    """The environment of all children: CPU, one compilation cache. Set it before the first."""
    return {
        "JAX_PLATFORMS": "cpu",
        "NPROC": "32",  # fewer and XLA's collectives deadlock on two cores
        "OPENBLAS_NUM_THREADS": "1",  # a fork server must have one thread
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # compiles in half the time
        "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


class Child:
    """A process of `python -m lm`, with its output appended to a log.

    arguments: of `python -m lm`. devices: number of CPU devices. faults: {name in faults.FAULTS:
    arguments} to inject; not for a plain child. plain: start a new interpreter instead of a fork.
    cold: without a compilation cache. environment: more variables.
    """

    def __init__(
        self, arguments, log, *, devices=1, faults=None, plain=False, cold=False, environment=None
    ):
        self.start, self.log = time.time(), pathlib.Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        fake = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        environment = fake | (environment or {})
        if plain:
            if cold:
                environment["JAX_COMPILATION_CACHE_DIR"] = ""
            command = [sys.executable, "-m", "lm", *arguments]
            with open(self.log, "a") as said:
                self._process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | environment,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                )
        else:
            given = (list(arguments), str(self.log), environment, faults or {})
            self._process = CONTEXT.Process(target=inside.live, args=given)
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit code, or None after the timeout."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return code

    def send(self, number: int) -> bool:
        """Sends a signal to the process; returns whether it was running."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def end(self) -> int | None:
        """Kills the process group and returns the exit code."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return self.wait(10)

    def said(self) -> str:
        """The content of the log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""
