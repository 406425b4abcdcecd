"""A SLURM batch job with GPUs, which SLURM queues again after a preemption."""

from __future__ import annotations

import math
import re
import shlex

from experiments.launch import job as jobs
from experiments.launch import steps
from lm import exits

RESTARTS = 100  # starts after which a job gives up
NOTICE = 300  # seconds between SIGTERM (save and stop) and the time limit

# A process a GPU: jax takes SLURM_LOCALID for the number of its only device (slurm_cluster.py).
# TERM@: to every process of the tasks, not to this script (man sbatch, --signal). A task's shell
# must outlive it (trap): its end would cut short Python, which saves. srun's exit code is the
# largest of the tasks', which hides a 2 behind the others' 75, so each failure is kept in a file.
SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={per_node}
#SBATCH --gpus-per-node={gpus}
#SBATCH --signal=TERM@{notice}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}.%j.log
{exports}
codes="$PWD/.{name}.$SLURM_JOB_ID.codes"
rm -rf "$codes" && mkdir "$codes" || exit 2
# shellcheck disable=SC2016  # expanded by each task
srun bash -c 'trap : TERM
  "$@" || {{ code=$?; echo "$code" > "$0/$SLURM_PROCID"; exit "$code"; }}' "$codes" \\
  {train}
all=$?
code="$(find "$codes" -type f -exec cat {{}} + | sort -n | head -n 1)"
rm -rf "$codes"
code="${{code:-$all}}"
if [ "$code" -eq {unfinished} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""


def check(job: jobs.Job) -> None:
    """Raise ValueError where the slice is no number of GPUs that fills nodes."""
    found = re.fullmatch(r"([a-z][a-z0-9_]*)-([1-9]\d*)", job.slice)
    if not found:
        raise ValueError(
            f"--slice={job.slice} is no number of GPUs; use h100-16, with SLURM's word for the "
            f"kind, or gpu-16 for any kind."
        )
    count = int(found[2])
    if count > job.per_node and count % job.per_node:
        raise ValueError(
            f"--slice={job.slice} does not fill nodes of --per-node={job.per_node} GPUs; use a "
            f"multiple of it."
        )


def script(job: jobs.Job) -> str:
    """Returns the batch script."""
    kind, count = job.slice.rsplit("-", 1)
    per_node = min(int(count), job.per_node)
    pairs = (one.partition("=") for one in job.environment)
    return SCRIPT.format(
        name=job.name,
        nodes=math.ceil(int(count) / job.per_node),
        per_node=per_node,
        gpus=per_node if kind == "gpu" else f"{kind}:{per_node}",
        notice=NOTICE,
        exports="".join(f"export {name}={shlex.quote(value)}\n" for name, _, value in pairs),
        train=shlex.join(["python", "-m", "lm", *job.arguments]),
        unfinished=exits.UNFINISHED,
        restarts=RESTARTS,
    )


def plan(job: jobs.Job) -> list[steps.Step]:
    """The sbatch command, with the script on stdin."""
    return [steps.Step(("sbatch", *job.extra), stdin=script(job))]


def launch(job: jobs.Job) -> int:
    """Submits the job; returns sbatch's exit code."""
    (submission,) = plan(job)
    if code := steps.run(submission):
        return code
    steps.say(f"follow it: tail -F {job.name}.*.log; end it: scancel --name={job.name}")
    return 0
