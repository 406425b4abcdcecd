"""A cloud on PATH: gcloud, kubectl, sbatch, git and python that record their calls and obey a plot.

Its queued resource has states as Cloud's, and its hosts are folders, in which the commands that
come by ssh run in a real bash: what they call there (python3, git, the trainer) is made up.
"""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

from experiments.launch import __main__ as launch
from experiments.launch import tpu_vm

PROGRAM = """#!{python} -SE
import json, os, pathlib, shutil, signal, subprocess, sys, time

home = pathlib.Path({home!r})
program, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
stdin = sys.stdin.read() if program in ("kubectl", "sbatch") else ""
with open(home / "calls.jsonl", "a") as calls:
    calls.write(json.dumps({{"words": [program, *words], "stdin": stdin}}) + "\\n")
plot = json.loads((home / "plot.json").read_text())
state = home / "state"

def end(code, complaint=""):
    if complaint:
        print("ERROR: (gcloud.compute.tpus) " + complaint, file=sys.stderr)
    raise SystemExit(code)

def take(name, default):
    if not plot.get(name):
        return default
    first = plot[name].pop(0)
    (home / "plot.json").write_text(json.dumps(plot))
    return first

def lose_hosts():
    for pid in home.glob("hosts/*/lm-run/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            pass
    shutil.rmtree(home / "hosts", ignore_errors=True)

def ssh(command):
    running = []
    for host in range(plot["hosts"]):
        place = home / "hosts" / str(host)
        place.mkdir(parents=True, exist_ok=True)
        surroundings = {{"PATH": f"{{home}}/there:/usr/bin:/bin", "HOME": str(place)}}
        surroundings["HOST"] = str(host)
        running.append(subprocess.Popen(
            ["bash", "-c", command], cwd=place, env=surroundings, start_new_session=True))
    def hang_up(number, frame):  # what is of the connection's session goes with it
        for one in running:
            os.killpg(one.pid, signal.SIGKILL)
        os._exit(255)
    signal.signal(signal.SIGTERM, hang_up)
    while any(one.poll() is None for one in running):
        if state.read_text() == "SUSPENDED":
            lose_hosts()
            for one in running:
                os.killpg(one.pid, signal.SIGKILL)
            end(255, "ssh: connection lost")
        time.sleep(0.02)
    end(next((one.returncode for one in running if one.returncode), 0))

if program == "git":
    if words[0] == "bundle":
        pathlib.Path(words[3]).write_text("the code")
    end(0)
if program != "gcloud":
    end(take(program, 0))
verb = words[3]
if complaint := take("errors." + verb, ""):
    end(1, complaint)
if verb == "describe":
    if not state.exists():
        end(1, "NOT_FOUND: Resource was not found.")
    if state.read_text() != "SUSPENDED":
        state.write_text(take("states", "ACTIVE"))
    print(state.read_text())
elif verb == "create":
    if state.exists():
        end(1, "ALREADY_EXISTS: Resource is there.")
    state.write_text("CREATING")
elif verb == "delete":
    lose_hosts()
    state.unlink()
elif verb == "scp":
    for host in range(plot["hosts"]):
        place = home / "hosts" / str(host)
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(words[4], place / words[5].partition(":")[2])
elif verb == "ssh":
    ssh(next(word for word in words if word.startswith("--command=")).partition("=")[2])
"""

THERE = {  # the programs of a host
    "git": '#!/bin/bash\n[ -s "${@: -2:1}" ] && mkdir "${@: -1}"\n',
    "python3": '#!/bin/bash\ncase "$*" in *"uv venv"*) mkdir -p .venv/bin && '
    "cp {home}/trainer .venv/bin/python;; esac\n",
}

# Each start takes a word of its host's lives: an exit code, or "preempted".
TRAINER = """#!/bin/bash
lives={home}/lives.$HOST
life="$(head -n 1 "$lives")"; sed -i 1d "$lives"
step="$(cat {home}/bucket 2>/dev/null || echo 0)"
echo "host $HOST is at step $step: $*"
[ "$HOST" = 0 ] && echo $((step + 1)) > {home}/bucket
if [ "$life" = preempted ]; then sleep 0.2; printf SUSPENDED > {home}/state; sleep 60; fi
exit "$life"
"""


class Cloud:
    """What is to happen, and what was called."""

    def __init__(self, home: pathlib.Path):
        self.home, self.bin = home, home / "bin"
        for name in ("bin", "there"):
            (home / name).mkdir()
        for name in ("gcloud", "kubectl", "sbatch", "git", "python"):
            self._write(self.bin / name, PROGRAM.format(python=sys.executable, home=str(home)))
        for name, text in THERE.items():
            self._write(home / "there" / name, text.replace("{home}", str(home)))
        self._write(home / "trainer", TRAINER.replace("{home}", str(home)))
        self.plot()

    def _write(self, path: pathlib.Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def plot(self, hosts: int = 1, lives=(("0",),), **words) -> None:
        """hosts: of the slice. lives: for each host, what becomes of its starts. words: in order,
        states of describe, errors of a verb (errors_create), exit codes of a program.
        """
        made = {name.replace("_", "."): list(value) for name, value in words.items()}
        (self.home / "plot.json").write_text(json.dumps(made | {"hosts": hosts}))
        for host, codes in enumerate(lives):
            (self.home / f"lives.{host}").write_text("".join(f"{code}\n" for code in codes))

    def forget(self) -> None:
        """Nothing was called, nothing stands."""
        for name in ("calls.jsonl", "state", "bucket"):
            (self.home / name).unlink(missing_ok=True)

    def calls(self) -> list[dict]:
        """Every call so far: {"words": [program, ..], "stdin": its input}."""
        path = self.home / "calls.jsonl"
        return [json.loads(line) for line in path.open()] if path.exists() else []

    def verbs(self) -> list[str]:
        """What was asked of gcloud's queued resources, in order, looks at the state left out."""
        called = [call["words"] for call in self.calls()]
        verbs = [words[4] for words in called if words[0] == "gcloud"]
        return [verb for verb in verbs if verb != "describe"]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A Cloud on PATH, in which nothing takes time."""
    made = Cloud(tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(made.bin / "python"))
    monkeypatch.setattr(tpu_vm, "POLL", 0.0)
    monkeypatch.setattr(tpu_vm, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(launch.signal, "signal", lambda number, handler: None)
    return made
