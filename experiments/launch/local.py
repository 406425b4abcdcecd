"""Several processes of this machine as the hosts of one run."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time

from experiments.launch import job as jobs
from experiments.launch import steps

GRACE = 60  # seconds in which hosts detect a lost host; then they are killed


def hosts(job: jobs.Job) -> int:
    """Number of processes of the slice local or local-N. Raises ValueError for other names."""
    found = re.fullmatch(r"local(?:-([1-9]\d?))?", job.slice)
    if not found:
        raise ValueError(
            f"--slice={job.slice} is not of this machine; use local, or local-2 for two processes."
        )
    return int(found[1] or 1)


def check(job: jobs.Job) -> None:
    """Raises ValueError if this machine could not run the job."""
    hosts(job)


def plan(job: jobs.Job) -> list[steps.Step]:
    """A command for each process; of several processes, each uses the GPU with its number."""
    count, train = hosts(job), ("python", "-m", "lm", *job.arguments)
    if count == 1:
        return [steps.Step(train, environment=job.environment)]
    together = (f"--coordinator=127.0.0.1:{job.port}", f"--hosts={count}")
    return [
        steps.Step(
            (*train, *together, f"--host={host}"),
            environment=(f"CUDA_VISIBLE_DEVICES={host}", *job.environment),
            beside=True,
        )
        for host in range(count)
    ] + [steps.Step(("wait",))]


def launch(job: jobs.Job) -> int:
    """Runs the processes until they end; returns the exit code of the run (job.decides).

    Prints each line after its host's number, and forwards SIGINT and SIGTERM. If a host fails, the
    others end by themselves or are killed after GRACE seconds.
    """
    todo = [step for step in plan(job) if step.words != ("wait",)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    # In their own sessions: Ctrl-C reaches only this process, which forwards it once.
    running = [steps.started(step, start_new_session=True, **options) for step in todo]

    def forward(number, frame):
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    readers = [
        threading.Thread(target=_prefixed, args=(process.stdout, f"[{host}] "), daemon=True)
        for host, process in enumerate(running)
    ]
    try:
        for reader in readers:
            reader.start()
        _until_the_last_ends(running)
        for reader in readers:
            reader.join(5)
    finally:
        for process in running:
            _kill(process)
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [process.returncode for process in running]
    return jobs.decides([code if code >= 0 else 128 - code for code in codes])


def _until_the_last_ends(running: list[subprocess.Popen]) -> None:
    """Waits; kills the remaining processes GRACE seconds after one has failed."""
    deadline = None
    while any(process.poll() is None for process in running):
        if deadline is None and any(process.poll() for process in running):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for process in running:
                _kill(process)
        time.sleep(0.05)


def _kill(process: subprocess.Popen) -> None:
    """Kills a process with its data workers, and waits for its end."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _prefixed(lines, prefix: str) -> None:
    for line in lines:
        print(f"{prefix}{line}", end="" if line.endswith("\n") else "\n", flush=True)
