"""A queued resource of Cloud TPU: request it, install the code, watch the run, request it again.

The run does not need this program, which only watches it; started again, the program finds the
resource by its name and watches on. A preempted resource is deleted and requested again, and the
same command continues the run from its checkpoint in the bucket.

Flags: docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources. States:
docs.cloud.google.com/tpu/docs/queued-resources.
"""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import tempfile
import time

from experiments.launch import job as jobs
from experiments.launch import steps
from lm import exits

POLL = 20.0  # seconds between queries of the state
PAUSES = (5.0, 15.0, 45.0)  # seconds before a failed call is repeated
LASTING = ("PERMISSION_DENIED", "INVALID_ARGUMENT", "UNAUTHENTICATED", "FAILED_PRECONDITION")
TRIES = 5  # consecutive failures, each within QUICK, before it gives up
QUICK = 600.0  # seconds
GONE = ("FAILED", "SUSPENDED")  # delete it before requesting it again
CODE = ("lm", "configs", "experiments", "pyproject.toml", "requirements.txt")  # the code of a run
CHANGES = steps.Step(("git", "status", "--porcelain", "--", *CODE), "this must print nothing")

# A run has its own session and log, so that it outlives the connection. uv installs Python, because
# the Ubuntu of TPU VMs has an older one than lm requires.
RUNNING = 'kill -0 "$(cat lm-run/pid 2>/dev/null)" 2>/dev/null'
INSTALL = f"""\
{RUNNING} && exit 0
set -e
rm -rf lm-run
git -c advice.detachedHead=false clone --quiet lm.bundle lm-run
cd lm-run
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python 3.11 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs]'
"""
RUN = f"""\
if ! {RUNNING}; then
  cd lm-run && rm -f code && : > log || exit 2
  export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
  nohup setsid bash -c '"$@"; echo $? > code' run {{train}} >> log 2>&1 < /dev/null &
  echo $! > pid && cd ..
fi
tail --pid="$(cat lm-run/pid)" --lines=+1 --follow lm-run/log 2> /dev/null
echo "lm-run ended with exit code $(cat lm-run/code)"
"""
ENDED = re.compile(
    r"lm-run ended with exit code (\d+)\n"
)  # may follow an unfinished line of another host


def check(job: jobs.Job) -> None:
    """Raises ValueError if gcloud could not run the job."""
    jobs.check_cloud(job)
    if not job.zone:
        raise ValueError("--zone is missing; name one with your quota, as --zone=us-central1-a.")
    config = pathlib.PurePath(job.flag("config").partition(":")[0])
    if config.is_absolute() or ".." in config.parts:
        raise ValueError(
            f"--config={config} lies outside the checkout, which is all that the hosts get; put "
            f"it into configs/."
        )


def check_committed() -> None:
    """Raises ValueError if files differ from the commit, which is what the hosts get."""
    found = steps.read(CHANGES)
    if found.returncode:
        raise ValueError("this is no git checkout, and the hosts get its commit; run it in one.")
    if found.stdout:
        files = [line[3:] for line in found.stdout.splitlines()]
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        raise ValueError(
            f"{', '.join(files[:3])}{more} differ from the commit, which is what the hosts get; "
            f"commit them."
        )


def _gcloud(job: jobs.Job, *words: str) -> tuple[str, ...]:
    where = (f"--zone={job.zone}",) + (f"--project={job.project}",) * bool(job.project)
    verb, *rest = words
    return ("gcloud", "compute", "tpus", "queued-resources", verb, *rest, *where)


def creation(job: jobs.Job) -> steps.Step:
    """The command that requests the resource."""
    several = (f"--node-count={job.slices}", f"--node-prefix={job.name}")
    words = _gcloud(
        *(job, "create", job.name),
        *(several if job.slices > 1 else (f"--node-id={job.name}",)),
        f"--accelerator-type={job.tpus.accelerator_type}",
        f"--runtime-version={job.tpus.runtime_version}",
    )
    words += ("--spot",) * job.spot
    words += (f"--service-account={job.service_account}",) * bool(job.service_account)
    return steps.Step((*words, *job.extra), "ask for it")


def description(job: jobs.Job) -> steps.Step:
    """The command that prints the state of the resource."""
    words = _gcloud(job, "describe", job.name, "--format=value(state.state)")
    return steps.Step(words, "again until it is ACTIVE")


def deletion(job: jobs.Job) -> steps.Step:
    """The command that deletes the resource and ends its cost."""
    return steps.Step(_gcloud(job, "delete", job.name, "--force", "--quiet"), "give it back")


def attempt(job: jobs.Job) -> list[steps.Step]:
    """The commands that bundle, copy and install the code, and run; the last is the run."""
    bundle = f"{tempfile.gettempdir()}/{job.name}.bundle"
    everywhere = ("--node=all", "--worker=all", "--batch-size=all")
    assigned = ("env", *job.environment) if job.environment else ()
    train = shlex.join((*assigned, "python", "-m", "lm", *job.arguments))
    pack = ("git", "bundle", "create", "--quiet", bundle, "HEAD")
    ssh = lambda script: _gcloud(job, "ssh", job.name, *everywhere, f"--command={script}")
    return [
        steps.Step(pack, "the code, as committed"),
        steps.Step(_gcloud(job, "scp", bundle, f"{job.name}:lm.bundle", *everywhere)),
        steps.Step(ssh(INSTALL), "install it, where no run is going on"),
        steps.Step(ssh(RUN.format(train=train)), "start the run, or look on"),
    ]


def plan(job: jobs.Job) -> list[steps.Step]:
    """The commands of a run without preemptions, in order."""
    known = steps.Step(description(job).words, "is it there already?")
    made = [CHANGES, known, creation(job), description(job), *attempt(job)]
    return made if job.keep else [*made, deletion(job)]


def call(step: steps.Step, fine: str = "") -> str:
    """Returns gcloud's output; "" if it fails with the word `fine` in its message.

    Retries after PAUSES. Raises ValueError with gcloud's message after the last.
    """
    for pause in (*PAUSES, None):
        done = steps.read(step)
        if not done.returncode:
            return done.stdout.strip()
        if fine and fine in done.stderr:
            return ""
        if pause is None or any(word in done.stderr for word in LASTING):
            break
        time.sleep(pause)
    said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    raise ValueError(f"`{' '.join(step.words[:6])}` failed: {said[:400]}")


def state(job: jobs.Job) -> str:
    """The state of the resource; "" if it does not exist."""
    return call(description(job), fine="NOT_FOUND")


def acquire(job: jobs.Job) -> None:
    """Waits until the resource is ACTIVE; requests it if missing, deletes it if preempted.

    Raises ValueError if the request FAILED TRIES times.
    """
    seen, failed = None, 0
    while (now := state(job)) != "ACTIVE":
        if now != seen:
            steps.say(f"{job.name} is {now or 'not there: asking for it'}")
        seen = now
        if now in GONE:
            failed += now == "FAILED"
            if failed == TRIES:
                raise ValueError(
                    f"{job.name} FAILED {failed} times before it was ACTIVE; see why with `gcloud "
                    f"compute tpus queued-resources describe {job.name} --zone={job.zone}`."
                )
            call(deletion(job), fine="NOT_FOUND")
        elif not now:
            call(creation(job), fine="ALREADY_EXISTS")
            continue
        time.sleep(POLL)


def watch(step: steps.Step) -> list[int]:
    """Runs a step and prints the output of the hosts; returns their exit codes."""
    codes = []
    with steps.running(step, stdout=subprocess.PIPE, errors="replace") as process:
        for line in process.stdout:
            codes += map(int, ENDED.findall(line))
            print(ENDED.sub("", line), end="", flush=True)
        process.wait()
    return codes


def attempted(job: jobs.Job) -> int:
    """Runs on an ACTIVE resource and returns the exit code of the run.

    UNFINISHED if a host ends so or prints no exit code: the others may have failed because of it.
    """
    *before, last = attempt(job)
    if any(steps.run(step) for step in before):
        return exits.UNFINISHED
    codes = watch(last)
    if len(codes) < job.tpus.hosts * job.slices or exits.UNFINISHED in codes:
        return exits.UNFINISHED
    return jobs.decides(codes)


def launch(job: jobs.Job) -> int:
    """Runs the job to its end, through preemptions; returns its exit code and deletes the resource.

    Ctrl-C ends only the watching. Raises ValueError if Cloud refuses, or if the run fails TRIES
    times in a row within QUICK seconds each.
    """
    check_committed()
    failures = 0
    try:
        while failures < TRIES:
            acquire(job)
            start = time.monotonic()
            if (code := attempted(job)) == 0:
                break
            if state(job) != "ACTIVE":
                steps.say(f"{job.name} was preempted; the run goes on with a new one")
                continue
            if code in jobs.FINAL:
                break
            failures = failures + 1 if time.monotonic() - start < QUICK else 0
            steps.say(f"the run stopped with {code}; starting it again")
            time.sleep(POLL)
    except KeyboardInterrupt:
        steps.say(
            f"looking on no longer; the run and its cost go on. To end both:\n{deletion(job)}"
        )
        steps.say("the same command looks on again")
        return exits.UNFINISHED
    if not job.keep:
        call(deletion(job), fine="NOT_FOUND")
    if failures == TRIES:
        raise ValueError(
            f"the run failed {TRIES} times in a row within {QUICK / 60:.0f} minutes each (the last "
            f"time with {code}); what it said is above."
        )
    return code
