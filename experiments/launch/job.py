"""A run and its machines, checked before anything is paid for."""

from __future__ import annotations

import dataclasses
import os
import re

from lm import exits
from lm.preflight import slices

FINAL = (
    0,
    exits.USER_ERROR,
    exits.DIVERGED,
)  # finished, user error, diverged: a restart would end the same way
OURS = ("--coordinator", "--hosts", "--host", "--dry_run")  # flags of train that the launcher sets


@dataclasses.dataclass(frozen=True)
class Job:
    """A run and the machines for it.

    arguments: those of `python -m lm`. environment: NAME=VALUE of each process. extra: words for
    the command that asks for the machines (gcloud .. create, kubectl apply, sbatch). port: where
    host 0 of local processes listens. per_node: GPUs of a SLURM node.
    """

    arguments: tuple[str, ...]
    slice: str
    name: str = "lm"
    zone: str = ""
    project: str = ""
    image: str = ""
    service_account: str = ""
    slices: int = 1
    spot: bool = False
    keep: bool = False
    environment: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    port: int = 8476
    per_node: int = 8

    @property
    def tpus(self) -> slices.Slice:
        """The TPU slice of that name. Raises ValueError if there is none."""
        return slices.parse_slice(self.slice)

    def flag(self, name: str) -> str:
        """The value of a flag --name=value of the command; "" if it is missing."""
        start = f"--{name}="
        return next((one[len(start) :] for one in self.arguments if one.startswith(start)), "")


def check(job: Job) -> None:
    """Raises ValueError if no target could run the job."""
    if job.arguments[:1] != ("train",):
        given = repr(job.arguments[0]) if job.arguments else "nothing"
        raise ValueError(
            f"after -- there is {given}, which trains nothing; end the command with "
            f"-- train --config=... --workdir=..."
        )
    for name in ("config", "workdir"):
        if not job.flag(name):
            raise ValueError(f"the command behind -- has no --{name}=...; add it to `train`.")
    for one in job.arguments:
        if one.partition("=")[0] in OURS:
            raise ValueError(f"{one} behind -- is the launcher's to say; leave it out.")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", job.name):
        raise ValueError(
            f"--name={job.name} is no name for Cloud; use at most 40 small letters, digits and "
            f"hyphens, a letter first."
        )
    for one in job.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", one):
            raise ValueError(f"--env={one} sets nothing; write it as --env=NAME=VALUE.")
    if job.slices < 1:
        raise ValueError(f"--slices={job.slices} is no number of slices; use 1 or more.")


def check_cloud(job: Job) -> None:
    """Raises ValueError if hosts without a shared disk could not run the job."""
    job.tpus  # noqa: B018  (raises for an unknown slice)
    for one in job.arguments:
        flag, _, value = one.partition("=")
        ours = "/" in value and os.path.isdir(value)  # a corpus, a tokenizer, a run
        if ours or flag == "--workdir" and not value.startswith("gs://"):
            raise ValueError(
                f"{one} is on a disk of this machine, and the hosts of {job.slice} share none; use "
                f"a bucket, as {flag}=gs://bucket/run."
            )


def decides(codes: list[int]) -> int:
    """The exit code of a run from those of its hosts: the smallest that is not 0, else 0.

    A host with a user error ends with 2, and the others, which lose it, with 75.
    """
    return min((code for code in codes if code), default=0)
