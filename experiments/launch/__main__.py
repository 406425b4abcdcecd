"""python -m experiments.launch --on=TARGET --slice=SLICE [flags] -- train --config=.. .."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys

from experiments.launch import gke, local, slurm, steps, tpu_vm
from experiments.launch import job as jobs
from lm import cli, lookup

TARGETS = {"local": local, "tpu-vm": tpu_vm, "gke": gke, "slurm": slurm}
CLOUD = ("tpu-vm", "gke")
FLAGS = {  # name: (targets that accept it, help)
    "slice": (TARGETS, "v5e-8, v6e-256 (tpu-vm, gke); local or local-2; h100-16 (slurm)"),
    "name": (TARGETS, "of the queued resource, JobSet or job; the same name finds it again"),
    "slices": (CLOUD, "so many such slices train one run"),
    "spot": (CLOUD, "cheaper capacity that Cloud may take back at any time"),
    "zone": (("tpu-vm",), "where you have quota, as us-central1-a"),
    "project": (("tpu-vm",), "default: gcloud's"),
    "keep": (("tpu-vm",), "leave the queued resource standing behind the run"),
    "image": (("gke",), "container image with this code"),
    "service-account": (CLOUD, "that reads and writes the bucket; gke: Kubernetes' name of it"),
    "per-node": (("slurm",), "GPUs of a node"),
    "port": (("local",), "where host 0 listens"),
    "env": (TARGETS, "NAME=VALUE in each process's environment, for all to see; may be repeated"),
    "extra": ((*CLOUD, "slurm"), "words for gcloud .. create, kubectl apply or sbatch, in one"),
    "no-preflight": (CLOUD, "do not compile it for the slice before asking for one"),
    "dry-run": (TARGETS, "print the commands, as a shell script, and run none"),
}
SWITCHES = {"spot", "keep", "no-preflight", "dry-run"}
NUMBERS = {"slices", "port", "per-node"}


class Flags(argparse.ArgumentParser):
    """A parser that raises ValueError instead of exiting."""

    def error(self, message: str):
        """Raise ValueError."""
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def parser() -> Flags:
    """The parser of the flags before --."""
    flags = Flags(
        prog="python -m experiments.launch",
        usage="%(prog)s --on=TARGET --slice=SLICE [flags] -- train --config=... --workdir=...",
        allow_abbrev=False,
    )
    flags.add_argument("--on", required=True, help=", ".join(TARGETS))
    for name, (targets, text) in FLAGS.items():
        only = "" if set(targets) == set(TARGETS) else f" ({', '.join(targets)})"
        kind = {"action": "store_true"} if name in SWITCHES else {"metavar": "X"}
        if name in NUMBERS:
            kind["type"] = int
        if name == "env":
            kind["action"] = "append"
        default = argparse.SUPPRESS
        flags.add_argument(f"--{name}", help=text + only, default=default, **kind)
    return flags


def parse(words: list[str]) -> tuple[str, jobs.Job, set[str]]:
    """Parses the command line into (target, job, switches that are on).

    Raises ValueError if the target could not run the job.
    """
    cut = words.index("--") if "--" in words else len(words)
    given = vars(parser().parse_args(words[:cut]))
    target = given.pop("on")
    checks = lookup.lookup(TARGETS, target, "--on")
    if "slice" not in given:
        raise ValueError(f"--slice is missing; {FLAGS['slice'][1]}.")
    for name in given:
        flag = name.replace("_", "-")
        targets = FLAGS[flag][0]
        if target not in targets:
            raise ValueError(f"--{flag} is of {' and '.join(targets)}, not of {target}.")
    switches = {name for name in ("dry_run", "no_preflight") if given.pop(name, False)}
    given["environment"] = tuple(given.pop("env", ()))
    given["extra"] = tuple(shlex.split(given.get("extra", "")))
    made = jobs.Job(tuple(words[cut + 1 :]), **given)
    jobs.check(made)
    checks.check(made)
    return target, made, switches


def preflight(job: jobs.Job) -> steps.Step:
    """The command that compiles the run's step for the slice and reports whether it fits."""
    config = [one for one in job.arguments if one.startswith("--config")]
    words = ("python", "-m", "lm", "preflight", *config, f"--slice={job.slice}")
    return steps.Step(words, "does it fit?")


def main(words: list[str]) -> int:
    """Launches the job, or prints its commands; returns the exit code of the run."""
    target, job, switches = parse(words)
    wanted = target in CLOUD and "no_preflight" not in switches
    first = [preflight(job)] if wanted and job.slices == 1 else []
    if "dry_run" in switches:
        print(steps.shown([*first, *TARGETS[target].plan(job)]))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if wanted and not first:  # with several slices, each processes a share of the batch
        steps.say(f"preflight knows one slice: nothing is compiled for --slices={job.slices}")
    if any(code := steps.run(step) for step in first):
        steps.say("preflight refused it, nothing was asked for; --no-preflight launches anyway")
        return code
    return TARGETS[target].launch(job)


if __name__ == "__main__":
    raise SystemExit(cli.run_guarded(lambda: main(sys.argv[1:])))
