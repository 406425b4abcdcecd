"""Laws of docs/cloud-tpu.md: what it tells to type can be typed."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
GUIDE = (ROOT / "docs/cloud-tpu.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", GUIDE, re.M | re.S)
COMMANDS = [line for block in BLOCKS for line in re.sub(r" *\\\n *", " ", block).splitlines()]
LAUNCHES = [line for line in COMMANDS if line.startswith("python -m experiments.launch")]
NAMES = "\n".join(line for line in COMMANDS if line.startswith("export"))

# Flags that docs.cloud.google.com/sdk/gcloud/reference (release 528) and
# kubernetes.io/docs/reference/kubectl give to each command that the guide names.
KNOWN = {
    "gcloud auth login": "",
    "gcloud auth application-default login": "",
    "gcloud projects create": "",
    "gcloud projects delete": "",
    "gcloud projects add-iam-policy-binding": "member role condition",
    "gcloud billing projects link": "billing-account",
    "gcloud config set": "",
    "gcloud services enable": "async",
    "gcloud compute tpus locations list": "filter limit",
    "gcloud compute tpus accelerator-types list": "zone filter limit",
    "gcloud compute tpus queued-resources list": "zone filter limit",
    "gcloud compute tpus queued-resources describe": "zone",
    "gcloud compute tpus queued-resources delete": "zone force async",
    "gcloud compute tpus queued-resources ssh": "zone node worker command batch-size",
    "gcloud compute tpus queued-resources scp": "zone node worker batch-size recurse",
    "gcloud compute tpus queued-resources create": "zone node-id node-count node-prefix "
    "accelerator-type runtime-version spot service-account network internal-ips",
    "gcloud compute firewall-rules create": "allow network",
    "gcloud storage buckets create": "location uniform-bucket-level-access soft-delete-duration",
    "gcloud storage buckets add-iam-policy-binding": "member role condition",
    "gcloud storage rsync": "recursive exclude",
    "gcloud storage cat": "",
    "gcloud storage rm": "recursive",
    "gcloud iam service-accounts create": "display-name",
    "gcloud container clusters create": "location release-channel",
    "gcloud container clusters delete": "location",
    "gcloud container clusters get-credentials": "location",
    "gcloud container node-pools create": "cluster location node-locations spot machine-type "
    "tpu-topology num-nodes service-account scopes",
    "gcloud artifacts repositories create": "repository-format location",
    "gcloud builds submit": "tag",
    "kubectl apply": "filename server-side",
    "kubectl get jobset": "",
    "kubectl delete jobset": "",
    "kubectl logs": "follow selector prefix",
}
WIDE = {"project", "quiet", "format"}  # flags of every gcloud command


def typed(lines: list[str]):
    """(command, its words) of each gcloud and kubectl command of some lines."""
    for line in lines:
        if re.match(r"(gcloud|kubectl) ", line):
            words = shlex.split(line.partition(" | ")[0], comments=True)
            yield line, words


def unknown(words: list[str]) -> list[str]:
    """The flags of a command that the reference does not know; the command where it is new."""
    plain = " ".join(word for word in words if not word.startswith("-"))
    found = [name for name in KNOWN if plain.startswith(name)]
    if not found:
        return words[:4]
    flags = [word.lstrip("-").partition("=")[0] for word in words if word.startswith("-")]
    allowed = set(KNOWN[max(found, key=len)].split()) | WIDE
    return [flag for flag in flags if flag not in allowed]


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """An environment whose python is ours, and whose clouds refuse any call."""
    made = tmp_path_factory.mktemp("bin")
    for name in ("gcloud", "kubectl", "sbatch", "srun"):
        (made / name).write_text("#!/bin/bash\necho called >&2\nexit 99\n")
        (made / name).chmod(0o755)
    path = f"{made}:{pathlib.Path(sys.executable).parent}:/usr/bin:/bin"
    return os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu"}


def test_it_launches_on_every_target():
    targets = {re.search(r"--on=(\S+)", line)[1] for line in LAUNCHES}
    assert targets == {"tpu-vm", "gke", "slurm", "local"}
    assert all(" --dry-run -- " in line for line in LAUNCHES), (
        "its commands cost nothing as they are"
    )


@pytest.mark.parametrize("line", LAUNCHES, ids=lambda line: re.search(r"--on=(\S+)", line)[1])
def test_every_dry_run_of_the_guide_runs(line, around):
    script = f"set -eu\n{NAMES}\n{line}"
    command = ["bash", "-c", script]
    done = subprocess.run(
        command, cwd=ROOT, env=around, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing was called"
    checked = subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False)
    assert checked.returncode == 0
    printed = re.sub(r" *\\\n *", " ", done.stdout).splitlines()
    for shown, words in typed([text for text in printed if "--command=" not in text]):
        assert unknown(words) == [], shown
    config = re.search(r"--config=(\S+):", line)[1]
    assert (ROOT / config).exists()


def test_every_command_and_flag_is_of_the_reference():
    inline = re.findall(r"`(gcloud [^`]*|kubectl [^`]*)`", GUIDE)
    lines = [*COMMANDS, *(line for line in inline if line.count(" ") > 2)]
    found = [(line, unknown(words)) for line, words in typed(lines)]
    assert len(found) > 25
    assert [(line, flags) for line, flags in found if flags] == []
    strange = "gcloud compute tpus queued-resources delete x --zone=y --fast"
    assert unknown(strange.split()) == ["fast"]
    assert unknown(["gcloud", "tpus", "list"]) != []


def test_every_block_is_shell():
    for block in BLOCKS:
        assert subprocess.run(["bash", "-n"], input=block, text=True, check=False).returncode == 0


def test_no_name_is_used_before_it_is_said():
    known = set(re.findall(r"(\w+)=", NAMES))
    used = {name for line in COMMANDS for name in re.findall(r"\$(\w+)", line)}
    assert used <= known, used - known


def test_what_it_speaks_of_is_there():
    from lm import cli

    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?\bmake ([a-z-]+)", GUIDE):
        assert re.search(rf"^{target}:", makefile, re.M), target
    extras = (ROOT / "pyproject.toml").read_text()
    for extra in ",".join(re.findall(r"'\.\[([a-z,]+)\]'", GUIDE)).split(","):
        assert re.search(rf"^{extra} = ", extras, re.M), extra
    for command, rest in re.findall(r"^python -m lm (\w+)(.*)", GUIDE, re.M):
        takes = {flag.rstrip("?") for flag in cli.COMMANDS[command][1]} | {"help"}
        assert {flag for flag in re.findall(r" --(\w+)", rest)} <= takes, command
